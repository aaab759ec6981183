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

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "setup.py").is_file():
    pytest.skip("not in a source tree", allow_module_level=True)

linux = pytest.mark.skipif(sys.platform != "linux", reason="the ring exists on Linux only")


def _load(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


@pytest.fixture(scope="module")
def build_ring() -> Any:
    # A module of dataclasses has to stay in sys.modules while it is loaded only.
    return _load(ROOT / "csrc" / "build_ring.py", "build_ring_under_test")


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


def test_mode_is_one_of_three(build_ring: Any) -> None:
    variable = build_ring.MODE_VARIABLE
    assert variable == "YATAGARASU_IO_URING"
    assert build_ring.mode({}) == "auto"
    assert build_ring.mode({variable: ""}) == "auto"
    for value in ("auto", "require", "off", " Require "):
        assert build_ring.mode({variable: value}) == value.strip().lower()
    with pytest.raises(build_ring.RingBuildError, match=r"YATAGARASU_IO_URING='on'.*auto, require, off"):
        build_ring.mode({variable: "on"})


def test_off_decides_without_looking(build_ring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_ring, "missing", lambda environ: pytest.fail("looked for a compiler"))
    plan = build_ring.decide({"YATAGARASU_IO_URING": "off"})
    assert not plan.build
    assert plan.describe() == ("yatagarasu_cache: NOT building the io_uring module: YATAGARASU_IO_URING=off")


def test_auto_goes_without_and_require_fails(build_ring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_ring, "missing", lambda environ: (None, "the moon is too far"))
    plan = build_ring.decide({})
    assert (plan.build, plan.reason) == (False, "the moon is too far")
    with pytest.raises(build_ring.RingBuildError, match="require, but .*the moon is too far"):
        build_ring.decide({"YATAGARASU_IO_URING": "require"})


def test_the_core_is_decided_by_the_same_switch(build_ring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = build_ring.decide_core({"YATAGARASU_IO_URING": "off"})
    assert plan.describe() == "yatagarasu_cache: NOT building the core module: YATAGARASU_IO_URING=off"
    monkeypatch.setattr(build_ring, "trial", lambda link, program: "the sea is too deep")
    monkeypatch.setattr(build_ring, "_unsupported", lambda what, source: None)
    plan = build_ring.decide_core({})
    assert (plan.build, plan.reason) == (False, "the sea is too deep")
    with pytest.raises(build_ring.RingBuildError, match="require, but the core .*the sea is too deep"):
        build_ring.decide_core({"YATAGARASU_IO_URING": "require"})
    monkeypatch.setattr(build_ring, "_unsupported", lambda what, source: "no such system")
    assert build_ring.decide_core({}).reason == "no such system"


@linux
def test_xxhash_missing_or_old(build_ring: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CC", "cc")) is None or not build_ring.decide_core({}).build:
        pytest.skip("the core module cannot be built here")
    monkeypatch.setenv("CPATH", str(tmp_path))
    (tmp_path / "xxhash.h").write_text('#error "xxhash.h: No such file or directory"\n')
    assert "xxHash's headers are missing" in build_ring.decide_core({}).reason
    (tmp_path / "xxhash.h").write_text("#define XXH_VERSION_NUMBER 703\n")
    assert "older than 0.8" in build_ring.decide_core({}).reason


def test_another_system_goes_without(build_ring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_ring.sys, "platform", "darwin")
    plan = build_ring.decide({})
    assert not plan.build and "Linux only" in plan.reason


@linux
def test_no_compiler(build_ring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    plan = build_ring.decide({})
    assert not plan.build and "no C compiler (no-such-compiler not found" in plan.reason
    monkeypatch.setenv("CC", "false")
    assert not build_ring.decide({}).build


@linux
def test_no_cffi(build_ring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_ring, "missing", lambda environ: (build_ring.Link("shared"), ""))
    monkeypatch.setattr(build_ring.importlib.util, "find_spec", lambda name: None)
    assert "cffi" in build_ring.decide({}).reason
    assert build_ring.decide({}, need_cffi=False).build  # it will be there when the build is


@linux
def test_headers_missing_or_old(build_ring: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("no C compiler")
    if "headers of this Python" in (build_ring.missing({})[1]):
        pytest.skip("no Python.h")
    monkeypatch.setenv("CPATH", str(tmp_path))
    (tmp_path / "liburing.h").write_text('#error "liburing.h: No such file or directory"\n')
    assert "liburing's headers are missing" in build_ring.decide({}).reason
    (tmp_path / "liburing.h").write_text("struct io_uring { int x; };\n")
    assert "older than 2.3" in build_ring.decide({}).reason


@linux
def test_linkage_can_be_chosen(build_ring: Any) -> None:
    kinds = [link.kind for link in build_ring.candidate_links({})]
    assert kinds[0] == "static" and kinds[-1] == "shared"
    assert {x.kind for x in build_ring.candidate_links({"YATAGARASU_LIBURING": "static"})} == {"static"}
    assert {x.kind for x in build_ring.candidate_links({"YATAGARASU_LIBURING": "shared"})} == {"shared"}
    with pytest.raises(build_ring.RingBuildError, match="YATAGARASU_LIBURING"):
        build_ring.candidate_links({"YATAGARASU_LIBURING": "both"})


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
    assert configured["linux"]["environment"] == {"YATAGARASU_IO_URING": "require"}
    assert any("manylinux" in build for build in configured["build"])
    assert any("musllinux" in build for build in configured["build"])
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
    name, wheel = _wheel(source, tmp_path / "off", YATAGARASU_IO_URING="off")
    assert name == f"yatagarasu_cache-{version()}-py3-none-any.whl"
    names = wheel.namelist()
    assert not [n for n in names if n.endswith((".so", ".c", ".h"))]
    assert "yatagarasu_cache/py.typed" in names
    assert "yatagarasu_cache/backends/threads.py" in names
    info = wheel.read("yatagarasu_cache/_build_info.py").decode()
    assert "RING_BUILT = False" in info and "YATAGARASU_IO_URING=off" in info
    metadata = wheel.read(f"yatagarasu_cache-{version()}.dist-info/METADATA").decode()
    assert f"\nVersion: {version()}\n" in metadata and "License-Expression: MIT" in metadata


@linux
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_wheel_with_the_module(tmp_path: Path, build_ring: Any) -> None:
    plan = build_ring.decide({})
    if not plan.build:
        pytest.skip(plan.reason)
    source = _copy_of_the_tree(tmp_path / "source")
    name, wheel = _wheel(source, tmp_path / "require", YATAGARASU_IO_URING="require", YATAGARASU_WERROR="1")
    if build_ring.limited_api():
        assert re.fullmatch(rf"yatagarasu_cache-{version()}-cp310-abi3-linux_\w+\.whl", name)
        assert "yatagarasu_cache/_ring.abi3.so" in wheel.namelist()
        assert "yatagarasu_cache/_core.abi3.so" in wheel.namelist()
    info = wheel.read("yatagarasu_cache/_build_info.py").decode()
    assert "RING_BUILT = True" in info and "CORE_BUILT = True" in info


@linux
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_compilation_that_fails_half_way(tmp_path: Path, build_ring: Any) -> None:
    """The trial succeeds, the real sources do not compile: auto still makes an honest wheel."""
    if not build_ring.decide({}).build or not build_ring.decide_core({}).build:
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
