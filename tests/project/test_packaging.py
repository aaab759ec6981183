"""The build: the tri-state switch, what it says, tags of wheels, metadata."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

if not (ROOT / "setup.py").is_file():
    pytest.skip("not in a source tree", allow_module_level=True)

linux = pytest.mark.skipif(sys.platform != "linux", reason="the ring exists on Linux only")


if importlib.util.find_spec("csrc.building") is None:
    sys.path.append(str(ROOT))

from csrc.building import machine, plan, ring_c  # noqa: E402
from csrc.building.modules import CORE, RING  # noqa: E402
from yatagarasu_cache.store import compiled  # noqa: E402

MODES = ("auto", "require", "off")


@pytest.fixture
def pyproject() -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        tomllib = pytest.importorskip("tomli")
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")))


def setup_py(*arguments: str, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONWARNINGS": "ignore", **environ},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def version() -> str:
    tree = ast.parse((ROOT / "yatagarasu_cache" / "_version.py").read_text(encoding="utf-8"))
    (assignment,) = [node for node in tree.body if isinstance(node, ast.Assign)]
    value = ast.literal_eval(assignment.value)
    assert isinstance(value, str)
    return value


# -- the switch -----------------------------------------------------------------------------------


def test_mode_is_one_of_three() -> None:
    variable = RING.switch
    assert variable == "YATAGARASU_IO_URING"
    assert plan.switch(RING, {}) == "auto"
    assert plan.switch(RING, {variable: ""}) == "auto"
    for value in ("auto", "require", "off", " Require "):
        assert plan.switch(RING, {variable: value}) == value.strip().lower()
    with pytest.raises(machine.BuildError, match=r"YATAGARASU_IO_URING='on'.*auto, require, off"):
        plan.switch(RING, {variable: "on"})


def test_off_decides_without_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "find", lambda module, environ: pytest.fail("looked for a compiler"))
    decided = plan.decide(RING, {"YATAGARASU_IO_URING": "off"})
    assert not decided.build
    assert decided.describe() == ("yatagarasu_cache: NOT building the io_uring module: YATAGARASU_IO_URING=off")


def test_auto_goes_without_and_require_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "find", lambda module, environ: (None, "the moon is too far"))
    decided = plan.decide(RING, {})
    assert (decided.build, decided.reason) == (False, "the moon is too far")
    with pytest.raises(machine.BuildError, match="require, but .*the moon is too far"):
        plan.decide(RING, {"YATAGARASU_IO_URING": "require"})


def test_the_core_has_a_switch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    decided = plan.decide(CORE, {"YATAGARASU_COMPILED_CORE": "off"})
    assert decided.describe() == "yatagarasu_cache: NOT building the core module: YATAGARASU_COMPILED_CORE=off"
    assert decided.reason == compiled.BUILT_WITHOUT  # by which opening a cache knows that it was on purpose
    monkeypatch.setattr(machine, "trial", lambda link, program: "the sea is too deep")
    monkeypatch.setattr(plan, "unsupported", lambda module: None)
    decided = plan.decide(CORE, {})
    assert (decided.build, decided.reason) == (False, "the sea is too deep")
    with pytest.raises(machine.BuildError, match="COMPILED_CORE=require, but the core .*the sea is too deep"):
        plan.decide(CORE, {"YATAGARASU_COMPILED_CORE": "require"})
    monkeypatch.setattr(plan, "unsupported", lambda module: "no such system")
    assert plan.decide(CORE, {}).reason == "no such system"


@pytest.mark.parametrize("core", MODES)
@pytest.mark.parametrize("ring", MODES)
def test_neither_switch_touches_the_other_module(monkeypatch: pytest.MonkeyPatch, ring: str, core: str) -> None:
    """Each of the nine combinations, where both, one or none of the modules can be built."""
    environ = {RING.switch: ring, CORE.switch: core}
    for there in ((RING, CORE), (RING,), (CORE,), ()):
        possible = [module.name for module in there]
        monkeypatch.setattr(
            plan, "find",
            lambda module, environ, names=possible: (machine.Link(), "") if module.name in names else (None, "no"),
        )  # fmt: skip
        for module, wanted in ((RING, ring), (CORE, core)):
            if wanted == "require" and module not in there:
                with pytest.raises(machine.BuildError, match=f"{module.switch}=require, but"):
                    plan.decide(module, environ)
            else:
                decided = plan.decide(module, environ)
                assert decided.build == (wanted != "off" and module in there)
                assert decided.switched_off == (wanted == "off")


@linux
def test_xxhash_missing_or_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CC", "cc")) is None or not plan.decide(CORE, {}).build:
        pytest.skip("the core module cannot be built here")
    monkeypatch.setenv("CPATH", str(tmp_path))
    (tmp_path / "xxhash.h").write_text('#error "xxhash.h: No such file or directory"\n')
    assert "xxHash's headers are missing" in plan.decide(CORE, {}).reason
    (tmp_path / "xxhash.h").write_text("#define XXH_VERSION_NUMBER 703\n")
    assert "older than 0.8" in plan.decide(CORE, {}).reason


def test_another_system_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.sys, "platform", "darwin")
    decided = plan.decide(RING, {})
    assert not decided.build and "Linux only" in decided.reason


@linux
def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    decided = plan.decide(RING, {})
    assert not decided.build and "no C compiler (no-such-compiler not found" in decided.reason
    monkeypatch.setenv("CC", "false")
    assert not plan.decide(RING, {}).build


@linux
def test_no_cffi(monkeypatch: pytest.MonkeyPatch, pyproject: dict[str, Any]) -> None:
    """What it writes is in the tree: a build asks for setuptools alone."""
    monkeypatch.setitem(sys.modules, "cffi", None)
    monkeypatch.setattr(machine, "trial", lambda link, program: None)
    monkeypatch.setattr(machine, "no_compiler", lambda: None)
    assert plan.decide(RING, {"YATAGARASU_IO_URING": "require"}).build
    assert [re.split(r"[<>=; ]", line)[0] for line in pyproject["build-system"]["requires"]] == ["setuptools"]


def test_what_cffi_wrote_is_current() -> None:
    """If this fails: python -m csrc.building.ring_c"""
    pytest.importorskip("cffi")
    ring_c.check()
    assert ring_c.is_current()
    kept, new = ring_c.TARGET.read_text(encoding="utf-8"), ring_c.generate()
    if kept.splitlines()[0] == new.splitlines()[0]:  # by the same release of cffi
        assert kept == new


def test_declarations_that_have_changed_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where there is no cffi: the ring must not be left out silently, nor be built of both."""
    declarations = ring_c.DECLARATIONS.read_text(encoding="utf-8")
    changed = tmp_path / "ring.cdef.h"
    changed.write_text(declarations + "int yr_more(void);\n", encoding="utf-8")
    monkeypatch.setattr(ring_c, "DECLARATIONS", changed)
    with pytest.raises(machine.BuildError, match=r"another csrc/ring.cdef.h: run `python -m csrc.building.ring_c`"):
        ring_c.check()
    monkeypatch.setattr(plan, "unsupported", lambda module: None)
    with pytest.raises(machine.BuildError, match=r"another csrc/ring.cdef.h"):
        plan.decide(RING, {})
    if importlib.util.find_spec("cffi"):
        assert not ring_c.is_current()


