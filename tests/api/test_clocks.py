"""Clocks that were wrong: ahead when something was stored, set back, beyond what stamps can say."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from helpers import SECOND, Clock, Make, noise

from yatagarasu_cache import DiskCache
from yatagarasu_cache.store import format as f

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("core")]

YEARS = 10 * 365 * 86400.0
LARGE = 20_000


def misses(cache: DiskCache, key: str) -> bool:
    """By every way to ask for it; it is a miss, and counted as one."""
    before = cache.stats().misses
    assert cache.get(key) is None and cache.stats().misses == before + 1
    assert cache.get_many([key]) == {} and key not in cache and cache.get_entry(key) is None
    with pytest.raises(KeyError):
        cache.open(key)
    return key not in list(cache)


@pytest.mark.parametrize("size", [10, LARGE])
@pytest.mark.parametrize("ahead", [60.0, YEARS])
def test_what_was_made_in_the_future_has_expired(
    make: Make, monkeypatch: pytest.MonkeyPatch, size: int, ahead: float
) -> None:
    clock = Clock(monkeypatch)
    cache = make(size_limit=1 << 24, large_value_size=LARGE)
    clock.advance(ahead)
    for how in ("set", "add", "many", "stream", "text"):
        if how == "many":
            cache.set_many({how: noise(size)}, expire=60)
        elif how == "stream":
            cache.set(how, iter([noise(size)]), expire=60)
        else:
            (cache.add if how == "add" else cache.set)(how, "t" if how == "text" else noise(size), expire=60)
    cache.set("for ever", noise(size))
    assert all(key in cache for key in ("set", "add", "many", "stream", "text"))
    clock.advance(-ahead)
    assert all(misses(cache, key) for key in ("set", "add", "many", "stream", "text"))
    assert cache["for ever"] == noise(size)  # what never expires needs no clock
    assert cache.touch("set", 10) is False and cache.delete("text") is False
    assert cache.add("add", "new", expire=60) and cache["add"] == "new"  # as if there were nothing
    assert cache.expire() == 3 and len(cache) == 2
    assert cache.check() == []


def test_what_is_made_after_the_clock_was_set_back_lives_as_ever(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    clock.advance(3600)
    cache.set("before", 1)
    clock.advance(-3600)  # stamps go on from there
    for ttl in (60.0, 1800.0, 7200.0, YEARS):
        cache.set(("k", ttl), noise(10), expire=ttl)
        cache.set_many({("m", ttl): "text"}, expire=ttl)
    assert cache._store.current.index.words[f.W_CLOCK] > clock.now + 3599 * SECOND
    for _ in range(2):
        clock.advance(59)
        for ttl in (60.0, 1800.0, 7200.0, YEARS):
            lives = clock.now < start_of(cache, ("k", 7200.0)) + ttl * SECOND
            assert (cache.get(("k", ttl)) == noise(10)) == (("m", ttl) in cache) == lives
    entry = cache.get_entry(("k", 7200.0))
    assert entry is not None and abs(entry.created - (clock.now / SECOND - 118)) < 1
    assert cache.check() == []


def start_of(cache: DiskCache, key: tuple[str, float]) -> float:
    entry = cache.get_entry(key)
    assert entry is not None
    return entry.created * SECOND


@pytest.mark.parametrize("back", [1.0, 9.0])
def test_small_steps_back_cost_nothing(make: Make, monkeypatch: pytest.MonkeyPatch, back: float) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    cache.set("k", b"v", expire=60)
    clock.advance(-back)
    assert cache["k"] == b"v"
    clock.advance(60 + back)
    assert "k" not in cache


def test_it_stays_so_when_moved_and_rebuilt(make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make(size_limit=1 << 20)
    clock.advance(YEARS)
    cache.set("k", b"v" * 100, expire=60)
    clock.advance(-YEARS)
    cache.set("new", b"v" * 100, expire=60)
    for n in range(2000):  # segments are cleaned
        cache.set(("junk", n % 50), noise(1000, n))
    cache.close()
    (directory / "index").unlink()
    again = make()
    assert again.get("k") is None and again["new"] == b"v" * 100
    assert again.check() == []


@pytest.mark.parametrize("now", [(1 << 63) - 1, (1 << 63) - (1 << 55)])
def test_a_clock_beyond_all_stamps(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch, now: int
) -> None:
    """The system's clock ends in 2262: stamps count on then, and nothing is taken for damage."""
    clock = Clock(monkeypatch)
    cache = make()
    cache.set("before", b"old")
    really, clock.now = clock.now, now
    for n in range(100):
        cache.set(n, noise(100, n))
    cache.set("before", b"new")
    cache.incr("n"), cache.delete(5)
    assert cache["before"] == b"new" and cache[6] == noise(100, 6) and 5 not in cache
    assert cache._store.current.index.words[f.W_CLOCK] < f.LAST_CLOCK
    assert cache.check() == []
    clock.now = really
    assert cache["before"] == b"new"
    assert cache.check() == []
    cache.close()
    (directory / "index").unlink()
    again = make()
    assert again["before"] == b"new" and again[6] == noise(100, 6) and 5 not in again
    assert again.check() == []
    assert again._store.current.index.words[f.W_CLOCK] < time.time_ns() + SECOND * 3600
