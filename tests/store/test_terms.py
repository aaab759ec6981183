"""Terms in times of expiry: what they say, who goes by them, and that they outlive whatever moves an entry."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from helpers import SECOND, Clock, Make, noise
from hypothesis import given
from hypothesis import strategies as st

from yatagarasu_cache import DiskCache
from yatagarasu_cache.store import format as f
from yatagarasu_cache.store.format import Slot

SMALL: dict[str, Any] = {"size_limit": 1 << 20, "segment_size": 8192, "large_value_size": 4000}
YEAR = 365 * 86400 * SECOND


@given(st.integers(1, 1 << 62), st.integers(0, 4 * YEAR), st.integers(0, 9 * 3600 * SECOND))
def test_terms_are_said_within_their_bits(expires: int, stale: int, took: int) -> None:
    word = f.pack_terms(expires, stale, took)
    assert abs(word - expires) < 1 << f.TERMS_BITS
    assert stale <= f.stale_time(word) <= stale * (1 + 2**-f.STALE_MANTISSA) + (1 << f.STALE_UNIT)
    assert took <= f.computing_time(word) <= took * (1 + 2**-f.COMPUTING_MANTISSA) + (1 << f.COMPUTING_UNIT)
    assert f.with_terms(expires + YEAR, word) - word == (expires + YEAR >> 20) - (expires >> 20) << 20


@given(st.integers(0, 1 << 90))
def test_more_than_can_be_said_is_the_most(time: int) -> None:
    word = f.pack_terms(SECOND, time, time)
    assert f.stale_time(word) >= min(time, 4 * YEAR) and f.computing_time(word) >= min(time, 9 * 3600 * SECOND)


def test_every_pattern_of_bits_is_read_and_written_alike() -> None:
    for bits, mantissa in ((f.TERMS_BITS - f.COMPUTING_BITS, f.STALE_MANTISSA), (f.COMPUTING_BITS, f.COMPUTING_MANTISSA)):
        numbers = [f._unpack_small(packed, mantissa) for packed in range(1 << bits)]
        assert numbers == sorted(set(numbers))
        assert [f._pack_small(number, mantissa, bits) for number in numbers] == list(range(1 << bits))


def slot_of(cache: DiskCache, key: str) -> Slot:
    low, high, _ = cache._desk.identify(key)
    at = cache._store.current.index.find(low, high)
    assert at
    return cache._store.current.index.slot(at)


VALUES = {"bytes": b"x" * 10, "list": [1, "a", None], "none": None, "large": noise(10_000)}


@pytest.mark.usefixtures("core")
def test_values_with_terms_are_values(make: Make) -> None:
    cache = make(**SMALL)
    for key, value in VALUES.items():
        assert cache.get_or_set(key, lambda value=value: value, expire=60, stale=60, tag="t", meta=1) == value  # type: ignore[misc]
        assert slot_of(cache, key).flags & f.FLAG_TERMS
    assert cache.get_many(VALUES) == VALUES
    for key, value in VALUES.items():
        assert cache.get(key) == value and key in cache
        entry = cache.get_entry(key)
        assert entry is not None and entry.value == value and (entry.tag, entry.meta) == ("t", 1)
    with cache.open("bytes") as file:
        assert file.read() == VALUES["bytes"]
    assert cache.pop("list") == VALUES["list"]
    assert cache.delete("none") and not cache.add("bytes", b"")
    assert cache.evict("t") == 2 and not len(cache) and not cache.check()


@pytest.mark.usefixtures("core")
def test_compiled_code_gives_plain_bytes(make: Make) -> None:
    """Flags of the store's own are none of the codec's business."""
    cache = make()
    cache.get_or_set("k", lambda: b"v", expire=60, stale=60)
    found = cache._get("k", 1)
    assert found in (b"v", NotImplemented)
    assert cache.get("k") == b"v"


@pytest.mark.usefixtures("core")
def test_in_its_stale_time_it_is_a_miss_and_stays(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make(**SMALL)
    for key in ("bytes", "large"):
        cache.get_or_set(key, lambda key=key: VALUES[key], expire=10, stale=100, tag="t")  # type: ignore[misc]
    cache.set("plain", 1, expire=10)
    clock.advance(11)
    assert cache.expire() == 1 and len(cache) == 2
    for key in ("bytes", "large"):
        assert cache.get(key) is None and key not in cache and cache.get_entry(key) is None
        assert not cache.touch(key, 60)
    assert cache.get_many(["bytes", "large"]) == {} and list(cache) == []
    assert cache.stats().expirations == 1 and not cache.check()
    clock.advance(103)  # it is rounded up
    assert cache.expire() == 2 and not len(cache) and cache.stats().expirations == 3


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("change", ["delete", "set", "add", "incr", "clear", "delete_prefix"])
def test_what_is_stale_can_be_changed(make: Make, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    cache.get_or_set("k", lambda: 5, expire=10, stale=100)
    clock.advance(11)
    changes: dict[str, Any] = {
        "delete": lambda: cache.delete("k"), "set": lambda: cache.set("k", 1), "add": lambda: cache.add("k", 1),
        "incr": lambda: cache.incr("k"), "clear": cache.clear, "delete_prefix": lambda: cache.delete_prefix("k"),
    }  # fmt: skip
    done = changes[change]()
    if change in ("set", "add", "incr"):
        assert done and cache.get("k") == 1
    else:
        assert cache.get_or_set("k", lambda: 7, expire=10, stale=100) == 7, "it is gone"


@pytest.mark.usefixtures("core")
def test_a_touch_keeps_terms(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    cache.get_or_set("k", lambda: 1, expire=10, stale=100)
    before = slot_of(cache, "k").expires
    assert cache.touch("k", 1000)
    after = slot_of(cache, "k").expires
    assert f.stale_time(after) == f.stale_time(before) and f.computing_time(after) == f.computing_time(before)
    assert abs(after - clock.now - 1000 * SECOND) < 2**f.TERMS_BITS
    clock.advance(1001)
    assert cache.get("k") is None and cache.expire() == 0
    cache.set("k", 1, expire=5)  # whatever replaces it has none
    assert not slot_of(cache, "k").flags & f.FLAG_TERMS
    cache.get_or_set("never", lambda: 1, expire=10, stale=100)
    assert cache.touch("never", float("inf")) and slot_of(cache, "never").expires == 0
    clock.advance(1e6)
    assert cache.get("never") == 1 and cache.expire() == 1


@pytest.mark.parametrize("how", ["segments", "checkpoint", "cleaning"])
def test_terms_outlive_what_moves_an_entry(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch, quiet: None, how: str
) -> None:
    """Rebuilt, recovered from a checkpoint, and moved by cleaning."""
    clock = Clock(monkeypatch)
    cache = make(**SMALL)
    cache.get_or_set("k", lambda: b"old", expire=1000, stale=100)
    assert cache.touch("k", 10)
    before = slot_of(cache, "k")
    if how == "cleaning":
        for i in range(200):
            cache.set(i, noise(3000, i))
            cache.delete(i)
        while cache._store.cleaner.clean_emptiest():
            pass
        assert slot_of(cache, "k").place != before.place
    if how == "checkpoint":
        cache._store.checkpoints.write_if()
    cache.close()
    if how != "cleaning":
        os.unlink(directory / f.INDEX_NAME)
    cache = make(**SMALL)
    assert slot_of(cache, "k").expires == before.expires and slot_of(cache, "k").flags & f.FLAG_TERMS
    clock.advance(11)
    assert cache.get("k") is None
    assert cache.get_or_set("k", lambda: b"new", expire=1000, stale=100) == b"old"


def test_eviction_takes_what_is_over_before_what_is_stale(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make(**SMALL, eviction="fifo")
    cache.get_or_set("stale", lambda: b"s" * 3000, expire=10, stale=1e6)
    for i in range(10):
        cache.set(("live", i), noise(3000, i))
    for i in range(10):
        cache.get_or_set(("over", i), lambda: b"o" * 3000, expire=10, stale=5)
    clock.advance(20)
    low, high, _ = cache._desk.identify("stale")
    for i in range(1000):
        cache.set(i, noise(3000, i))
        if cache.stats().expirations >= 10:
            break
    assert cache._store.current.index.find(low, high) or cache.stats().evictions
    assert cache.stats().expirations == 10
