"""What this machine has to build with: a compiler, headers, libraries, and whether they do what is needed."""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

LINK_VARIABLE = "YATAGARASU_LIBURING"
LINKAGES = ("auto", "static", "shared")


class BuildError(Exception):
    """A module cannot be built here; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Link:
    """The compiler's and the linker's arguments that reach a library."""

    kind: str = "none"  # "static", "shared", "header" or "none"
    found: str = ""  # in words: which library, and how it is reached
    include_dirs: tuple[str, ...] = ()
    library_dirs: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    extra_objects: tuple[str, ...] = ()
    extra_link_args: tuple[str, ...] = ()

    def reach(self, extension: Any) -> None:
        """Add the arguments to those of an extension of setuptools."""
        for name in ("include_dirs", "library_dirs", "libraries", "extra_objects", "extra_link_args"):
            setattr(extension, name, [*getattr(extension, name), *getattr(self, name)])


def choice(environ: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str:
    """The value of an environment variable, the first of `allowed` if it has none; BuildError for others."""
    value = environ.get(name, "").strip().lower() or allowed[0]
    if value not in allowed:
        raise BuildError(f"{name}={value!r} is not known; use one of {', '.join(allowed)}")
    return value


def linkage(environ: Mapping[str, str] = os.environ) -> str:
    """How liburing is to be linked."""
    return choice(environ, LINK_VARIABLE, LINKAGES)


def limited_api() -> bool:
    """Whether this interpreter can build for the stable ABI (free-threaded and debug builds cannot)."""
    return (
        sys.implementation.name == "cpython"
        and not sysconfig.get_config_var("Py_GIL_DISABLED")
        and not hasattr(sys, "gettotalrefcount")
    )


# -- libraries ------------------------------------------------------------------------------------


def candidate_links(library: str, environ: Mapping[str, str] = os.environ) -> list[Link]:
    """Ways to reach a library, as pkg-config names it, the best first; `trial` finds out which works."""
    if library == "liburing":
        return liburing_links(environ)
    # All of xxHash is in its header.
    found = f"xxHash {_version(library)}".rstrip() + " found"
    return [Link("header", found, _flags(_pkg_config("--cflags", library), "-I"))]


def liburing_links(environ: Mapping[str, str] = os.environ) -> list[Link]:
    wanted = linkage(environ)
    include_dirs = _flags(_pkg_config("--cflags", "liburing"), "-I")
    library_dirs = _flags(_pkg_config("--libs", "liburing"), "-L")
    directories = (*_pkg_config("--variable=libdir", "liburing"), *library_dirs)
    archives = [str(Path(directory, "liburing.a")) for directory in dict.fromkeys(directories)]
    found = f"liburing {_version('liburing')}".rstrip() + " found, linked "
    static = Link("static", found + "statically", include_dirs)
    links = []
    if wanted != "shared":
        links += [replace(static, extra_objects=(path,)) for path in archives if os.path.isfile(path)]
        # Without pkg-config the linker's own search path may still hold the archive.
        links.append(replace(static, library_dirs=library_dirs, extra_link_args=("-l:liburing.a",)))
    if wanted != "static":
        links.append(Link("shared", found + "dynamically", include_dirs, library_dirs, ("uring",)))
    return links


def _pkg_config(question: str, library: str) -> list[str]:
    """What pkg-config answers, in words; nothing if it is not there or does not know the library."""
    tool = shutil.which(os.environ.get("PKG_CONFIG", "pkg-config"))
    if tool is None:
        return []
    try:
        answer = subprocess.run(
            [tool, question, library], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return shlex.split(answer.stdout) if answer.returncode == 0 else []


def _version(library: str) -> str:
    return " ".join(_pkg_config("--modversion", library))


def _flags(arguments: list[str], prefix: str) -> tuple[str, ...]:
    return tuple(a[len(prefix) :] for a in arguments if a.startswith(prefix))


# -- the compiler ---------------------------------------------------------------------------------


def _compiler() -> Any:
    """The compiler that setuptools would use, with CC, CFLAGS and LDFLAGS taken into account."""
    importlib.import_module("setuptools")  # brings distutils on Python 3.12 and later
    from distutils.ccompiler import new_compiler
    from distutils.sysconfig import customize_compiler

    compiler = new_compiler()
    customize_compiler(compiler)
    return compiler


def no_compiler() -> str | None:
    """Says so where there is none; else None."""
    command = _compiler().compiler_so[0]
    if shutil.which(command) is None:
        return f"no C compiler ({Path(command).name} not found; Debian: apt-get install gcc)"
    return None


def trial(link: Link, program: str) -> str | None:
    """Compile and link a small shared object the way the module will be; None, or why it failed."""
    compiler = _compiler()
    paths = sysconfig.get_paths()
    includes = dict.fromkeys([*link.include_dirs, paths["include"], paths["platinclude"]])
    with tempfile.TemporaryDirectory(prefix="yatagarasu-build-") as directory:
        source, output, shared = (str(Path(directory) / f"trial.{suffix}") for suffix in ("c", "o", "so"))
        Path(source).write_text(program)
        flags = [f"-I{path}" for path in includes]
        problem = _run([*compiler.compiler_so, *flags, "-std=c11", "-c", source, "-o", output])
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
        return "xxHash's headers are missing (Debian: apt-get install libxxhash-dev)"
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