@linux
def test_headers_missing_or_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("no C compiler")
    if "headers of this Python" in (plan.find(RING, {})[1]):
        pytest.skip("no Python.h")
    monkeypatch.setenv("CPATH", str(tmp_path))
    (tmp_path / "liburing.h").write_text('#error "liburing.h: No such file or directory"\n')
    assert "liburing's headers are missing" in plan.decide(RING, {}).reason
    (tmp_path / "liburing.h").write_text("struct io_uring { int x; };\n")
    assert "older than 2.3" in plan.decide(RING, {}).reason


@linux
def test_linkage_can_be_chosen() -> None:
    kinds = [link.kind for link in machine.liburing_links({})]
    assert kinds[0] == "static" and kinds[-1] == "shared"
    assert {x.kind for x in machine.liburing_links({"YATAGARASU_LIBURING": "static"})} == {"static"}
    assert {x.kind for x in machine.liburing_links({"YATAGARASU_LIBURING": "shared"})} == {"shared"}
    with pytest.raises(machine.BuildError, match="YATAGARASU_LIBURING"):
        machine.liburing_links({"YATAGARASU_LIBURING": "both"})


def test_setup_py_answers_and_refuses() -> None:
    pytest.importorskip("setuptools", minversion="77")
    done = setup_py("--version")
    assert done.stdout.strip().splitlines()[-1] == version(), done.stderr
    done = setup_py("build_py", "--help", YATAGARASU_IO_URING="sometimes")
    assert done.returncode != 0 or "sometimes" not in done.stderr
    done = setup_py("egg_info", "--egg-base", "/nonexistent", YATAGARASU_IO_URING="sometimes")
    assert done.returncode != 0
    assert "YATAGARASU_IO_URING='sometimes' is not known" in done.stderr
    assert "Traceback" not in done.stderr
    for name in ("YATAGARASU_COMPILED_CORE", "YATAGARASU_LIBURING"):
        done = setup_py("build_py", **{name: "sometimes"})
        assert done.returncode != 0 and f"{name}='sometimes' is not known" in done.stderr


