"""csrc/layout.h against the Python modules: each number that C and Python share is the same in both.

Every line of it is read, so that none can be there that is not compared. Nothing else in csrc/ may give
one of these names, or one of these numbers, to a constant of its own.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from helpers import ROOT

from yatagarasu_cache.store import grants

CSRC = ROOT / "csrc"
HEADER = CSRC / "layout.h"

SECTION = re.compile(r"/\* ([\w/]+)\.py(?:: (\w+))? \*/")
DEFINITION = re.compile(r'#define (\w+) ("[^"\\]*"|[\w.]+)(?: /\* .+ \*/)?')
GUARD = ("#ifndef YATAGARASU_LAYOUT_H", "#define YATAGARASU_LAYOUT_H", "#endif")

# Constants of C alone whose numbers are some of the layout's by chance: sizes of buffers, counts of tries, what a
# test takes, results of functions.
BY_CHANCE = frozenset({
    "PAUSES", "SEARCHES", "NUMBER_KEY", "SPACE_AHEAD", "MAGIC_BYTES", "FIRST_BYTES", "HEAD_BYTES",
    "FIRST_ROOM", "XXH_VECTOR", "YC_READ_BYTES", "PyBUF_SIMPLE", "PyBUF_WRITABLE", "SIGNALS_EVERY",
    "YC_APPENDED", "YC_INSTALLED", "YC_EXPIRED", "PREFETCHED", "TABLE", "CAPACITY", "KEYS", "ROUNDS",
    "SEGMENT", "CHANGES", "FILE_BYTES",
})  # fmt: skip


class Shared(NamedTuple):
    """A line of layout.h. With `sequence` it is a place in that of the module."""

    module: str
    sequence: str | None
    name: str
    value: int | float | bytes

    @property
    def expected(self) -> object:
        """What Python has for it. AttributeError or ValueError if it lacks the name."""
        module = importlib.import_module("yatagarasu_cache." + self.module.replace("/", "."))
        if self.sequence is not None:
            sequence = getattr(module, self.sequence)
            names: tuple[str, ...] = getattr(sequence, "_fields", sequence)
            name = self.name.removeprefix(self.sequence.upper() + "_").lower()
            return len(names) if name == "count" else names.index(name)
        if not hasattr(module, self.name) and self.name.endswith("_SIZE"):
            return getattr(module, self.name.removesuffix("_SIZE")).size
        return getattr(module, self.name)


def parsed(literal: str) -> int | float | bytes:
    """The value of a plain literal, which C and Python spell alike; ValueError for any other."""
    if literal[0] == '"':
        return literal[1:-1].encode()
    return float(literal) if "." in literal else int(literal, 0)


def shared(text: str) -> Iterator[Shared]:
    """The lines of layout.h; ValueError for one that is in none of the forms that it may have."""
    opening, _, rest = text.partition("*/\n")
    if not opening.startswith("/*"):
        raise ValueError("layout.h begins with a comment")
    module, sequence = "", None
    for line in rest.splitlines():
        if section := SECTION.fullmatch(line):
            module, sequence = section[1], section[2]
        elif definition := DEFINITION.fullmatch(line):
            yield Shared(module, sequence, definition[1], parsed(definition[2]))
        elif line and line not in GUARD:
            raise ValueError(f"no line of layout.h: {line}")


LAYOUT = list(shared(HEADER.read_text(encoding="utf-8")))


def code_of(name: str) -> str:
    """A source without comments, and without line breaks inside of definitions."""
    text = re.sub(r"/\*.*?\*/", " ", (CSRC / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    return text.replace("\\\n", " ")


def number(expression: str) -> int | float | None:
    """What an expression of literals says; None if there is a name, or nothing, in it."""
    bare = re.sub(r"\((?:u?int\d+_t|uintptr_t|size_t|unsigned|long)\)", "", expression)
    bare = re.sub(r"\b(0[xX][\da-fA-F]+|\d[\d.]*(?:[eE]\d+)?)[uUlL]*\b", r"\1", bare)
    if not re.fullmatch(r"(?:0[xX][\da-fA-F]+|\d[\d.]*(?:[eE]\d+)?|<<|>>|[-+*/()\s])+", bare) or not bare.strip():
        return None
    value: int | float = eval(bare.replace("/", "//"))
    return value


def constants(code: str) -> Iterator[tuple[str, int | float | None]]:
    """(name, number) of each macro and enumerator; None if it is not given by literals alone."""
    for name, text in re.findall(r"^#define (\w+)[ \t]+(\S.*)$", code, re.MULTILINE):
        yield name, number(text)
    for body in re.findall(r"\benum\s*\w*\s*\{([^}]*)\}", code):
        for item in filter(None, map(str.strip, body.split(","))):
            name, _, text = item.partition("=")
            yield name.strip(), number(text)


OTHERS = sorted(path.name for path in CSRC.glob("*.[ch]") if path != HEADER)
RING = frozenset({"_ring.c", "ring.c", "ring.h", "ring.cdef.h"})  # knows nothing of the files: Python reads its numbers by cffi


# -- the comparisons -------------------------------------------------------------------------------


@pytest.mark.parametrize("line", LAYOUT, ids=lambda line: line.name)
def test_number_is_that_of_python(line: Shared) -> None:
    expected = line.expected
    assert type(line.value) is type(expected) and line.value == expected


def test_names_are_given_once_and_used() -> None:
    names = [line.name for line in LAYOUT]
    assert len(names) > 90 and len(set(names)) == len(names)
    used = set(re.findall(r"\w+", " ".join(map(code_of, OTHERS))))
    assert set(names) <= used


def test_blocks_are_allocated_ahead_within_what_is_granted() -> None:
    (ahead,) = [value for name, value in constants(code_of("core.c")) if name == "SPACE_AHEAD"]
    assert grants._MOST_GRANT % ahead == 0


@pytest.mark.parametrize("name", OTHERS)
def test_no_other_constant_has_a_name_of_the_layout(name: str) -> None:
    names = {line.name for line in LAYOUT}
    assert not {found for found, _ in constants(code_of(name)) if found.removeprefix("YC_") in names}


def test_no_other_constant_has_a_number_of_the_layout() -> None:
    values = {line.value for line in LAYOUT}
    found = {name: value for source in OTHERS if source not in RING for name, value in constants(code_of(source))}
    assert {name for name, value in found.items() if value in values} == BY_CHANCE


@pytest.mark.parametrize(
    "line",
    [
        "#define NAME (1 << 4)", "#define NAME 16u", "#define NAME 16 // why", "#define NAME", "#define A(b) 16",
        "enum { NAME = 16 };", "#include <stdint.h>", "/* no module */", "#define NAME 16 /* open", "# define NAME 16",
    ],
)  # fmt: skip
def test_a_line_of_another_form_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"no line of layout\.h|invalid literal"):
        list(shared(f"/* what */\n/* store/format.py */\n{line}\n"))


def test_a_name_that_python_lacks_and_a_number_that_differs_are_found() -> None:
    text = "/* what */\n/* store/format.py */\n#define NONE_SUCH 1\n#define ALIGN 32\n/* store/format.py: Slot */\n"
    none_such, align, place, low = shared(text + "#define SLOT_NONE 1\n#define SLOT_LOW 0\n")
    with pytest.raises(AttributeError):
        _ = none_such.expected
    with pytest.raises(ValueError, match="not in tuple"):
        _ = place.expected
    assert align.expected != align.value
    assert low.expected == low.value


def test_constants_of_c_are_seen() -> None:
    code = "#define A ((uint64_t)2 << 20)\n#define B 16u\n#define C (B * 2)\nenum one { D, E = 3, F = B };\n#define G(x) 1\n"
    assert dict(constants(code)) == {"A": 2 << 20, "B": 16, "C": None, "D": None, "E": 3, "F": None}
