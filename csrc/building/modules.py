"""What each compiled module is made of: its sources, and a small program that needs what they need."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .machine import limited_api

ROOT = Path(__file__).resolve().parents[2]
SOURCES = "csrc"
WARNINGS = ("-std=c11", "-Wall", "-Wextra")
LIMITED_API = "0x030A0000"  # CPython 3.10: one file serves that and every later release


@dataclass(frozen=True)
class Module:
    """A compiled module; files are named as in `csrc/`."""

    name: str
    title: str
    switch: str  # the environment variable that says whether it is built
    library: str  # that it needs, as pkg-config names it
    sources: tuple[str, ...]
    headers: tuple[str, ...]
    trial: str  # compiles and links where the module does
    without: str  # what it means that the module is not there


RING = Module(
    name="yatagarasu_cache._ring",
    title="io_uring module",
    switch="YATAGARASU_IO_URING",
    library="liburing",
    sources=("_ring.c", "ring.c"),
    headers=("ring.h", "ring.cdef.h"),
    # What ring.c needs most, and what liburing 2.3 brought last.
    trial=r"""
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
    r |= io_uring_submit_and_wait_timeout(ring, &cqe, 1, &ts, 0) | io_uring_get_events(ring);
    return r;
}
""",
    without="the portable backend serves",
)

CORE = Module(
    name="yatagarasu_cache._core",
    title="core module",
    switch="YATAGARASU_COMPILED_CORE",
    library="libxxhash",
    sources=("core.c", "walk.c", "sum_avx2.c", "reads.c", "pack.c", "coremodule.c"),
    headers=("core.h", "layout.h", "walk.h", "reads.h", "pack.h"),
    # All of xxHash in its header, and XXH3 as it is for good.
    trial=r"""
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
""",
    without="Python code serves plain gets and sets, which take two to three times as long",
)

MODULES = {module.name: module for module in (RING, CORE)}


def extension(module: Module, environ: Mapping[str, str] = os.environ) -> Any:
    """The module for setuptools, which builds in the tree's root; `Link.reach` adds the library."""
    from setuptools import Extension

    if limited_api():
        macro = ("Py_LIMITED_API", LIMITED_API)
    else:
        macro = ("_CFFI_NO_LIMITED_API", "1")  # else _ring.c chooses one by itself
    return Extension(
        module.name,
        sources=[f"{SOURCES}/{name}" for name in module.sources],
        depends=[f"{SOURCES}/{name}" for name in module.headers],
        include_dirs=[SOURCES],
        define_macros=[macro],
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
