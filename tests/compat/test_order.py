"""The order of insertion, for who looks at it again and again, and for who takes one end after the other."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import in_threads

import yatagarasu_cache.compat.diskcache as dc
from yatagarasu_cache import DiskCache
from yatagarasu_cache.compat.diskcache.entries import Entries

Make = Callable[..., Any]


def popitem(model: OrderedDict[Any, Any], last: bool) -> Any:
    return model.popitem(last) if model else None


@pytest.mark.parametrize("seed", range(4))
def test_like_an_ordered_dict(make: Make, seed: int) -> None:
    """Two caches on the directory, one of which does not know what the other one has done."""
    indexes = [dc.Index.fromcache(make()), dc.Index.fromcache(make())]
    model: OrderedDict[Any, int] = OrderedDict()
    chance = random.Random(seed)
    for number in range(400):
        index, key = chance.choice(indexes), ("k", chance.randrange(30))
        what, last = chance.randrange(9), chance.random() < 0.5
        if what < 4:
            index[key] = model[key] = number
        elif what == 4 and key in model:
            del index[key], model[key]
        elif what == 5 and model:
            assert index.popitem(last) == popitem(model, last)
        elif what == 6 and model:
            assert index.peekitem(last) == list(model.items())[-1 if last else 0]
            assert next(iter(index)) == next(iter(model))
        elif what == 7:
            assert list(index) == list(model)
        elif what == 8:
            assert list(reversed(index)) == list(reversed(model))
    while model:
        assert indexes[0].popitem(seed % 2 == 0) == popitem(model, seed % 2 == 0)
    with pytest.raises(KeyError):
        indexes[1].popitem()


def test_the_first_is_found_without_a_look_at_all(cache: dc.Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(500):
        cache["k", n] = n
    assert next(iter(cache)) == ("k", 0)
    looks: list[int] = []
    row_of = Entries.row_of

    def counted(self: Entries, low: int, high: int) -> Any:
        looks.append(low)
        return row_of(self, low, high)

    monkeypatch.setattr(Entries, "row_of", counted)
    for n in range(100):  # as who keeps a cache small
        cache["new", n] = n
        del cache[next(iter(cache))]
    assert len(looks) <= 300 and next(iter(cache)) == ("k", 100)
    looks.clear()
    for n in range(100):
        assert cache.peekitem() == (("new", 99 - n), 99 - n)
        del cache["new", 99 - n]
    assert len(looks) < 600


def test_an_iteration_is_of_what_was_there(cache: dc.Cache, place: Path) -> None:
    for key in "abc":
        cache[key] = 1
    keys = iter(cache)
    cache["d"] = 1
    assert next(keys) == "a"
    del cache["b"]
    cache["b"] = 2  # at the end
    with DiskCache(place) as plain:
        plain["e"] = 1
    assert list(keys) == ["c"] and list(cache) == ["a", "c", "d", "b", "e"]


def test_threads_iterate_at_once(cache: dc.Cache) -> None:
    for n in range(50):
        cache["there", n] = n

    def work(n: int) -> None:
        for i in range(40):
            cache[n, i] = i
            found = list(cache)
            assert (n, i) in found and [key for key in found if key[0] == "there"] == [("there", k) for k in range(50)]
            if i % 3:
                del cache[n, i]
                assert (n, i) not in list(reversed(cache))

    in_threads(4, work)
