"""The store backend of joblib's Memory."""

from __future__ import annotations

import datetime
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

joblib = pytest.importorskip("joblib")
np = pytest.importorskip("numpy")

from joblib._store_backends import CacheWarning  # noqa: E402

from yatagarasu_cache import DiskCache  # noqa: E402
from yatagarasu_cache.integrations.joblib import YatagarasuStoreBackend, register  # noqa: E402

SECRET = b"secret of the tests"


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


def memory(path: Path, mmap_mode: Any = None, compress: Any = False, **options: Any) -> Any:
    given = {"secret": SECRET, **options}
    return joblib.Memory(str(path), backend="yatagarasu", verbose=0, mmap_mode=mmap_mode, compress=compress, backend_options=given)


class Counted:
    """A function to cache, and how often it was called."""

    def __init__(self, function: Any) -> None:
        self.calls, self._function = 0, function

    def of(self, store: Any) -> Any:
        def compute(value: Any, more: int = 1) -> Any:
            self.calls += 1
            return self._function(value)

        return store.cache(compute)


@pytest.mark.parametrize("value", [
    5, "é", b"bytes", None, {"a": [1, (2, 3)]}, {1, 2}, datetime.date(2026, 1, 2), [float("nan")], "x" * 5_000_000,
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_results_come_back_as_they_were(tmp_path: Path, value: Any) -> None:
    counted = Counted(lambda _: value)
    function = counted.of(memory(tmp_path))
    first, second = function(1), function(1)
    assert repr(first) == repr(second) == repr(value) and type(second) is type(value) and counted.calls == 1
    assert repr(function(2)) == repr(value) and counted.calls == 2


@pytest.mark.parametrize("mode", [None, "r", "c", "r+"])
@pytest.mark.parametrize("make", [
    lambda: np.arange(300_000.0).reshape(3, -1), lambda: np.asfortranarray(np.arange(20).reshape(4, 5)), lambda: np.array([]),
    lambda: np.array([{"an": "object"}, None], dtype=object), lambda: np.array(5), lambda: np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")]),
    lambda: np.ma.masked_array([1, 2], [True, False]), lambda: np.arange(10)[::2],
], ids=["large", "fortran", "empty", "objects", "scalar", "records", "masked", "strided"])  # fmt: skip
def test_arrays(tmp_path: Path, make: Any, mode: Any) -> None:
    counted = Counted(lambda _: make())
    function = counted.of(memory(tmp_path, mode))
    function(1)
    found, expected = function(1), make()
    assert counted.calls == 1 and type(found) is type(expected) and found.dtype == expected.dtype
    assert repr(found) == repr(expected) and found.shape == expected.shape
    if mode != "r":
        assert found.flags.writeable


def test_a_large_array_is_mapped_and_not_copied(tmp_path: Path) -> None:
    counted = Counted(lambda _: np.arange(3_000_000))
    store = memory(tmp_path, "r")
    function = counted.of(store)
    function(1)
    found = function(1)
    assert not found.flags.writeable and not found.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1
    function.clear(warn=False)  # the view stays
    assert found[-1] == 2_999_999


@pytest.mark.parametrize("compress", [True, 3, ("zlib", 1)])
def test_compressed(tmp_path: Path, compress: Any) -> None:
    counted = Counted(lambda _: np.zeros(1_000_000))
    store = memory(tmp_path, compress=compress)
    function = counted.of(store)
    function(1)
    assert (function(1) == 0).all() and counted.calls == 1
    (entry,) = store.store_backend.cache.entries(prefix=("result",))
    assert entry.size < 100_000
    with pytest.warns(UserWarning, match="cannot be mapped"):
        memory(tmp_path, "r", compress)


def test_it_is_bounded_and_the_code_stays(tmp_path: Path) -> None:
    counted = Counted(lambda value: np.full(20_000, value))
    store = memory(tmp_path, size_limit=1 << 20)
    function = counted.of(store)
    for i in range(30):
        function(i)
    backend = store.store_backend
    assert backend.cache.volume() <= 1 << 20 and backend.cache.stats().evictions > 0
    assert function(29)[0] == 29 and counted.calls == 30
    assert function(0)[0] == 0 and counted.calls == 31
    assert function(29)[0] == 29 and counted.calls == 31  # they are not taken for those of other code


def test_other_code_has_other_results(tmp_path: Path) -> None:
    name = tmp_path / "module.py"
    store = memory(tmp_path / "cache")

    def load(text: str) -> Any:
        name.write_text(f"def compute(x):\n    return {text}\n")
        space: dict[str, Any] = {"__name__": "module_of_test"}
        exec(compile(name.read_text(), str(name), "exec"), space)
        return store.cache(space["compute"])

    import linecache

    assert load("x + 1")(1) == 2
    linecache.clearcache()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load("x + 2")(1) == 3


def test_what_memory_offers(tmp_path: Path) -> None:
    counted = Counted(lambda value: value * 2)
    store = memory(tmp_path)
    function = counted.of(store)
    assert not function.check_call_in_cache(3) and function(3) == 6 and function.check_call_in_cache(3)
    shelved = function.call_and_shelve(4)
    assert shelved.get() == 8 and pickle.loads(pickle.dumps(shelved)).get() == 8
    shelved.clear()
    with pytest.raises(KeyError):
        shelved.get()
    for i in range(10):
        function(i)
    store.reduce_size(items_limit=4)
    assert len(store.store_backend.get_items()) == 4
    store.reduce_size(age_limit=datetime.timedelta(hours=1))
    store.reduce_size(bytes_limit="1K")
    function.clear(warn=False)
    assert store.store_backend.get_items() == []
    calls = counted.calls
    assert function(3) == 6 and counted.calls == calls + 1
    store.clear(warn=False)
    assert len(store.store_backend.cache) == 0 and function(3) == 6 and counted.calls == calls + 2


def test_expiring_and_ignored_arguments(tmp_path: Path) -> None:
    calls: list[Any] = []
    store = memory(tmp_path)

    def compute(a: int, b: int = 0) -> int:
        calls.append((a, b))
        return a

    function = store.cache(compute, ignore=["b"], cache_validation_callback=joblib.expires_after(seconds=1000))
    assert function(1, 2) == function(1, 3) == 1 and calls == [(1, 2)]
    gone = store.cache(compute, cache_validation_callback=lambda metadata: metadata["duration"] > 1000)
    assert gone(1, 2) == 1 and gone(1, 2) == 1 and len(calls) >= 3


def test_what_cannot_be_pickled_is_warned_of(tmp_path: Path) -> None:
    function = Counted(lambda _: (lambda: 0)).of(memory(tmp_path))
    with pytest.warns(CacheWarning, match="Unable to cache"):
        function(1)


def test_what_nobody_signed_is_computed_anew(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (tmp_path.joinpath("trapped").write_text, ("x",))

    counted = Counted(lambda value: [value])
    function = counted.of(memory(tmp_path))
    function(1)
    with DiskCache(tmp_path / "joblib" / "results") as cache:
        (key,) = [key for key in cache if key[0] == "result"]  # type: ignore[index]
        for forged in (pickle.dumps(Trap()), b"\0" * 32 + pickle.dumps(Trap()), b""):
            cache[key] = forged
            assert function(1) == [1]
    assert counted.calls == 4 and not (tmp_path / "trapped").exists()
    other = Counted(lambda value: [value])
    assert other.of(memory(tmp_path, secret=b"another"))(1) == [1] and other.calls == 1


def test_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mmap_mode"):
        memory(tmp_path, "x")
    with pytest.raises(ValueError, match="size_limit"):
        memory(tmp_path, size_limit="much")
    backend = memory(tmp_path).store_backend
    again = pickle.loads(pickle.dumps(backend))
    assert isinstance(again, YatagarasuStoreBackend) and again.cache is backend.cache


WORKER = """
import sys
import numpy as np
from joblib import Memory, Parallel, delayed
from yatagarasu_cache.integrations.joblib import register
register()
memory = Memory(sys.argv[1], backend="yatagarasu", verbose=0, backend_options={"secret": b"x"})

@memory.cache
def compute(n):
    with open(sys.argv[2], "a") as file:
        file.write(f"{n}\\n")
    return np.full(1000, n)

if __name__ == "__main__":
    found = Parallel(n_jobs=2)(delayed(compute)(i) for i in range(6))
    assert [int(one[0]) for one in found] == list(range(6))
"""


def test_workers_of_parallel_share_it(tmp_path: Path) -> None:
    script, called = tmp_path / "script.py", tmp_path / "called"
    script.write_text(WORKER)
    for _ in range(2):
        subprocess.run([sys.executable, str(script), str(tmp_path / "cache"), str(called)], check=True, timeout=120)
    assert sorted(called.read_text().split()) == [str(i) for i in range(6)]
