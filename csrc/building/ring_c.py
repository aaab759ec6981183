"""The C that cffi writes for the io_uring module, csrc/_ring.c, from the declarations in csrc/ring.cdef.h.

It is kept beside the sources, so that a build needs no cffi. After a change of the declarations:

    python -m csrc.building.ring_c          write it anew (needs cffi)
    python -m csrc.building.ring_c --check    say whether it is what cffi would write
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import sys
import tempfile
from pathlib import Path

from .machine import BuildError
from .modules import RING, ROOT, SOURCES

DECLARATIONS = ROOT / SOURCES / "ring.cdef.h"
TARGET = ROOT / SOURCES / "_ring.c"
COMMAND = "python -m csrc.building.ring_c"
# The wrappers that cffi writes leave parameters unused; ring.c itself is held to -Wextra.
INCLUDE = '#pragma GCC diagnostic ignored "-Wunused-parameter"\n#include "ring.h"\n'
HEAD = """\
/* Written by `{command}` with cffi {version}, from ring.cdef.h. Not to be edited.
   SHA-256 of ring.cdef.h: {digest} */
"""


def digest() -> str:
    """Of the declarations."""
    return hashlib.sha256(DECLARATIONS.read_bytes()).hexdigest()


def check() -> None:
    """Raises BuildError where the file was written from other declarations than those of this tree."""
    if digest() not in TARGET.read_text(encoding="utf-8")[:500]:
        raise BuildError(f"csrc/_ring.c was written from another csrc/ring.cdef.h: run `{COMMAND}`")


def generate() -> str:
    """What cffi writes for the declarations."""
    import cffi

    builder = cffi.FFI()
    builder.cdef(DECLARATIONS.read_text(encoding="utf-8"))
    builder.set_source(RING.name, INCLUDE)
    with tempfile.TemporaryDirectory(prefix="yatagarasu-build-") as directory:
        target = Path(directory, TARGET.name)
        with contextlib.redirect_stdout(io.StringIO()):  # it names the file
            builder.emit_c_code(str(target))
        written = target.read_text(encoding="utf-8")
    return HEAD.format(command=COMMAND, version=cffi.__version__, digest=digest()) + written


def of_the_declarations(source: str) -> str:
    """The part that depends on them: what stands before and behind it differs from cffi to cffi."""
    found = re.search(r'^#include "ring\.h"\n(.*)^#ifdef PYPY_VERSION$', source, re.MULTILINE | re.DOTALL)
    if found is None:
        raise BuildError("csrc/_ring.c is not what cffi writes")
    return found[1]


def is_current() -> bool:
    """Whether cffi, of whatever version, would write the same of the declarations."""
    kept = TARGET.read_text(encoding="utf-8")
    return digest() in kept[:500] and of_the_declarations(kept) == of_the_declarations(generate())


def main() -> int:
    if "--check" in sys.argv[1:]:
        if is_current():
            return 0
        print(f"csrc/_ring.c is not what cffi writes for csrc/ring.cdef.h: run `{COMMAND}`", file=sys.stderr)
        return 1
    TARGET.write_text(generate(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