@linux
@pytest.mark.slow
@pytest.mark.parametrize("core", MODES)
@pytest.mark.parametrize("ring", MODES)
def test_each_combination_builds_what_it_says(tmp_path: Path, ring: str, core: str) -> None:
    """By setup.py; where a module cannot be built, `auto` goes without it and `require` fails."""
    source = _copy_of_the_tree(tmp_path / "source")
    for path in (source / "csrc").glob("*.c"):  # what is in them takes long, and is not the question
        head = path.read_text(encoding="utf-8").splitlines()[:2] if path.name == "_ring.c" else []
        path.write_text("\n".join([*head, "typedef int nothing;", ""]), encoding="utf-8")
    environ = {RING.switch: ring, CORE.switch: core}
    possible = {module.name for module in (RING, CORE) if plan.find(module, {})[0] is not None}
    wanted = {RING.name: ring, CORE.name: core}
    done = setup_py("build", "--build-lib", str(tmp_path / "built"), cwd=source, **environ)
    if any(wanted[name] == "require" for name in wanted if name not in possible):
        assert done.returncode != 0 and "=require, but the" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    expected = {name for name in possible if wanted[name] != "off"}
    made = {f"yatagarasu_cache.{path.name.split('.')[0]}" for path in tmp_path.glob("built/*/*.so")}
    assert made == expected
    info = (tmp_path / "built" / "yatagarasu_cache" / "_build_info.py").read_text(encoding="utf-8")
    assert f"RING_BUILT = {RING.name in expected}" in info
    assert f"CORE_BUILT = {CORE.name in expected}" in info
    for module in (RING, CORE):
        assert (f"{module.switch}=off" in info) == (wanted[module.name] == "off")


@linux
def test_a_missing_core_is_a_warning_of_the_build(tmp_path: Path) -> None:
    """Some releases of pip show nothing else of a build that succeeds. Not where it was switched off."""
    environ = {RING.switch: "off", "CC": "no-such-compiler", "PYTHONWARNINGS": "always"}
    for mode, warned in (("auto", True), ("off", False)):
        done = setup_py("build_ext", "--build-lib", str(tmp_path), **environ, YATAGARASU_COMPILED_CORE=mode)
        assert done.returncode == 0
        assert ("UserWarning: yatagarasu_cache: NOT building the core module" in done.stderr) == warned
        if warned:
            assert "no C compiler" in done.stderr and "two to three times as long" in done.stderr


@linux
@pytest.mark.slow
def test_require_fails_where_compiling_does(tmp_path: Path) -> None:
    """The trial has succeeded; of the other module, `auto` alone would have made an honest build."""
    if not all(plan.decide(module, {}).build for module in (RING, CORE)):
        pytest.skip("the modules cannot be built here")
    source = _copy_of_the_tree(tmp_path / "source")
    (source / "csrc" / "core.c").write_text('#error "broken on purpose"\n')
    environ = {RING.switch: "off", "CFLAGS": "-O0"}
    done = setup_py("build_ext", "--inplace", cwd=source, **environ, YATAGARASU_COMPILED_CORE="require")
    assert done.returncode != 0
    assert "YATAGARASU_COMPILED_CORE=require and the build failed" in done.stderr
    done = setup_py("build_ext", "--inplace", cwd=source, **environ, YATAGARASU_COMPILED_CORE="auto")
    assert done.returncode == 0 and "NOT building the core module: compiling failed" in done.stderr


