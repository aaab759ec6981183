"""The documentation tells the truth: its examples run, its links lead somewhere, its tables agree
with the code. docs/format.md and docs/configuration.md have test files of their own besides.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import ROOT

import yatagarasu_cache
from yatagarasu_cache import AsyncDiskCache, CacheStats, DiskCache, cli, codec, errors
from yatagarasu_cache.config import RingSettings, Settings
from yatagarasu_cache.store import checkpointing, directory, limits, removal
from yatagarasu_cache.store import format as layout
from yatagarasu_cache.store import victims as victims_module

PACKAGE = ROOT / "yatagarasu_cache"
FILES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}
GUIDE, OPERATIONS, README = TEXTS["docs/guide.md"], TEXTS["docs/operations.md"], TEXTS["README.md"]
CONFIGURATION = TEXTS["docs/configuration.md"]


class Block(NamedTuple):
    """A fenced block: `line` is that of its first line of code, `marker` the HTML comment before it."""

    language: str
    line: int
    code: str
    marker: str


def blocks(text: str) -> Iterator[Block]:
    marker = ""
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if fence := re.fullmatch(r"```(\w*)", line):
            code = []
            for _, inner in lines:
                if inner == "```":
                    break
                code.append(inner)
            else:
                raise AssertionError(f"the block at line {number} is never closed")
            yield Block(fence[1], number + 1, "\n".join(code) + "\n", marker)
            marker = ""
        elif line.strip():
            comment = re.fullmatch(r"<!-- (.+) -->", line)
            marker = comment[1] if comment else ""


def blocks_of(language: str) -> list[tuple[str, Block]]:
    """(document, block) of every block in a language."""
    every = [(name, block) for name, text in TEXTS.items() for block in blocks(text)]
    return [(name, block) for name, block in every if block.language == language]


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def table(text: str, name: str) -> list[dict[str, str]]:
    """The rows, by column name, of the table behind ``<!-- table: name -->``."""
    match = re.search(rf"^<!-- table: {name} -->\n\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert match is not None, f"there is no table {name}"
    head, _, *rows = match[1].splitlines()
    return [dict(zip(cells(head), cells(row), strict=True)) for row in rows]


def cells(row: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def quoted(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


# -- examples ----------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """For a process that imports this very package."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def script(text: str) -> str:
    """All blocks of Python to be run, each line where it stands in the document.

    Files of their own (``<!-- file: NAME -->``) are run by test_deployments.py.
    """
    lines = [""] * (text.count("\n") + 1)
    for block in blocks(text):
        if block.language == "python" and block.marker != "no-run" and not block.marker.startswith("file: "):
            code = block.code.splitlines()
            lines[block.line - 1 : block.line - 1 + len(code)] = code
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if script(text).strip()])
def test_examples_run(name: str, tmp_path: Path) -> None:
    """Block after block in one namespace, in an empty directory; line numbers are the document's."""
    path = tmp_path / Path(name).with_suffix(".py").name
    path.write_text(script(TEXTS[name]), encoding="utf-8")
    place = tmp_path / "place"
    place.mkdir()
    done = subprocess.run(
        [sys.executable, str(path)], cwd=place, env=environment(), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, f"an example of {name} fails:\n{done.stderr}"


@pytest.mark.parametrize(("name", "block"), blocks_of("python"))
def test_examples_compile(name: str, block: Block) -> None:
    compile(block.code, f"{name}:{block.line}", "exec")


def test_only_what_cannot_run_is_left_out() -> None:
    """Examples that are not run are few: each needs files of the reader's."""
    left_out = [(name, block.line) for name, block in blocks_of("python") if block.marker == "no-run"]
    assert len(left_out) <= 1, left_out


@pytest.mark.parametrize(("name", "block"), blocks_of("shell"))
def test_shell_commands_parse(name: str, block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True)
    assert done.returncode == 0, f"{name}:{block.line}: {done.stderr}"


def sessions() -> list[Block]:
    return [block for _, block in blocks_of("console") if block.marker == "run"]


def test_there_are_sessions() -> None:
    assert sessions()
    assert all(block.marker == "run" for _, block in blocks_of("console"))


@pytest.mark.parametrize("block", sessions(), ids=lambda block: str(block.line))
def test_console_sessions(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Every command succeeds and prints what the session shows; ``...`` stands for anything."""
    monkeypatch.chdir(tmp_path)
    for part in re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        run_command(command)
        printed = capfdbinary.readouterr().out.decode()
        pattern = ".*?".join(map(re.escape, expected.rstrip("\n").split("...")))
        assert re.fullmatch(pattern, printed.rstrip("\n"), re.DOTALL), f"$ {command}\n{printed}"


def run_command(command: str) -> None:
    program, *arguments = shlex.split(command)
    if program == "yatagarasu-cache":
        assert cli.main(arguments) == 0, command
    else:
        subprocess.run(["sh", "-c", command], check=True)


# -- links -------------------------------------------------------------------------------------


def slugs(text: str) -> set[str]:
    """The anchors that a Markdown renderer makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links(text: str) -> list[str]:
    return re.findall(r"\[[^\]]+\]\(([^)\s]+)\)", prose(text))


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    for link in links(TEXTS[name]):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        if anchor:
            text = TEXTS[str(target.resolve().relative_to(ROOT))]
            assert anchor in slugs(text), f"{name}: {link}"


def test_every_document_is_linked_from_the_readme() -> None:
    linked = {link.partition("#")[0] for link in links(README)}
    assert {name for name in TEXTS if name != "README.md"} <= linked


@pytest.mark.parametrize("name", ["docs/guide.md", "docs/operations.md", "docs/format.md"])
def test_contents_name_every_section(name: str) -> None:
    contents = TEXTS[name].split("\nContents:", 1)[1].split("\n\n", 1)[0]
    headings = set(re.findall(r"^## (.+)$", prose(TEXTS[name]), re.MULTILINE))
    assert {link[1:] for link in links(contents)} == slugs("".join(f"## {h}\n" for h in headings))


# -- names -------------------------------------------------------------------------------------


def public(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


def mentioned(name: str, text: str) -> bool:
    """Whether the name occurs as code, in an example or in backticks."""
    code = " ".join([*quoted(prose(text)), *(block.code for block in blocks(text))])
    return re.search(rf"(?<![\w.]){name}\b|\.{name}\b", code) is not None


@pytest.mark.parametrize("name", yatagarasu_cache.__all__)
def test_the_guide_mentions_every_public_name(name: str) -> None:
    assert mentioned(name, GUIDE)


@pytest.mark.parametrize("name", sorted(public(DiskCache)))
def test_the_guide_mentions_every_method(name: str) -> None:
    assert mentioned(name, GUIDE)


def test_the_guide_says_how_the_asyncio_class_differs() -> None:
    """`same names` has to hold; what only one of the two has would need a line in the guide."""
    assert public(DiskCache) == public(AsyncDiskCache)


def test_the_table_of_errors() -> None:
    """Every exception with its built-in base, and no other."""
    documented = {}
    section = GUIDE.split("\n## Errors\n")[1].split("\n## ")[0]
    for name, also in re.findall(r"^\| `(\w+)` \|([^|]*)\|", section, re.MULTILINE):
        documented[name] = quoted(also)
    expected = {}
    for name in set(errors.__all__) - {"CacheError", "from_os_error"}:
        bases = [base.__name__ for base in getattr(errors, name).__bases__ if base is not errors.CacheError]
        expected[name] = bases
    assert documented == expected


# -- settings ----------------------------------------------------------------------------------


def settings_in(section: str) -> set[str]:
    """The names in the first column of a section's table in docs/configuration.md."""
    below = CONFIGURATION.split(f"# {section}\n", 1)[1]
    return set(re.findall(r"^\| `(\w+)` \|", below.split("\n##", 1)[0], re.MULTILINE))


def test_settings_are_documented_and_linked() -> None:
    ring = {field.name for field in dataclasses.fields(RingSettings)}
    others = {field.name for field in dataclasses.fields(Settings)}
    assert settings_in("`io_uring`") == ring
    assert settings_in("Settings") == others
    linked = set(re.findall(r"\[`(\w+)`\]\(configuration\.md#[\w-]+\)", GUIDE))
    assert linked == ring | others


@pytest.mark.parametrize("name", TEXTS)
def test_options_in_examples_exist(name: str) -> None:
    """Keyword arguments of caches in the examples are settings; those of methods are parameters."""
    known = {field.name for field in dataclasses.fields(Settings)}
    for block in (block for block in blocks(TEXTS[name]) if block.language == "python"):
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("DiskCache", "AsyncDiskCache"):
                assert {keyword.arg for keyword in node.keywords} <= known


def test_environment_variables() -> None:
    """Those that the documents name exist in the code, and those of the code are documented."""
    sources = [*PACKAGE.rglob("*.py"), *(ROOT / "csrc" / "building").glob("*.py"), ROOT / "setup.py"]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    used = set(re.findall(r"\bYATAGARASU_[A-Z_]+\b", code))
    named = set(re.findall(r"\bYATAGARASU_[A-Z_]+\b", "\n".join(TEXTS.values())))
    assert named <= used
    assert used - named <= {"YATAGARASU_WERROR"}  # for those who work on the project


def test_extras() -> None:
    """The extras that the documents name are those of pyproject.toml, the project's own aside."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.split("[project.optional-dependencies]\n", 1)[1].split("\n[", 1)[0]
    extras = set(re.findall(r"^([\w-]+) = ", section, re.MULTILINE))
    named = set(re.findall(r"(?:\.|yatagarasu_cache)\[([\w-]+)\]\"", "\n".join(TEXTS.values())))
    assert named == extras - {"test", "deployments", "integrations", "perf"}


def test_scripts_exist() -> None:
    for name in set(re.findall(r"\bbash (ci/[\w-]+)", "\n".join(TEXTS.values()))):
        assert (ROOT / name).is_file(), name


# -- tables of operations.md -------------------------------------------------------------------


def kibibytes(text: str) -> int:
    number, unit = text.split()
    return int(number) * {"KiB": 1, "MiB": 1024, "GiB": 1024**2}[unit]


@pytest.mark.parametrize("row", table(OPERATIONS, "scaling"), ids=lambda row: row["`size_limit`"])
def test_scaling(row: dict[str, str], tmp_path: Path) -> None:
    """Each row as a cache of that size has it, in whole units of the table."""
    limit, segment, large, room, largest = map(kibibytes, row.values())
    with DiskCache(tmp_path / "cache", size_limit=limit * 1024, backend="threads") as cache:
        inner = cache._store
        assert inner.limits.segment_bytes == segment * 1024
        assert inner.limits.large_bytes == large * 1024
        exact = inner.budget.live_limit
        unit = 1 if row["Room for entries and index"].endswith("KiB") else 1024
        assert room == exact // 1024 // unit * unit
        assert largest == inner.budget.largest_value // 1024 // unit * unit


@pytest.mark.parametrize(
    "name",
    ["NETWORK_FILE_SYSTEMS", "LOCAL_FUSE", "NEGLIGIBLE", "NEGLIGIBLE_STARTS", "NEGLIGIBLE_DIRECTORIES"],
)
def test_names_of_file_systems_and_of_what_is_in_them(name: str) -> None:
    match = re.search(rf"<!-- list: {name} -->\n(.*?)[.;]\n", OPERATIONS, re.DOTALL)
    assert match is not None
    listed = quoted(match[1])
    assert set(listed) == set(getattr(directory, name)) and len(listed) == len(set(listed))


def test_stats() -> None:
    documented = [name for row in table(OPERATIONS, "stats") for name in quoted(row["Field"])]
    fields = [field.name for field in dataclasses.fields(CacheStats)]
    assert sorted(documented) == sorted([*fields, "hit_ratio"])


def test_commands_and_options() -> None:
    (commands,) = (
        action.choices
        for action in cli.commands.make_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    documented = {}
    for row in table(OPERATIONS, "commands"):
        (usage,) = quoted(row["Command"])
        name, *positional = usage.split()
        documented[name] = ([word.rstrip(".") for word in positional], set(quoted(row["Options"])))
    everywhere = {"-h", "--help", "--backend"}
    expected = {}
    for name, parser in commands.items():
        options = {option for action in parser._actions for option in action.option_strings}
        positional = [action.metavar for action in parser._actions if not action.option_strings]
        expected[name] = (positional, options - everywhere)
    assert documented == expected


# -- lines that the code says ------------------------------------------------------------------


def templates(node: ast.AST) -> Iterator[str]:
    """The strings in `node`, with ``\\0`` where something is filled in."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield re.sub(r"%[sdr]", "\0", node.value)
    else:
        for child in ast.iter_child_nodes(node):
            yield from templates(child)


def trees() -> Iterable[ast.Module]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ast.parse(path.read_text(encoding="utf-8"))


def assigned(tree: ast.AST, name: str) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            yield node.value


def log_templates() -> set[str]:
    """Every line that the package logs; a line held in a variable is looked up by its name."""
    found = set()
    for tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            once = node.func.attr in ("log_once", "_log_once")  # (topic, line)
            if not once and ast.unparse(node.func) not in ("_log.info", "_log.warning", "_log.error"):
                continue
            argument = node.args[1 if once else 0]
            sources = list(assigned(tree, argument.id)) if isinstance(argument, ast.Name) else [argument]
            prefix = "\0: " if node.func.attr == "log_once" else ""  # the store's names its directory
            found |= {prefix + text for source in sources for text in templates(source)}
    return found - {"\0: \0"}  # `Notices`, of what it is told


def test_log_lines() -> None:
    documented = {re.sub(r"<[^>]+>", "\0", quoted(row["Line"])[0]) for row in table(OPERATIONS, "log")}
    assert documented == log_templates()


def test_lines_to_alert_on() -> None:
    """Their beginnings are those of lines that the package logs, behind the directory."""
    said = {text.removeprefix("\0: ") for text in log_templates()}
    rows = table(OPERATIONS, "alerts")
    beginnings = [quoted(row["The line begins"])[0] for row in rows]
    assert len(beginnings) == len(set(beginnings)) > 10
    for beginning in beginnings:
        assert any(text.startswith(beginning) for text in said), f"nobody says {beginning!r}"


def test_lines_of_integrations_begin_with_their_names() -> None:
    for path in sorted((PACKAGE / "integrations").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("log.info", "log.warning", "log.error"):
                (line,) = templates(node.args[0])
                name = path.stem.removeprefix("_")
                assert line.startswith((f"{name.removesuffix('s')}", "\0: ")), f"{path.name} says {line!r}"


def no_key_in(node: ast.Call) -> bool:
    """Whether nothing that a line is filled with is called a key, a tag or a value."""
    names = {part.attr if isinstance(part, ast.Attribute) else getattr(part, "id", "") for part in ast.walk(node)}
    return not names & {"key", "keys", "tag", "tags", "value", "data"}


def test_no_line_names_a_key() -> None:
    """Keys may be what users typed: names, addresses, tokens. They have no place in a log."""
    for tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            logger, _, _ = ast.unparse(node.func).rpartition(".")
            if logger in ("_log", "log") or node.func.attr in ("log_once", "_log_once"):
                assert no_key_in(node), ast.unparse(node)


def test_messages_in_troubleshooting() -> None:
    """Every message quoted there is one that the code can raise, filled in or not."""
    said = [text for tree in trees() for text in templates(tree)]
    for row in table(OPERATIONS, "errors"):
        for message in quoted(row["Error"]):
            name, _, text = message.partition(": ")
            if not text:
                continue
            assert hasattr(errors, name), name
            pieces = [piece.strip(" ,()") for piece in text.split("...")]
            for piece in filter(None, pieces):
                parts = re.split(r"(?<==)'\w+'", piece)
                assert all(any(part in one for one in said) for part in parts), f"nobody says {piece!r}"


# -- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("docs/guide.md", f"more than {codec.MAX_KEY_BYTES:,} bytes of encoded key"),
        ("docs/guide.md", f"nested deeper than {codec.MAX_KEY_DEPTH}."),
        ("docs/guide.md", f"nested up to {codec.MAX_VALUE_DEPTH} deep"),
        ("docs/operations.md", f"{layout.MAX_TAG_BYTES:,} bytes each"),
        ("docs/operations.md", f"{layout.MAX_HEAD_BYTES - layout.RECORD_BYTES:,} bytes; in small caches"),
        ("docs/operations.md", f"{layout.CAPACITY_MASK:,} slots in each of {layout.PARTITIONS} partitions"),
        ("docs/operations.md", f"| {codec.MAX_KEY_DEPTH}, {codec.MAX_VALUE_DEPTH} |"),
        ("docs/operations.md", f"Values from {limits.LARGE_VALUE_BYTES >> 20} MiB on"),
        ("docs/operations.md", f"{checkpointing._CHECKPOINT_RECORDS:,} at least"),
        ("docs/operations.md", f"up to {victims_module.EXACT_ENTRIES:,} entries"),
        ("docs/operations.md", f"`max_open_files` ({Settings.max_open_files})"),
        ("docs/operations.md", f"`headroom` ({Settings.headroom * 100:.0f} %"),
        ("docs/operations.md", f"default {Settings.size_limit >> 30} GiB"),
        ("docs/format.md", f"at most {removal._REMOVAL_BATCH} of them"),
        ("README.md", f"a file for each value from {limits.LARGE_VALUE_BYTES >> 20} MiB on"),
    ],
)
def test_numbers(name: str, phrase: str) -> None:
    assert phrase in " ".join(TEXTS[name].split()), phrase


def test_the_readme_begins_with_the_two_commands() -> None:
    first = next(blocks(README))
    assert [line.partition("#")[0].split() for line in first.code.splitlines()] == [
        ["bash", "ci/quickstart"],
        ["bash", "ci/test"],
    ]
    assert README.index("<!-- figures:start -->") < README.index("<!-- figures:end -->")


def test_the_changelog_has_this_version() -> None:
    assert re.search(rf"^## {re.escape(yatagarasu_cache.__version__)}\b", TEXTS["CHANGELOG.md"], re.MULTILINE)


@pytest.mark.parametrize("name", TEXTS)
def test_plain_text(name: str) -> None:
    """No emojis, no lines that end in blanks, one newline at the end."""
    text = TEXTS[name]
    assert not re.search("[\u2600-\u27bf\ufe0f\U0001f000-\U0001faff]", text)
    assert not re.search(r"[ \t]$", text, re.MULTILINE)
    assert text.endswith("\n") and not text.endswith("\n\n")
