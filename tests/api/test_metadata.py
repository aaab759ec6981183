"""Metadata: with the value in one call, and changed by itself."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import LARGE, SEGMENT, Clock, Make, environment, in_threads, noise

from yatagarasu_cache import ClosedError, DiskCache, ReadOnlyError, SerializationError, ValueTooLarge

pytestmark = pytest.mark.usefixtures("core")

VALUES: list[Any] = [b"", b"small", noise(LARGE), noise(3 * LARGE), "text", 12, None, {"a": [1, (2, 3)]}, ["x" * LARGE]]
METAS: list[Any] = [None, {"type": "text/html", "etag": "1"}, 0, "", [], [1, [2]], "x" * 5000]


def small(make: Make, **options: Any) -> DiskCache:
    """A cache in which values of LARGE bytes have files of their own."""
    return make(**{"size_limit": 64 << 20, "segment_size": SEGMENT, **options})


def files(directory: Path) -> list[str]:
    return sorted(os.listdir(directory / "large"))


# -- with the value -----------------------------------------------------------------------------


@pytest.mark.parametrize("meta", METAS)
@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_value_and_metadata_in_one_call(make: Make, value: Any, meta: Any) -> None:
    cache = small(make)
    cache.set("k", value, meta=meta, tag="t" * 100)
    for key in ("k",):
        assert cache.get(key, with_meta=True) == (value, meta)
        assert cache.get(key, "default", with_meta=True) == (value, meta)
        assert cache.get(key) == value == cache.get(key, with_meta=False)
    assert type(cache.get("k", with_meta=True)[0]) is type(value)
    assert (cache.stats().hits, cache.stats().misses) == (5, 0)


def test_misses(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = small(make)
    default = object()
    cache.set("k", 1, meta=2, expire=10)
    clock.advance(20)
    for key in ("k", "none", 5, ("t",), "x" * 3000):
        assert cache.get(key, with_meta=True) == (None, None)
        assert cache.get(key, default, with_meta=True) == (default, None)
    assert cache.stats().misses == 10
    cache.close()
    with pytest.raises(ClosedError):
        cache.get("k", with_meta=True)


def test_keys_of_all_types(make: Make) -> None:
    cache = small(make)
    for key in ("a", b"a", 1, 1.5, True, None, ("t", 1), "é" * 400, "\ud800"):
        cache.set(key, repr(key), meta=repr(key))
        assert cache.get(key, with_meta=True) == (repr(key), repr(key))


def test_a_use_as_any_other(make: Make) -> None:
    cache = small(make, eviction="lru")
    cache.set("k", 1, meta=1)
    entry = cache.get_entry("k")
    assert entry is not None and entry.accessed is not None
    cache.get("k", with_meta=True)
    again = cache.get_entry("k")
    assert again is not None and again.accessed is not None and again.accessed > entry.accessed


def test_a_damaged_head_is_no_metadata(make: Make, directory: Path) -> None:
    """It has a checksum of its own, which plain gets need not look at."""
    cache = small(make)
    cache.set("k", b"value", meta="m" * 50)
    assert cache.get("k", with_meta=True) == (b"value", "m" * 50)
    (path,) = [path for path in (directory / "segments").iterdir() if b"m" * 50 in path.read_bytes()]
    data = path.read_bytes().replace(b"m" * 50, b"n" * 50)
    with path.open("r+b") as file:
        file.write(data)
    assert cache.get("k", with_meta=True) == (None, None)
    assert "k" not in cache and cache.stats().corrupt == 1


# -- by itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_metadata_is_replaced_and_all_else_stays(make: Make, directory: Path, value: Any) -> None:
    cache = small(make)
    cache.set("k", value, meta="first", tag="t", expire=1000)
    before, had = cache.get_entry("k"), files(directory)
    assert before is not None
    for meta in METAS:
        assert cache.set_meta("k", meta) is True
        assert cache.get("k", with_meta=True) == (value, meta)
        entry = cache.get_entry("k")
        assert entry is not None and entry.value == value
        assert (entry.meta, entry.tag, entry.expires, entry.created, entry.size) == (
            meta, "t", before.expires, before.created, before.size,
        )  # fmt: skip
        assert files(directory) == had
    assert cache.check() == [] and len(cache) == 1
    large = cache._store.current.index.words[18]
    cache.set_meta("k", 1)
    assert cache._store.current.index.words[18] == large
    assert cache.evict("t") == 1 and files(directory) == []


def test_where_there_is_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = small(make)
    assert cache.set_meta("k", 1) is False
    cache.set("k", b"v", expire=5)
    clock.advance(6)
    assert cache.set_meta("k", 1) is False and "k" not in cache and cache.get("k") is None


def test_what_is_refused_changes_nothing(make: Make) -> None:
    cache = small(make)
    cache.set("k", b"v", meta="old", tag="t")
    with pytest.raises(SerializationError):
        cache.set_meta("k", object())
    with pytest.raises(SerializationError):
        cache.set_meta(object(), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueTooLarge):
        cache.set_meta("k", bytes(2 << 20))
    assert cache.get("k", with_meta=True) == (b"v", "old")
    with make(read_only=True) as reader, pytest.raises(ReadOnlyError):
        reader.set_meta("k", 1)
    cache.close()
    with pytest.raises(ClosedError):
        cache.set_meta("k", 1)


def test_values_that_nobody_here_can_read(make: Make, directory: Path) -> None:
    """Neither is the value decoded: another serializer may have made it."""

    class Shouting:
        name = "shouting"

        def dumps(self, value: Any) -> bytes:
            return repr(value).upper().encode()

        def loads(self, data: bytes) -> Any:
            raise ValueError("not for you")

    cache = make(serializer=Shouting())
    cache.set("k", [1, 2], meta=1)
    assert cache.set_meta("k", {"other": True}) is True
    entry = cache.get_entry("k")
    assert entry is not None and entry.meta == {"other": True}


def test_touched_meanwhile_it_keeps_the_new_expiry(make: Make) -> None:
    cache = small(make)
    for value in (b"small", noise(LARGE)):
        cache.set("k", value, expire=5)
        cache.touch("k", 5000)
        cache.set_meta("k", 1)
        entry = cache.get_entry("k")
        assert entry is not None and entry.expires is not None and entry.expires > time.time() + 4000
        cache.touch("k", math.inf)
        cache.set_meta("k", 1)
        entry = cache.get_entry("k")
        assert entry is not None and entry.expires is None


@pytest.mark.parametrize("value", [b"small", noise(2 * LARGE)], ids=["small", "large"])
def test_an_index_made_anew_has_it(make: Make, directory: Path, value: bytes) -> None:
    for meta in range(3):
        with small(make) as cache:
            if not meta:
                cache.set("k", value, meta="first", tag="t")
            cache.set_meta("k", meta)
        (directory / "index").unlink()
        with small(make) as cache:
            assert cache.get("k", with_meta=True) == (value, meta)
            assert cache.check() == []
    with small(make) as cache:
        cache["k"] = b"another"
        assert files(directory) == []
    (directory / "index").unlink()
    with small(make) as cache:
        assert cache["k"] == b"another" and cache.check() == []
        del cache["k"]
    (directory / "index").unlink()
    assert "k" not in small(make)


def test_cleaning_and_checkpoints_keep_it(make: Make, directory: Path) -> None:
    cache = small(make, size_limit=1 << 20)
    cache.set("large", noise(LARGE), tag="t")
    for number in range(3000):
        cache.set_meta("large", number)
        if number % 20 == 0:
            cache[f"filler {number % 200}"] = noise(3000, number)
            assert cache.get("large") is not None
    assert cache.get("large", with_meta=True) == (noise(LARGE), 2999)
    assert cache.check() == [] and len(files(directory)) == 1
    assert cache.volume() <= 1 << 20


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("size", [100, LARGE + 1])
def test_with_others_that_store_the_same_key(make: Make, directory: Path, size: int) -> None:
    """Each reads a value with metadata that was stored, or set, for that very value."""
    caches = [small(make) for _ in range(3)]
    done = threading.Event()
    seen = []

    def value(number: int) -> bytes:
        return b"%06d" % number + bytes(size)

    caches[0].set("k", value(0), meta=["set", 0])

    def work(which: int) -> None:
        cache = caches[which]
        if which == 0:
            for number in range(1, 150):
                cache.set("k", value(number), meta=["set", number])
            done.set()
        while not done.is_set():
            if which == 1:
                assert cache.set_meta("k", ["meta", 0]) is True
            else:
                found, (kind, number) = cache.get("k", with_meta=True)
                assert len(found) == size + 6
                if kind == "set":
                    assert int(found[:6]) == number
                seen.append(kind)

    in_threads(3, work)
    assert int(caches[1]["k"][:6]) == 149
    assert caches[0].check() == [] and len(files(directory)) == (size >= LARGE)


@pytest.mark.usefixtures("apart")
def test_with_others_that_remove_it(make: Make, directory: Path) -> None:
    first, second = small(make), small(make)

    def work(which: int) -> None:
        for number in range(150):
            if which:
                second.set_meta("k", number)
            else:
                first.set("k", noise(LARGE, number), meta="set")
                first.delete("k")
                assert "k" not in first  # a change of metadata brings nothing back

    in_threads(2, work)
    assert first.check() == [] and files(directory) == [] and len(first) == 0


_ENDLESS = """
import sys, itertools
from yatagarasu_cache import DiskCache
cache = DiskCache(sys.argv[1], backend=sys.argv[2], size_limit=64 << 20, segment_size=64 << 10)
for number in itertools.count():
    for key in ("small", "large"):
        assert cache.set_meta(key, number)
    if not number:
        print("on", flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.011, 0.023])
