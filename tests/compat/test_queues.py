"""`push`, `pull`, `peek`, and what is made of them: `Deque` and `Index`."""

from __future__ import annotations

import collections
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import in_threads

import yatagarasu_cache.compat.diskcache as dc
from yatagarasu_cache.compat.diskcache import queues

Make = Callable[..., Any]
FIRST = 500_000_000_000_000


def test_ends(cache: dc.Cache) -> None:
    assert [cache.push(n) for n in range(3)] == [FIRST, FIRST + 1, FIRST + 2]
    assert cache.push("first", side="front") == FIRST - 1 and len(cache) == 4
    assert cache.peek() == (FIRST - 1, "first") and cache.peek(side="back") == (FIRST + 2, 2)
    assert cache.pull() == (FIRST - 1, "first") and cache.pull(side="back") == (FIRST + 2, 2)
    assert [cache.pull()[1] for _ in range(3)] == [0, 1, None] and cache.pull() == (None, None)
    assert cache.pull(default=5, expire_time=True, tag=True) == (5, None, None) and cache.peek(default=5) == 5
    assert cache.push("again") == FIRST and len(cache) == 1
    for call in (cache.push, cache.pull, cache.peek):
        with pytest.raises(ValueError, match="side"):
            call("x", side="left") if call == cache.push else call(side="left")


def test_prefixes(cache: dc.Cache) -> None:
    assert cache.push("a", prefix="p", expire=100, tag="t") == f"p-{FIRST}"
    assert cache.push("b", prefix="p") == f"p-{FIRST + 1}" and cache.push("c", prefix="p-q") == f"p-q-{FIRST}"
    assert cache.push("d") == FIRST and cache["p-500000000000001"] == "b"
    (key, value), expires, tag = cache.peek("p", expire_time=True, tag=True)
    assert (key, value, tag) == (f"p-{FIRST}", "a", "t") and expires > time.time()
    assert [cache.pull("p")[1] for _ in range(3)] == ["a", "b", None]
    assert cache.pull("p-q")[1] == "c" and cache.pull()[1] == "d"


def test_what_has_expired_is_passed_over(cache: dc.Cache) -> None:
    for n in range(5):
        cache.push(n, expire=0.01 if n < 3 else None)
    time.sleep(0.05)
    assert cache.peek()[1] == 3 and len(cache) == 2 and cache.pull()[1] == 3
    cache.push(5, expire=0.01)
    time.sleep(0.05)
    assert cache.peek(side="back")[1] == 4 and cache.pull()[1] == 4 and cache.pull() == (None, None)


def test_keys_that_were_stored_otherwise(cache: dc.Cache) -> None:
    """Any whole number is a key of the queue, as in diskcache."""
    cache.push("a")
    cache.add(7, "seven")
    cache[FIRST + 10] = "far"
    cache[5] = "near"
    assert cache.pull() == (5, "near") and cache.pull() == (7, "seven") and cache.pull() == (FIRST, "a")
    assert cache.push("b") == FIRST + 11
    del cache[FIRST + 11]
    assert cache.push("c") == FIRST + 11 and cache.pull() == (FIRST + 10, "far")
    cache["x-500000000000005"] = 1
    assert cache.push(2, "x") == "x-500000000000006" and cache.pull("x")[1] == 1


