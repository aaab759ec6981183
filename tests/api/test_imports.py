"""What importing the package costs: little is loaded before a cache is opened, and asyncio before it is wanted."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import run_python

import yatagarasu_cache
from yatagarasu_cache import AsyncDiskCache, DiskCache, aio, codec, config, entry, mending, stats
from yatagarasu_cache.compat.diskcache import importer
from yatagarasu_cache.store import check

PACKAGE = Path(yatagarasu_cache.__file__).parent
# Of the standard library: whatever takes a millisecond or more with all that it brings.
HEAVY = frozenset(
    {
        "ast", "asyncio", "base64", "concurrent.futures", "ctypes", "dataclasses", "datetime", "decimal", "difflib",
        "email", "hashlib", "hmac", "importlib.metadata", "inspect", "json", "logging", "multiprocessing",
        "pathlib", "pickle", "random", "re", "secrets", "selectors", "shutil", "socket", "sqlite3", "ssl",
        "subprocess", "tempfile", "traceback", "urllib", "uuid", "zipfile",
    }
)  # fmt: skip


def test_the_import_loads_little() -> None:
    """Without site-packages: nothing of ours, or of anybody's, that only an open cache needs."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import yatagarasu_cache; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(PACKAGE.parent)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    brought = {"re"} if sys.version_info < (3, 13) else set()  # by typing
    assert not loaded & HEAVY - brought
    ours = {name.partition(".")[2] for name in loaded if name.startswith("yatagarasu_cache.")}
    assert ours <= {
        "_version", "cache", "concurrency", "concurrency.cancelling", "concurrency.interruption", "concurrency.locks",
        "engine", "errors", "guard",
    }  # fmt: skip
    assert not loaded & {"cffi", "ormsgpack", "xxhash"}


@pytest.mark.parametrize("name", ["threads", "auto"])
def test_who_does_without_asyncio_does_not_load_it(directory: Path, name: str) -> None:
    """Whichever backend it comes to."""
    code = """
import sys
from yatagarasu_cache import DiskCache
with DiskCache(sys.argv[1], backend=sys.argv[2]) as cache:
    cache.set_many({"k": b"v", 1: {"a": [1, 2]}})
    assert cache.get_many(["k", 1]) == {"k": b"v", 1: {"a": [1, 2]}}
    assert cache.incr("n") == 1 and cache.get_entry("k").size == 1 and not cache.check()
    cache.flush()
    del cache
DiskCache(sys.argv[1], backend=sys.argv[2])  # nobody closes it
print(*{"asyncio", "concurrent.futures", "difflib", "json", "multiprocessing", "ssl"} & sys.modules.keys())
"""
    assert run_python(code, directory, name).split() == []


# -- what is loaded when it is asked for ----------------------------------------------------------

PLACES: dict[str, Any] = {
    "AsyncDiskCache": aio, "CacheStats": stats, "Entry": entry, "Location": entry, "MsgpackSerializer": codec,
    "PickleSerializer": codec, "Problem": check, "RingSettings": config, "Serializer": codec, "Settings": config,
    "TypedSerializer": codec, "import_diskcache": importer, "repair": mending,
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_it_is_what_it_always_was(name: str) -> None:
    assert getattr(yatagarasu_cache, name) is getattr(PLACES[name], name)
    assert name in dir(yatagarasu_cache) and name in yatagarasu_cache.__all__


def test_a_new_process_has_all_of_it() -> None:
    code = """
import sys, yatagarasu_cache
shown = dir(yatagarasu_cache)
assert set(yatagarasu_cache.__all__) <= set(shown) and "asyncio" not in sys.modules
from yatagarasu_cache import *
assert all(globals()[name] is getattr(yatagarasu_cache, name) for name in yatagarasu_cache.__all__)
assert AsyncDiskCache.__name__ == "AsyncDiskCache" and "asyncio" in sys.modules
assert vars(yatagarasu_cache)["AsyncDiskCache"] is AsyncDiskCache  # and does not ask again
assert dir(yatagarasu_cache)[0] == "AsyncDiskCache"
"""
    run_python(code)


def test_what_there_is_not_is_told_as_python_does() -> None:
    with pytest.raises(AttributeError, match="module 'yatagarasu_cache' has no attribute 'AsyncDiscCache'"):
        yatagarasu_cache.AsyncDiscCache  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="AsyncDiscCache"):
        from yatagarasu_cache import AsyncDiscCache  # type: ignore[attr-defined]  # noqa: F401