def test_killed_in_the_middle(make: Make, directory: Path, backend: str, core: str, delay: float) -> None:
    with small(make) as cache:
        cache.set("small", b"s", tag="t", meta=-1)
        cache.set("large", noise(LARGE), tag="t", meta=-1)
    child = subprocess.Popen(
        [sys.executable, "-c", _ENDLESS, directory, backend], stdout=subprocess.PIPE, env=environment()
    )
    assert child.stdout is not None and child.stdout.readline() == b"on\n"
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    rebuild = delay > 0.01
    if rebuild:
        (directory / "index").unlink()
    with small(make) as cache:
        metas = [cache.get(key, with_meta=True)[1] for key in ("small", "large")]
        assert metas[0] >= 0 and metas[0] - metas[1] in (0, 1)
        assert cache["small"] == b"s" and cache["large"] == noise(LARGE)
        assert cache.check() == [] and len(files(directory)) == 1
    (directory / "index").unlink()
    with small(make) as cache:  # it does not go back
        assert [cache.get(key, with_meta=True)[1] for key in ("small", "large")] == metas
        assert cache.check() == [] and cache.delete("large") and files(directory) == []


def test_a_full_disk_changes_nothing(make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers import FailingBackend, wrap_backends

    made = wrap_backends(monkeypatch, FailingBackend)
    cache = small(make, eviction="none")
    cache.set("k", noise(LARGE), meta="old")
    backend = made[-1]
    assert isinstance(backend, FailingBackend)
    backend.fail(28, {"write"}, where="segments")
    with contextlib.suppress(OSError):
        cache.set_meta("k", "new")
        pytest.fail("there was room")
    backend.mend()
    assert cache.get("k", with_meta=True) == (noise(LARGE), "old")
    assert cache.set_meta("k", "new") and cache.get("k", with_meta=True) == (noise(LARGE), "new")
    assert cache.check() == []


def test_durably(make: Make, directory: Path) -> None:
    cache = small(make, durability="sync")
    for value in (b"v", noise(LARGE)):
        cache.set("k", value, meta=1)
        assert cache.set_meta("k", 2) and cache.get("k", with_meta=True) == (value, 2)
    assert cache.check() == []


def test_many_sizes_of_metadata(make: Make) -> None:
    cache, draw, model = small(make), random.Random(5), {}
    for number in range(400):
        key = draw.randrange(20)
        if draw.random() < 0.3 or key not in model:
            model[key] = noise(draw.choice([0, 10, LARGE - 1, LARGE]), number), None
            cache[key] = model[key][0]
        meta = "m" * draw.randrange(0, 6000)
        model[key] = model[key][0], meta
        assert cache.set_meta(key, meta)
    for key, expected in model.items():
        assert cache.get(key, with_meta=True) == expected
    assert cache.check() == []


