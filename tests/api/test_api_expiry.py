"""`DiskCache`: entries that expire, and clocks that are set."""

from __future__ import annotations

import math
import os

import pytest
from helpers import Clock, Make, noise

from yatagarasu_cache import EntryGone

pytestmark = pytest.mark.usefixtures("core")


def test_expiry(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    cache.set("int", 1, expire=2)
    cache.set("float", 1, expire=0.5)
    cache.set("tiny", 1, expire=1e-9)
    cache.set("inf", 1, expire=math.inf)
    cache.set("huge", 1, expire=1e300)
    cache.set("huge int", 1, expire=10**400)
    cache.set("none", 1)
    everything = {"int", "float", "tiny", "inf", "huge", "huge int", "none"}
    assert set(cache) == everything
    clock.advance(1e-9)
    assert set(cache) == everything - {"tiny"}
    clock.advance(0.499999998)
    assert "float" in cache
    clock.advance(1e-9)
    assert "float" not in cache
    clock.advance(1.5)
    assert set(cache) == {"inf", "huge", "huge int", "none"}
    clock.advance(5e9)  # 158 years
    assert set(cache) == {"inf", "huge", "huge int", "none"}


def test_expired_is_gone_for_every_method(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    for key in ("a", "b"):
        cache.set(key, b"x", expire=5, tag="t")
    cache.set("large", noise(2 << 20), expire=5, tag="t")
    entry = cache.get_entry("a")
    clock.advance(5)
    assert cache.get("a") is None and cache.get("large") is None
    assert cache.get_many(["a", "b", "large"]) == {}
    assert "a" not in cache
    assert list(cache) == list(cache.entries()) == []
    assert cache.get_entry("a") is None
    assert not cache.touch("a", 5)
    for method in (cache.open, cache.location, cache.__getitem__, cache.__delitem__):
        with pytest.raises(KeyError):
            method("a")
    assert cache.pop("b", 1) == 1
    assert cache.evict("t") == 0
    assert cache.delete_prefix("a") == 0
    assert entry is not None
    with pytest.raises(EntryGone, match="expired"):
        entry.value  # noqa: B018
    stats = cache.stats()
    assert stats.hits == 1 and stats.misses == 10


def test_default_expire(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make(default_expire=10)
    cache["item"] = 1
    cache.set("set", 1)
    cache.set("stream", iter([b"x"]))
    cache.set("longer", 1, expire=20)
    cache.set("forever", 1, expire=math.inf)
    cache.set_many({"many": 1})
    cache.add("add", 1)
    cache.incr("incr")
    cache.set("touched", 1, expire=1)
    cache.touch("touched")
    clock.advance(9.9)
    assert len(list(cache)) == 9
    clock.advance(0.1)
    assert set(cache) == {"longer", "forever"}
    clock.advance(10)
    assert set(cache) == {"forever"}


def test_clock_set_back(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer still wins, nothing is lost, and an entry lives no longer than it should."""
    clock = Clock(monkeypatch)
    cache = make()
    cache.set("k", "old")
    cache.set("brief", "old", expire=3600)
    cache.set("l", 1)
    clock.advance(-86400)
    assert cache["k"] == "old" and "brief" not in cache
    cache.set("k", "new")
    cache.delete("l")
    cache.set("l", 2)
    cache.set("short", 1, expire=10)
    assert cache.get_many(["k", "l", "short"]) == {"k": "new", "l": 2, "short": 1}
    clock.advance(10)
    assert "short" not in cache
    cache.close()
    again = make()
    assert again.get_many(["k", "l"]) == {"k": "new", "l": 2}
    again.set("k", "newest")
    again.pop("l")
    assert again.check() == []
    again.close()
    os.unlink(os.path.join(again.directory, "index"))
    rebuilt = make()
    assert rebuilt["k"] == "newest" and "l" not in rebuilt


def test_clock_set_forward_and_back_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    cache.set("k", 1, expire=60)
    clock.advance(10 * 365 * 86400)
    assert "k" not in cache
    cache.set("future", 1)
    clock.advance(-10 * 365 * 86400)
    assert cache["k"] == 1  # was not removed meanwhile
    for n in range(50):
        cache.set("future", n)
        cache.incr("n")
    assert (cache["future"], cache["n"]) == (49, 50)
    order = [cache.get_entry(key).accessed for key in ("k", "future", "n")]  # type: ignore[union-attr]
    assert order == sorted(order)