def test_pickles_find_it(directory: Path) -> None:
    """In a process that has imported nothing of it."""
    code = """
import pickle, sys
cache = pickle.loads(bytes.fromhex(sys.argv[1]))
from yatagarasu_cache import AsyncDiskCache, DiskCache
import asyncio
async def main():
    async with cache:
        assert await cache.get("k") == b"v"
if isinstance(cache, AsyncDiskCache):
    asyncio.run(main())
else:
    assert isinstance(cache, DiskCache) and cache["k"] == b"v"
    cache.close()
print(type(cache).__name__)
"""
    with DiskCache(directory, size_limit=1 << 22) as cache:
        cache["k"] = b"v"
        for handle in (cache, AsyncDiskCache(directory)):
            assert run_python(code, pickle.dumps(handle).hex()).strip() == type(handle).__name__


def test_type_checkers_know_it(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "use.py").write_text(
        "import yatagarasu_cache\n"
        "from yatagarasu_cache import AsyncDiskCache, CacheStats\n"
        "async def use(cache: AsyncDiskCache) -> CacheStats:\n"
        "    return await cache.stats()\n"
        "async def misuse(cache: yatagarasu_cache.AsyncDiskCache) -> str:\n"
        "    return await cache.stats()\n"
        "yatagarasu_cache.AsyncDiscCache\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", os.devnull, "--follow-imports=silent", "use.py"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(PACKAGE.parent)},
    )  # fmt: skip
    found = [line for line in done.stdout.splitlines() if line.startswith("use.py:")]
    assert [line.split(": ")[0] for line in found if ": error: " in line] == ["use.py:6", "use.py:7"], done.stdout


# -- the first opening ----------------------------------------------------------------------------

# While a module of the engine is imported, `meanwhile` is called.
SLOW = """
SLOW = "yatagarasu_cache.store.sharing"
import os, sys, threading, time
from yatagarasu_cache import CacheError, DiskCache, Reentered
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == SLOW:
            meanwhile()
sys.meta_path.insert(0, Slow())
"""


@pytest.mark.parametrize("module", ["logging", "yatagarasu_cache.store.sharing", "yatagarasu_cache.backends.threads"])
def test_a_fork_waits_until_the_engine_is_loaded(directory: Path, module: str) -> None:
    """Else its modules would be half loaded in the child, by a thread that it does not have."""
    code = SLOW + """
SLOW = sys.argv[2]
assert SLOW not in sys.modules
import signal
sys.unraisablehook = lambda told: print(told.exc_value)
begun = threading.Event()
def meanwhile():
    begun.set()
    time.sleep(0.5)
def first():
    with DiskCache(sys.argv[1], backend="threads") as cache:
        cache["k"] = b"v"
thread = threading.Thread(target=first)
thread.start()
begun.wait()
child = os.fork()
if not child:
    signal.alarm(60)
    with DiskCache(sys.argv[1] + ".child", backend="threads") as cache:
        cache["k"] = b"v"
        os._exit(cache["k"] != b"v")
thread.join()
print(os.waitpid(child, 0)[1])
with DiskCache(sys.argv[1], backend="threads") as cache:
    assert cache["k"] == b"v"
"""
    assert run_python(code, directory, module).strip() == "0"


def test_who_interrupts_the_first_opening_is_refused(directory: Path) -> None:
    """A signal handler, say: it would get half of the engine."""
    code = SLOW + """
def meanwhile():
    try:
        DiskCache(sys.argv[1])
    except Reentered as error:
        print(error)
with DiskCache(sys.argv[1]) as cache:
    cache["k"] = b"v"
"""
    assert "interrupted the opening of the first cache" in run_python(code, directory)


def test_an_opening_that_is_interrupted_while_it_loads_can_be_repeated(directory: Path) -> None:
    code = SLOW + """
class Stop(BaseException): pass
times = 0
def meanwhile():
    global times
    times += 1
    if times < 3:
        raise Stop if times == 1 else OSError(5, "a disk with the package fails")
for expected in (Stop, OSError):
    try:
        DiskCache(sys.argv[1])
    except expected as error:
        assert type(error) is expected  # neither is a failure of the cache
with DiskCache(sys.argv[1]) as cache:
    cache["k"] = b"v"
    assert cache["k"] == b"v" and times == 3
"""
    run_python(code, directory)


@pytest.mark.parametrize("name", ["aio", "codec", "config", "entry", "format", "mending", "stats"])
def test_modules_can_be_had_without_being_imported(name: str) -> None:
    code = """
import sys, yatagarasu_cache
module = getattr(yatagarasu_cache, sys.argv[1])
assert module.__name__.startswith("yatagarasu_cache.") and module.__name__.endswith(sys.argv[1])
"""
    run_python(code, name)