# -- metadata -------------------------------------------------------------------------------------


def test_metadata_names(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    assert project["name"] == "yatagarasu_cache"
    assert project["requires-python"] == ">=3.10"
    assert project["scripts"] == {"yatagarasu-cache": "yatagarasu_cache.cli:main"}
    assert {"io-uring", "yaml", "toml", "cli", "test", "perf"} <= set(project["optional-dependencies"])
    names = [re.split(r"[<>=; ]", line)[0] for line in project["dependencies"]]
    assert names == ["xxhash", "ormsgpack", "cffi"]
    (cffi,) = [line for line in project["dependencies"] if line.startswith("cffi")]
    assert "sys_platform == 'linux'" in cffi
    assert "cffi" in project["optional-dependencies"]["io-uring"][0]
    assert pyproject["tool"]["mypy"]["strict"] is True
    assert pyproject["tool"]["ruff"]["line-length"] == 110
    assert "slow" in pyproject["tool"]["pytest"]["ini_options"]["markers"][0]
    assert (ROOT / "yatagarasu_cache" / "py.typed").is_file()


def test_installed_version_is_that_of_the_source() -> None:
    from importlib import metadata

    try:
        installed = metadata.version("yatagarasu_cache")
    except metadata.PackageNotFoundError:
        pytest.skip("run from the checkout, not installed")
    assert installed == version()


def test_wheels_for_other_systems_are_configured(pyproject: dict[str, Any]) -> None:
    configured = pyproject["tool"]["cibuildwheel"]
    assert configured["linux"]["environment"] == {RING.switch: "require", CORE.switch: "require"}
    assert any("manylinux" in build for build in configured["build"])
    assert any("musllinux" in build for build in configured["build"])
    assert all(build.startswith("cp{310,314,315}-") for build in configured["build"])
    assert (ROOT / "ci" / "wheel-deps").is_file()


def test_every_c_source_is_in_the_sdist() -> None:
    manifest = (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    suffixes = {path.suffix for path in (ROOT / "csrc").iterdir() if path.is_file()}
    for suffix in suffixes:
        assert f"csrc/*{suffix}" in manifest


def test_interface_is_declared_once() -> None:
    """ring.h includes what cffi reads; the constants of Python and C cannot come apart."""
    header = (ROOT / "csrc" / "ring.h").read_text(encoding="utf-8")
    assert '#include "ring.cdef.h"' in header
    declarations = (ROOT / "csrc" / "ring.cdef.h").read_text(encoding="utf-8")
    source = (ROOT / "csrc" / "ring.c").read_text(encoding="utf-8")
    names = re.findall(r"^(?:[a-z].*[ *])(yr_\w+)\(", declarations, re.M)
    assert len(names) >= 25
    for name in names:
        assert re.search(rf"^\w.*[ *]{name}\(", source, re.M), f"{name} is declared but not there"
    assert set(re.findall(r"^[a-z].*[ *](yr_\w+)\(", source, re.M)) == set(names)


@pytest.mark.parametrize("name", ["ring.c", "core.c", "core.h"])
def test_sources_know_nothing_of_python(name: str) -> None:
    source = (ROOT / "csrc" / name).read_text(encoding="utf-8")
    assert "Python.h" not in source and "PyObject" not in source


@linux
@pytest.mark.parametrize("name", ["ring.c", "core.c"])
def test_sources_have_no_globals(tmp_path: Path, name: str) -> None:
    compiler, nm = shutil.which(os.environ.get("CC", "cc")), shutil.which("nm")
    if compiler is None or nm is None:
        pytest.skip("no C compiler")
    made = tmp_path / "made.o"
    command = [compiler, "-std=c11", "-c", str(ROOT / "csrc" / name), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "liburing.h" in done.stderr or "xxhash.h" in done.stderr:
        pytest.skip("headers are missing")
    assert done.returncode == 0, done.stderr
    symbols = subprocess.run([nm, str(made)], capture_output=True, text=True, check=True).stdout
    # Writable data, initialised or not; only this function's own sections, not what debuggers add.
    assert not re.findall(r"^[0-9a-f]* [bBdDC] .*$", symbols, re.M)


# -- wheels ---------------------------------------------------------------------------------------


def _copy_of_the_tree(target: Path) -> Path:
    ignore = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "_build_info.py", ".*_cache"
    )
    shutil.copytree(ROOT, target, ignore=ignore)
    return target


def _wheel(source: Path, target: Path, **environ: str) -> tuple[str, zipfile.ZipFile]:
    pytest.importorskip("setuptools", minversion="77")
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir",
            "-v", "-w", str(target), str(source),
        ],
        env={**os.environ, **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = target.glob("*.whl")
    assert "building the io_uring module: " in done.stdout + done.stderr
    return wheel.name, zipfile.ZipFile(wheel)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_wheel_without_the_module(tmp_path: Path) -> None:
    source = _copy_of_the_tree(tmp_path / "source")
    name, wheel = _wheel(source, tmp_path / "off", YATAGARASU_IO_URING="off", YATAGARASU_COMPILED_CORE="off")
    assert name == f"yatagarasu_cache-{version()}-py3-none-any.whl"
    names = wheel.namelist()
    assert not [n for n in names if n.endswith((".so", ".c", ".h"))]
    assert "yatagarasu_cache/py.typed" in names
    assert "yatagarasu_cache/backends/threads.py" in names
    info = wheel.read("yatagarasu_cache/_build_info.py").decode()
    assert "RING_BUILT = False" in info and "YATAGARASU_IO_URING=off" in info
    assert "CORE_BUILT = False" in info and "YATAGARASU_COMPILED_CORE=off" in info
    metadata = wheel.read(f"yatagarasu_cache-{version()}.dist-info/METADATA").decode()
    assert f"\nVersion: {version()}\n" in metadata and "License-Expression: MIT" in metadata


@linux
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_wheel_with_the_module(tmp_path: Path) -> None:
    decided = plan.decide(RING, {})
    if not decided.build:
        pytest.skip(decided.reason)
    source = _copy_of_the_tree(tmp_path / "source")
    environ = {RING.switch: "require", CORE.switch: "require", "YATAGARASU_WERROR": "1"}
    name, wheel = _wheel(source, tmp_path / "require", **environ)
    if machine.limited_api():
        assert re.fullmatch(rf"yatagarasu_cache-{version()}-cp310-abi3-linux_\w+\.whl", name)
        assert "yatagarasu_cache/_ring.abi3.so" in wheel.namelist()
        assert "yatagarasu_cache/_core.abi3.so" in wheel.namelist()
    info = wheel.read("yatagarasu_cache/_build_info.py").decode()
    assert "RING_BUILT = True" in info and "CORE_BUILT = True" in info


@linux
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_compilation_that_fails_half_way(tmp_path: Path) -> None:
    """The trial succeeds, the real sources do not compile: auto still makes an honest wheel."""
    if not plan.decide(RING, {}).build or not plan.decide(CORE, {}).build:
        pytest.skip("the modules cannot be built here")
    source = _copy_of_the_tree(tmp_path / "source")
    (source / "csrc" / "ring.c").write_text('#error "broken on purpose"\n')
    name, wheel = _wheel(source, tmp_path / "half", YATAGARASU_IO_URING="auto")
    assert name.endswith(".whl") and not name.endswith("-py3-none-any.whl")
    modules = [n for n in wheel.namelist() if n.endswith(".so")]
    assert len(modules) == 1 and "/_core." in modules[0]
    info = wheel.read("yatagarasu_cache/_build_info.py").decode()
    assert "RING_BUILT = False" in info and "compiling failed" in info and "CORE_BUILT = True" in info
    shutil.rmtree(source / "build")
    (source / "csrc" / "core.c").write_text('#error "broken on purpose"\n')
    name, wheel = _wheel(source, tmp_path / "auto", YATAGARASU_IO_URING="auto")
    assert name.endswith("-py3-none-any.whl")
    assert not [n for n in wheel.namelist() if n.endswith(".so")]
    assert "compiling failed" in wheel.read("yatagarasu_cache/_build_info.py").decode()
    metadata = wheel.read(f"yatagarasu_cache-{version()}.dist-info/WHEEL").decode()
    assert "Root-Is-Purelib: true" in metadata
