"""How the compiled modules are built: what is needed, what was found, the ffi builder.

`yatagarasu_cache._ring` is io_uring through cffi and needs liburing. `yatagarasu_cache._core` is
the fast path of get and set and needs the header of xxHash. The one is built without the other if
need be; the switch is for both.

`setup.py` loads this file by its path. It imports nothing beyond the standard library and
setuptools until the module is really to be built, so that a machine without cffi, without a
compiler or without liburing gets an answer (a `Plan` that says why not) and never a traceback.

    YATAGARASU_IO_URING=auto      build the module if that is possible, else go without (default)
    YATAGARASU_IO_URING=require   build it, or fail and say what is missing
    YATAGARASU_IO_URING=off       do not build it
    YATAGARASU_LIBURING=auto      link liburing statically if that works, else dynamically (default)
    YATAGARASU_LIBURING=static|shared   only that
    YATAGARASU_WERROR=1           compiler warnings are errors
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

XXHASH = "xxHash's headers are missing (Debian: apt-get install libxxhash-dev)"
HERE = Path(__file__).resolve().parent
MODULE = "yatagarasu_cache._ring"
CORE_MODULE = "yatagarasu_cache._core"
CORE_SOURCES = ("core.c", "sum_avx2.c", "reads.c", "pack.c", "coremodule.c")
MODE_VARIABLE = "YATAGARASU_IO_URING"
LINK_VARIABLE = "YATAGARASU_LIBURING"
MODES = ("auto", "require", "off")
LINKAGES = ("auto", "static", "shared")
WARNINGS = ("-std=c11", "-Wall", "-Wextra")

# Uses what ring.c needs most and 2.3 brought last; it must compile and link, not run.
TRIAL = r"""
#define _GNU_SOURCE
#include <Python.h>
#include <liburing.h>
int yr_trial(struct io_uring *ring);
int yr_trial(struct io_uring *ring)
{
    struct __kernel_timespec ts = {0, 0};
    struct io_uring_cqe *cqe;
    struct io_uring_params p = {0};
    p.flags = IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_SINGLE_ISSUER;
    int r = io_uring_queue_init_params(8, ring, &p);
    r |= io_uring_register_buffers_sparse(ring, 8) | io_uring_register_files_sparse(ring, 8);
    r |= io_uring_submit_and_wait_timeout(ring, &cqe, 1, &ts, 0) | io_uring_get_events(ring);
    return r;
}
"""

# What core.c needs of xxHash: all of it in the header, and XXH3 as it is for good.
CORE_TRIAL = r"""
#include <Python.h>
#include <stdint.h>
#define XXH_INLINE_ALL
#include <xxhash.h>
#if XXH_VERSION_NUMBER < 800
#error "xxHash is older than 0.8, which is the least that works"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "this machine is big-endian"
#endif
uint64_t yc_trial(const void *data, uint64_t length);
uint64_t yc_trial(const void *data, uint64_t length)
{
    return XXH3_64bits_withSeed(data, length, 1) ^ XXH3_128bits_withSeed(data, length, 1).low64;
}
"""


class RingBuildError(Exception):
    """The module cannot be built here; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Link:
    """The compiler's and the linker's arguments that reach liburing."""

    kind: str = "none"  # "static", "shared" or "none"
    include_dirs: tuple[str, ...] = ()
    library_dirs: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    extra_objects: tuple[str, ...] = ()
    extra_link_args: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What will be done about a module, and why."""

    build: bool
    reason: str
    link: Link = field(default_factory=Link)
    module: str = "io_uring"

    def describe(self) -> str:
        """One line for the build's output."""
        done = "building" if self.build else "NOT building"
        return f"yatagarasu_cache: {done} the {self.module} module: {self.reason}"