def test_without_the_hint(cache: dc.Cache, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(10):
        cache.push(n)
    entries = cache._entries
    entries.unhide("queue")
    assert cache.pull()[1] == 0 and cache.push(10) == FIRST + 10
    entries.hide("queue", "nonsense")
    assert make().pull()[1] == 1 and len(cache) == 9
    monkeypatch.setattr(queues, "_STEPS", 2)
    for n in range(FIRST + 2, FIRST + 8):
        del cache[n]
    assert cache.pull()[1] == 8


def test_each_is_pulled_once(make: Make) -> None:
    cache, taken = make(), []
    for n in range(100):
        cache.push(n)

    def pull(_: int) -> None:
        while (item := cache.pull())[0] is not None:
            taken.append(item[1])

    in_threads(4, pull)
    assert sorted(taken) == list(range(100))


# -- Deque -------------------------------------------------------------------------------------


def test_a_deque_is_like_that_of_collections(tmp_path: Path) -> None:
    chance = random.Random(5)
    for maxlen in (None, 5):
        ours, theirs = dc.Deque(directory=tmp_path / str(maxlen), maxlen=maxlen), collections.deque([], maxlen)
        for _ in range(400):
            name = chance.choice(["append", "appendleft", "pop", "popleft", "rotate", "extend", "extendleft", "reverse"])
            args: tuple[Any, ...] = ()
            if name in ("append", "appendleft"):
                args = (chance.randrange(10),)
            elif name == "rotate":
                args = (chance.randrange(-7, 8),)
            elif name.startswith("extend"):
                args = ([chance.randrange(10) for _ in range(chance.randrange(4))],)
            elif name.startswith("pop") and not theirs:
                with pytest.raises(IndexError, match="pop from an empty deque"):
                    getattr(ours, name)()
                continue
            assert getattr(ours, name)(*args) == getattr(theirs, name)(*args)
            assert list(ours) == list(theirs) and len(ours) == len(theirs)
        assert list(reversed(ours)) == list(reversed(theirs))


def test_items_of_a_deque(tmp_path: Path) -> None:
    deque = dc.Deque("abcde", directory=tmp_path / "d")
    assert (deque[0], deque[-1], deque[2], deque.peek(), deque.peekleft()) == ("a", "e", "c", "e", "a")
    deque[1] = "B"
    del deque[-2]
    assert list(deque) == ["a", "B", "c", "e"] and deque[3] == "e" and deque[-3] == "B" and "c" in deque
    for index in (4, -5):
        with pytest.raises(IndexError, match="deque index out of range"):
            deque[index]
    deque.remove("B")
    with pytest.raises(ValueError, match="not in deque"):
        deque.remove("B")
    assert deque == ["a", "c", "e"] and deque != ["a"] and deque < ["b"] and deque >= ["a", "c"]
    assert deque != 5 and deque.count("a") == 1
    with pytest.raises(TypeError):
        deque.rotate("x")  # type: ignore[arg-type]
    deque += "xy"
    copy, back = deque.copy(), pickle.loads(pickle.dumps(deque))
    assert list(copy) == list(back) == list("acexy") and copy.directory == deque.directory
    deque.maxlen = 2
    assert list(deque) == ["x", "y"] == list(copy)
    with deque.transact():
        deque.append(deque.popleft())
    assert list(deque) == ["y", "x"] and repr(deque) == f"Deque(directory={deque.directory!r})"
    deque.clear()
    assert not len(deque)
    for method in (deque.pop, deque.popleft, deque.peek, deque.peekleft):
        with pytest.raises(IndexError):
            method()
    with pytest.raises(TypeError):
        hash(deque)
    assert dc.Deque.fromcache(deque.cache, "ab").cache is deque.cache and list(deque) == ["a", "b"]


# -- Index -------------------------------------------------------------------------------------


def test_an_index_is_like_an_ordered_dict(tmp_path: Path) -> None:
    index = dc.Index(str(tmp_path / "i"), [("b", 1), ("a", 2)], c=3)
    like = collections.OrderedDict([("b", 1), ("a", 2), ("c", 3)])
    assert index == like and list(index.items()) == list(like.items()) and list(reversed(index)) == ["c", "a", "b"]
    assert index == {"a": 2, "b": 1, "c": 3} and index != collections.OrderedDict(a=2, b=1, c=3) and index != {"a": 2}
    assert list(index.keys()) == ["b", "a", "c"] and list(index.values()) == [1, 2, 3] and index["a"] == 2
    assert index.setdefault("a", 5) == 2 and index.setdefault("d") is None and index.pop("d") is None
    assert index.pop("d", 7) == 7 and index.peekitem() == ("c", 3) and index.peekitem(last=False) == ("b", 1)
    with pytest.raises(KeyError):
        index.pop("d")
    with pytest.raises(KeyError):
        del index["d"]
    again = dc.Index(index.directory)
    assert again == index and pickle.loads(pickle.dumps(index)) == index
    assert repr(index) == f"Index({index.directory!r})"
    assert index.popitem() == ("c", 3) and index.popitem(last=False) == ("b", 1) and len(again) == 1
    index.update({"x": [1]}, y=Path("p"))
    assert again["x"] == [1] and again["y"] == Path("p")
    index.clear()
    with pytest.raises(KeyError):
        index.popitem()
    assert index.push("v") == FIRST and index.pull() == (FIRST, "v") and index.cache.eviction_policy == "none"
    calls: list[int] = []
    work = index.memoize()(lambda x: calls.append(x) or x)
    assert work(1) == work(1) == 1 and calls == [1]
    with index.transact():
        index["n"] = 1
    with pytest.raises(TypeError):
        hash(index)
    assert dc.Index.fromcache(index.cache, a=1)["n"] == 1 and dc.Index(a=1)["a"] == 1


@pytest.mark.parametrize("digits", ["²" * 15, "٣" * 15])
def test_keys_with_other_digits_are_of_no_queue(cache: dc.Cache, digits: str) -> None:
    cache[f"q-{digits}"] = 1
    assert cache.incr(f"q-{digits}") == 2 and cache.pull("q") == (None, None)
    assert cache.push(1, "q") == "q-500000000000000" and len(cache) == 2