def _choice(environ: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str:
    value = environ.get(name, "").strip().lower() or allowed[0]
    if value not in allowed:
        raise RingBuildError(f"{name}={value!r} is not known; use one of {', '.join(allowed)}")
    return value


def mode(environ: Mapping[str, str] = os.environ) -> str:
    """The tri-state build switch; a value that is not known is an error, not `auto`."""
    return _choice(environ, MODE_VARIABLE, MODES)


def limited_api() -> bool:
    """Whether this interpreter can build for the stable ABI (free-threaded and debug builds cannot)."""
    return (
        sys.implementation.name == "cpython"
        and not sysconfig.get_config_var("Py_GIL_DISABLED")
        and not hasattr(sys, "gettotalrefcount")
    )


def _pkg_config(*arguments: str, package: str = "liburing") -> list[str] | None:
    """What pkg-config answers about a package, or None if it is not there or does not know it."""
    tool = shutil.which(os.environ.get("PKG_CONFIG", "pkg-config"))
    if tool is None:
        return None
    try:
        answer = subprocess.run(
            [tool, *arguments, package], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return shlex.split(answer.stdout) if answer.returncode == 0 else None


def _flags(arguments: list[str], prefix: str) -> tuple[str, ...]:
    return tuple(a[len(prefix) :] for a in arguments if a.startswith(prefix))


def candidate_links(environ: Mapping[str, str] = os.environ) -> list[Link]:
    """Ways to link liburing, the best first; `trial` finds out which of them works."""
    wanted = _choice(environ, LINK_VARIABLE, LINKAGES)
    cflags = _pkg_config("--cflags")
    libs = _pkg_config("--libs")
    directories = tuple(_pkg_config("--variable=libdir") or ())
    include_dirs = _flags(cflags or [], "-I")
    library_dirs = _flags(libs or [], "-L")
    archives = [Path(d) / "liburing.a" for d in (*directories, *library_dirs)]
    links = []
    if wanted != "shared":
        links += [
            Link("static", include_dirs, extra_objects=(str(archive),))
            for archive in dict.fromkeys(archives)
            if archive.is_file()
        ]
        # Without pkg-config the linker's own search path may still hold the archive.
        links.append(Link("static", include_dirs, library_dirs, extra_link_args=("-l:liburing.a",)))
    if wanted != "static":
        links.append(Link("shared", include_dirs, library_dirs, libraries=("uring",)))
    return links


def _compiler() -> Any:
    """The compiler that setuptools would use, with CC, CFLAGS and LDFLAGS taken into account."""
    importlib.import_module("setuptools")  # brings distutils on Python 3.12 and later
    from distutils.ccompiler import new_compiler
    from distutils.sysconfig import customize_compiler

    compiler = new_compiler()
    customize_compiler(compiler)
    return compiler


def _run(command: list[str]) -> str | None:
    """None if the command succeeds, else the first line that names an error."""
    environ = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=120, check=False, env=environ
        )
    except OSError as error:
        return f"{Path(command[0]).name}: {error.strerror or error}"
    except subprocess.SubprocessError:
        return f"{Path(command[0]).name} did not end"
    if done.returncode == 0:
        return None
    lines = (done.stderr + done.stdout).strip().splitlines()
    errors = [line for line in lines if "error" in line.lower() or "cannot find" in line]
    return (errors or lines or [f"{Path(command[0]).name} failed with status {done.returncode}"])[0].strip()


def _explain(problem: str) -> str:
    """The usual problems in words that name the remedy."""
    if "Python.h" in problem:
        return "the headers of this Python are missing (Debian: apt-get install python3-dev)"
    if "xxhash.h" in problem:
        return XXHASH
    if "liburing.h" in problem:
        return "liburing's headers are missing (Debian: apt-get install liburing-dev)"
    if "luring" in problem or "liburing" in problem:
        return "the library liburing cannot be linked (Debian: apt-get install liburing-dev)"
    # The trial's own lines compile with every liburing from 2.3 on.
    where, _, what = problem.partition(": error: ")
    if what.startswith("#error "):
        return what[len("#error ") :].strip('"')
    if what and "trial.c:" in where:
        return f"liburing is older than 2.3, which is the least that works ({what})"
    return what or problem


def trial(link: Link, program: str = TRIAL) -> str | None:
    """Compile and link a small shared object the way the module will be; None, or why it failed."""
    compiler = _compiler()
    include_dirs = [
        *link.include_dirs,
        sysconfig.get_paths()["include"],
        sysconfig.get_paths()["platinclude"],
    ]
    with tempfile.TemporaryDirectory(prefix="yatagarasu-build-") as directory:
        source, output, shared = (str(Path(directory) / f"trial.{suffix}") for suffix in ("c", "o", "so"))
        Path(source).write_text(program)
        includes = [f"-I{path}" for path in dict.fromkeys(include_dirs)]
        problem = _run([*compiler.compiler_so, *includes, "-std=c11", "-c", source, "-o", output])
        if problem is not None:
            return _explain(problem)
        arguments = [
            *link.extra_objects,
            *(f"-L{path}" for path in link.library_dirs),
            *(f"-l{name}" for name in link.libraries),
            *link.extra_link_args,
        ]
        # Undefined symbols must fail here, as they would fail at import; the trial uses no Python ones.
        problem = _run([*compiler.linker_so, output, *arguments, "-Wl,-z,defs", "-o", shared])
        if problem is not None and any("sanitize" in part for part in compiler.linker_so):
            # A sanitizer's run-time library comes with the process, so -z defs cannot hold.
            problem = _run([*compiler.linker_so, output, *arguments, "-o", shared])
        return None if problem is None else _explain(problem)


def _unsupported(what: str, source: str) -> str | None:
    """What stands in the way of any module, liburing and xxHash aside."""
    if sys.platform != "linux":
        return f"{what} Linux only (this is {platform.system() or sys.platform})"
    if sys.implementation.name == "pypy":
        return "PyPy is not supported by the module"
    if not (HERE / source).is_file():
        return "the C sources are not in this source tree"
    command = _compiler().compiler_so[0]
    if shutil.which(command) is None:
        return f"no C compiler ({Path(command).name} not found; Debian: apt-get install gcc)"
    return None


def missing(environ: Mapping[str, str] = os.environ) -> tuple[Link | None, str]:
    """(how to link, "") if the module can be built apart from cffi, else (None, what is missing)."""
    unsupported = _unsupported("io_uring exists on", "ring.c")
    if unsupported is not None:
        return None, unsupported
    problem = "no way to link liburing was found"
    for link in candidate_links(environ):
        answer = trial(link)
        if answer is None:
            return link, ""
        problem = answer
    return None, problem


def decide(environ: Mapping[str, str] = os.environ, *, need_cffi: bool = True) -> Plan:
    """The plan for this machine and these settings. Raises RingBuildError where `require` cannot be kept."""
    wanted = mode(environ)
    if wanted == "off":
        return Plan(False, f"{MODE_VARIABLE}=off")
    link, problem = missing(environ)
    if link is not None and need_cffi and importlib.util.find_spec("cffi") is None:
        link, problem = None, "the Python package cffi is not installed (pip install cffi)"
    if link is not None:
        kind = "statically" if link.kind == "static" else "dynamically"
        return Plan(True, f"liburing found, linked {kind}", link)
    return _without(wanted, "io_uring", problem)


def _without(wanted: str, module: str, problem: str) -> Plan:
    if wanted == "require":
        raise RingBuildError(
            f"{MODE_VARIABLE}=require, but the {module} module cannot be built: {problem}.\n"
            f"Install what is missing, or use {MODE_VARIABLE}=auto to go without."
        )
    return Plan(False, problem, module=module)


def decide_core(environ: Mapping[str, str] = os.environ) -> Plan:
    """The same of the core module, which needs a compiler and the header of xxHash, and no cffi."""
    wanted = mode(environ)
    if wanted == "off":
        return Plan(False, f"{MODE_VARIABLE}=off", module="core")
    problem = _unsupported("it is built on", CORE_SOURCES[0])
    link = Link()
    if problem is None:
        includes = _flags(_pkg_config("--cflags", package="libxxhash") or [], "-I")
        link = Link("header", include_dirs=includes)
        problem = trial(link, CORE_TRIAL)
    return _without(wanted, "core", problem) if problem else Plan(True, "xxHash found", link, "core")


def core_extension(link: Link, environ: Mapping[str, str] = os.environ) -> Any:
    """The core module for setuptools; its sources are named relative to the working directory."""
    from setuptools import Extension

    sources = os.path.relpath(HERE)
    return Extension(
        CORE_MODULE,
        sources=[os.path.join(sources, name) for name in CORE_SOURCES],
        depends=[os.path.join(sources, name) for name in ("core.h", "layout.h", "reads.h", "pack.h")],
        include_dirs=[sources, *link.include_dirs],
        define_macros=[("Py_LIMITED_API", "0x030A0000")] if limited_api() else [],
        extra_compile_args=_compile_args(environ),
        py_limited_api=limited_api(),
    )


def _compile_args(environ: Mapping[str, str]) -> list[str]:
    arguments = list(WARNINGS)
    if "sanitize" not in environ.get("CFLAGS", ""):
        arguments.append("-g0")  # debugging information would be three quarters of the wheel
    if environ.get("YATAGARASU_WERROR", "") not in ("", "0"):
        arguments.append("-Werror")
    return arguments


def ffi_builder(link: Link, environ: Mapping[str, str] = os.environ, *, directory: str | None = None) -> Any:
    """The cffi builder of the module: the declarations of ring.cdef.h over the real source ring.c.

    `directory` is that of the sources; by default it is written relative to the working directory,
    as setuptools wants it.
    """
    from cffi import FFI

    sources = os.path.relpath(HERE) if directory is None else directory
    builder = FFI()
    builder.cdef((HERE / "ring.cdef.h").read_text(encoding="utf-8"))
    builder.set_source(
        MODULE,
        # The wrappers that cffi writes leave parameters unused; ring.c itself is held to -Wextra.
        '#pragma GCC diagnostic ignored "-Wunused-parameter"\n#include "ring.h"\n',
        sources=[os.path.join(sources, "ring.c")],
        depends=[os.path.join(sources, name) for name in ("ring.h", "ring.cdef.h")],
        include_dirs=[sources, *link.include_dirs],
        library_dirs=list(link.library_dirs),
        libraries=list(link.libraries),
        extra_objects=list(link.extra_objects),
        extra_link_args=list(link.extra_link_args),
        extra_compile_args=_compile_args(environ),
        py_limited_api=limited_api(),
    )
    return builder


def build_core(link: Link, scratch: str) -> Path:
    """Build the core module alone. Its place."""
    from setuptools import Distribution

    command: Any = Distribution({"ext_modules": [core_extension(link)]}).get_command_obj("build_ext")
    command.build_lib = command.build_temp = scratch
    command.ensure_finalized()
    command.run()
    return Path(command.get_ext_fullpath(CORE_MODULE))


def main() -> int:
    """Build the modules alone, for development: `python csrc/build_ring.py [DIRECTORY]`."""
    root = HERE.parent
    target = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else root)
    os.chdir(root)
    try:
        plans = decide(), decide_core()
    except RingBuildError as error:
        print(error, file=sys.stderr)
        return 1
    for plan in plans:
        print(plan.describe())
        if not plan.build:
            continue
        with tempfile.TemporaryDirectory(prefix="yatagarasu-build-") as scratch:
            if plan.module == "core":
                built = build_core(plan.link, scratch)
            else:
                built = Path(ffi_builder(plan.link, directory=str(HERE)).compile(tmpdir=scratch))
            place = Path(target, "yatagarasu_cache", built.name)
            place.parent.mkdir(parents=True, exist_ok=True)
            # Replaced by a rename: a process that has the old one loaded keeps it.
            shutil.copy2(built, f"{place}.new")
            os.replace(f"{place}.new", place)
            print(place)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
