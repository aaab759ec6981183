"""`DiskCache`: keys and values, one and many, as a mapping and in groups, on every backend."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import LARGE, SEGMENT, Clock, Make, disk_blocks, named, noise

from yatagarasu_cache import DiskCache, EntryGone, SerializationError, ValueTooLarge

pytestmark = pytest.mark.usefixtures("core")


def same(left: Any, right: Any) -> bool:
    """Equal, and of the same types all the way down."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return repr(left) == repr(right)
    if isinstance(left, dict):
        return same(list(left.items()), list(right.items()))
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


# -- values and keys --------------------------------------------------------------------------

VALUES: list[Any] = [
    b"", b"x", b"\0" * 16, "", "text", "日本語 \U0001f426", 0, 1, -1, 2**63, -(2**63) - 1, 10**60, 0.0, -0.0,
    1.5, math.inf, -math.inf, math.nan, True, False, None, [], (), {}, set(), frozenset(), [1, [2, (3, {4})]],
    {"a": 1, 2: (b"x", "y"), (1, 2): None, None: [True]}, (1, "1", b"1", 1.0, True), {1, "a", b"a"},
    frozenset({(1, 2)}), [b"", "", None, 0, False],
]  # fmt: skip

KEYS: list[Any] = [
    "", "a", "日本語", "a" * 60_000, b"", b"a", b"\0\xff", 0, 1, -1, 2**70, 0.5, 1.0, True, False, None, (),
    ("a",), ("a", "b:c"), ("a:b", "c"), (("a",), "b"), (1, 2.0, None, b"x"), "../../etc/passwd", "/abs",
    "nul\0inside", "\U0001f600" * 15_000,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=named)
def test_value_comes_back_as_it_went_in(cache: DiskCache, value: Any) -> None:
    assert cache.set("k", value) is True
    assert same(cache.get("k", "default"), value)
    assert same(cache.get_many(["k"])["k"], value)
    entry = cache.get_entry("k")
    assert entry is not None
    assert same(entry.value, value)
    assert same(cache.pop("k", "default"), value)
    assert cache.get("k", "default") == "default"


@pytest.mark.parametrize(
    "value", [bytearray(b"abc"), memoryview(b"abc"), memoryview(b"a_b_c")[::2]], ids=named
)
def test_bytes_like_comes_back_as_bytes(cache: DiskCache, value: Any) -> None:
    cache.set("k", value)
    assert same(cache["k"], b"abc")


def test_keys_never_meet(make: Make) -> None:
    cache = make()
    for number, key in enumerate(KEYS):
        cache[key] = number
    assert len(cache) == len(KEYS)
    for number, key in enumerate(KEYS):
        assert cache[key] == number
        assert key in cache
    assert {(type(key), key) for key in cache} == {(type(key), key) for key in KEYS}
    cache.close()
    again = make()
    assert [again[key] for key in KEYS] == list(range(len(KEYS)))
    assert again.check() == []


def test_nothing_is_written_outside_of_the_directory(make: Make, directory: Path) -> None:
    cache = make()
    for key in ("../escape", "/tmp/../escape", "a/b/c", ".."):
        cache.set(key, b"x" * (2 << 20))
        cache.set(key, b"x", tag=key)
    assert os.listdir(directory.parent) == [directory.name]


@pytest.mark.parametrize(
    "length",
    sorted(
        {0, 1, 2, 10 << 20}
        | {16 * n + d for n in (1, 2, 64, 256) for d in (-1, 0, 1)}
        | {
            at + d
            for at in (LARGE, SEGMENT // 2, SEGMENT, 1 << 20)
            for d in (-17, -16, -15, -1, 0, 1, 15, 16, 17)
        }
    ),
)
def test_length(make: Make, directory: Path, length: int) -> None:
    cache = make(size_limit=64 << 20, segment_size=SEGMENT)
    value = noise(length)
    cache.set("before", b"1")
    cache.set("k", value, tag="t")
    cache.set("after", b"2")
    assert len(os.listdir(directory / "large")) == (length >= LARGE)
    for _ in range(2):
        assert cache["k"] == value
        assert cache.get_many(["before", "k", "after"]) == {"before": b"1", "k": value, "after": b"2"}
        with cache.open("k") as file:
            assert file.read() == value
        assert cache.check() == []
        cache.close()
        cache = make(size_limit=64 << 20, segment_size=SEGMENT)
    assert cache.delete("k")
    assert os.listdir(directory / "large") == []
    assert cache.get_many(["before", "k", "after"]) == {"before": b"1", "after": b"2"}


# -- set, get, add, touch, delete, pop --------------------------------------------------------


def test_set_replaces_value_tag_meta_and_expiry(cache: DiskCache) -> None:
    cache.set("k", 1, expire=1000, tag="t", meta={"m": 1})
    cache.set("k", "two")
    entry = cache.get_entry("k")
    assert entry is not None
    assert (entry.value, entry.tag, entry.meta, entry.expires) == ("two", None, None, None)
    assert len(cache) == 1
    assert cache.evict("t") == 0


@pytest.mark.parametrize("before", [10, LARGE - 1, LARGE, 5 * LARGE])
@pytest.mark.parametrize("after", [10, LARGE - 1, LARGE, 5 * LARGE])
def test_replacing_leaves_nothing_behind(make: Make, directory: Path, before: int, after: int) -> None:
    cache = make(size_limit=8 << 20, segment_size=SEGMENT)
    for turn in range(3):
        cache.set("k", noise(before, turn))
        cache.set("k", noise(after, turn + 10))
        assert cache["k"] == noise(after, turn + 10)
        assert len(os.listdir(directory / "large")) == (after >= LARGE)
    assert os.listdir(directory / "tmp") == []
    assert cache.check() == []


def test_get_of_what_is_not_there(cache: DiskCache) -> None:
    default = object()
    assert cache.get("k") is None
    assert cache.get("k", default) is default
    with pytest.raises(KeyError) as caught:
        cache["k"]
    assert caught.value.args == ("k",)


def test_stored_none_is_a_hit(cache: DiskCache) -> None:
    cache["k"] = None
    assert cache.get("k", "default") is None
    assert cache["k"] is None
    assert cache.pop("k", "default") is None
    assert cache.get("k", "default") == "default"


@pytest.mark.parametrize("length", [3, 3 << 20])
def test_add(make: Make, length: int) -> None:
    cache, clock_free = make(), noise(length)
    assert cache.add("k", clock_free, tag="t", meta=1) is True
    assert cache.add("k", b"other") is False
    assert cache.add("k", noise(3 << 20, 1)) is False
    entry = cache.get_entry("k")
    assert entry is not None
    assert (entry.value, entry.tag, entry.meta) == (clock_free, "t", 1)
    assert cache.delete("k")
    assert cache.add("k", b"other") is True
    assert cache["k"] == b"other"
    assert cache.stats().sets == 2
    assert cache.check() == []


def test_add_after_expiry(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    for old, new in ((b"old", noise(2 << 20)), (noise(2 << 20, 1), b"new")):
        cache.set("k", old, expire=10)
        assert cache.add("k", new) is False
        clock.advance(10)
        assert cache.add("k", new) is True
        assert cache["k"] == new
        cache.delete("k")
    assert cache.check() == []


def test_touch(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    assert cache.touch("k", 5) is False
    cache.set("k", b"v", expire=10, tag="t", meta="m")
    clock.advance(9)
    assert cache.touch("k", 10) is True
    clock.advance(9)
    assert cache["k"] == b"v"
    assert cache.touch("k") is True  # no default_expire: for ever
    clock.advance(1e9)
    entry = cache.get_entry("k")
    assert entry is not None
    assert (entry.value, entry.tag, entry.meta, entry.expires) == (b"v", "t", "m", None)
    assert cache.touch("k", 1) is True
    clock.advance(1)
    assert cache.touch("k", 100) is False  # expired is gone
    assert cache.get("k") is None


def test_touch_lasts(make: Make, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """A new time of expiry is in the log: also an index made anew knows it."""
    clock = Clock(monkeypatch)
    cache = make()
    cache.set("longer", 1, expire=10)
    cache.set("shorter", 1, expire=1000)
    cache.set("forever", 1, expire=10)
    cache.set("again", 1)
    cache.touch("longer", 1000)
    cache.touch("shorter", 10)
    cache.touch("forever", math.inf)
    cache.touch("again", 10)
    cache.set("again", 2)
    cache.close()
    (directory / "index").unlink()
    again = make()
    clock.advance(100)
    assert again.get_many(["longer", "shorter", "forever", "again"]) == {
        "longer": 1,
        "forever": 1,
        "again": 2,
    }


def test_delete(cache: DiskCache) -> None:
    assert cache.delete("k") is False
    cache["k"] = 1
    assert cache.delete("k") is True
    assert cache.delete("k") is False
    assert "k" not in cache
    cache["k"] = 2
    del cache["k"]
    with pytest.raises(KeyError):
        del cache["k"]
    assert len(cache) == 0
    assert cache.stats().deletes == 2


def test_delete_of_expired_is_false(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    cache.set_many({"a": 1, "b": 2}, expire=5)
    clock.advance(5)
    assert cache.delete("a") is False
    assert cache.delete_many(["a", "b"]) == 0
    assert cache.pop("b", "gone") == "gone"
    assert len(cache) == 0


def test_pop(cache: DiskCache) -> None:
    cache["k"] = {"a": 1}
    cache["large"] = noise(2 << 20)
    assert cache.pop("k") == {"a": 1}
    assert cache.pop("k") is None
    assert cache.pop("k", 7) == 7
    assert cache.pop("large") == noise(2 << 20)
    assert len(cache) == 0
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.deletes) == (2, 2, 2)


def test_counting(cache: DiskCache) -> None:
    assert cache.incr("n") == 1
    assert cache.incr("n", 41) == 42
    assert cache.decr("n", 2) == 40
    assert cache.decr("m", default=10) == 9
    assert cache.incr("z", 0) == 0
    assert cache.incr("n", 2**80) == 2**80 + 40
    assert cache.decr("n", 2**81) == 40 - 2**80
    assert (cache["n"], cache["m"], cache["z"]) == (40 - 2**80, 9, 0)


def test_counting_keeps_expiry_tag_and_meta(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make(default_expire=1000)
    cache.set("n", 5, expire=10, tag="t", meta={"a": 1})
    assert cache.incr("n") == 6
    entry = cache.get_entry("n")
    assert entry is not None
    assert (entry.value, entry.tag, entry.meta) == (6, "t", {"a": 1})
    clock.advance(10)
    assert cache.get("n") is None
    assert cache.incr("n") == 1  # begins anew, with the default expiry
    clock.advance(999)
    assert cache["n"] == 1
    clock.advance(1)
    assert "n" not in cache


@pytest.mark.parametrize("value", [b"1", "1", 1.0, True, None, [1], noise(2 << 20)], ids=type)
def test_counting_refuses_what_is_no_integer(cache: DiskCache, value: Any) -> None:
    cache["k"] = value
    for count in (cache.incr, cache.decr):
        with pytest.raises(TypeError, match="not an integer"):
            count("k")
    assert same(cache["k"], value)


def test_counting_without_default(cache: DiskCache) -> None:
    for count in (cache.incr, cache.decr):
        with pytest.raises(KeyError):
            count("k", default=None)
    assert len(cache) == 0


# -- many -------------------------------------------------------------------------------------


def test_many(cache: DiskCache) -> None:
    pairs = {f"k{n}": noise(n * 97 % 5000, n) for n in range(500)}
    assert cache.set_many(pairs) == 500
    assert cache.get_many([*pairs, "missing"]) == pairs
    assert cache.get_many(reversed(list(pairs))) == pairs
    assert cache.get_many([]) == {}
    assert cache.set_many({}) == 0
    assert cache.delete_many([]) == 0
    assert cache.delete_many(["k0", "k0", "k1", "missing"]) == 2
    assert len(cache) == 498
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.sets, stats.deletes) == (1000, 1, 500, 2)


def test_many_with_large_values_and_later_ones_winning(make: Make) -> None:
    cache = make(size_limit=32 << 20, segment_size=SEGMENT)
    pairs = [(n % 7, noise((LARGE - 2) + n % 5 * 3000, n)) for n in range(40)]
    assert cache.set_many(iter(pairs), tag="t", meta="m") == 40
    assert cache.get_many(range(7)) == dict(pairs)
    assert all((entry.tag, entry.meta) == ("t", "m") for entry in cache.entries())
    assert cache.delete_many(range(9)) == 7
    assert cache.check() == []


def test_set_many_checks_before_it_stores(cache: DiskCache) -> None:
    with pytest.raises(SerializationError):
        cache.set_many([("a", 1), ("b", object())])
    with pytest.raises(ValueTooLarge):
        cache.set_many([("a", 1)], meta=b"x" * (2 << 20))
    assert len(cache) == 0


def test_set_many_takes_generators(cache: DiskCache) -> None:
    assert cache.set_many((n, n * n) for n in range(10)) == 10
    assert cache.get_many(n for n in range(10)) == {n: n * n for n in range(10)}
    assert cache.delete_many(n for n in range(5)) == 5


# What is no iterable of keys, or of pairs, and what is said of it.
NO_KEYS: list[Any] = ["abc", b"abc", bytearray(b"abc"), memoryview(b"abc"), 5, None]
NO_ITEMS: list[tuple[Any, type[Exception], str]] = [
    *[(value, TypeError, "items must be a mapping or an iterable") for value in NO_KEYS],
    ([1, 2], TypeError, r"items\[0\] must be a \(key, value\) pair, not int"),
    ([("a", 1), "bc"], TypeError, r"items\[1\] .* not str"),
    ([b"ab"], TypeError, r"items\[0\] .* not bytes"),
    ([{"a": 1, "b": 2}], TypeError, r"items\[0\] .* not dict"),
    ([{1, 2}], TypeError, r"items\[0\] .* not set"),
    ([("a", 1), (1, 2, 3)], ValueError, r"items\[1\] .* more than 2"),
    ([("a",)], ValueError, r"items\[0\] .* it has 1 "),
    ([iter(int, 1)], ValueError, r"items\[0\] .* more than 2"),  # without end
]


def _name(value: Any) -> str:
    """Of a parameter, the same in each process."""
    return type(value).__name__ if isinstance(value, memoryview) else str(value)[:20]


@pytest.mark.parametrize("keys", NO_KEYS, ids=_name)
def test_one_key_is_no_iterable_of_keys(cache: DiskCache, keys: Any) -> None:
    cache.set_many(dict.fromkeys("abc", 1))
    for method in (cache.get_many, cache.delete_many):
        with pytest.raises(TypeError, match=r"^keys must be an iterable of keys, not .*write \[key\]$"):
            method(keys)
    assert len(cache) == 3


@pytest.mark.parametrize(("items", "error", "message"), NO_ITEMS, ids=_name)
def test_what_is_no_pair_is_refused(
    cache: DiskCache, items: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cache.set_many(items)
    assert len(cache) == 0


class Rows:
    """A sequence of the old kind, as which rows of tables come."""

    def __init__(self, *rows: Any) -> None:
        self._rows = rows

    def __getitem__(self, at: int) -> Any:
        return self._rows[at]


def test_pairs_and_keys_of_other_kinds(cache: DiskCache) -> None:
    items: Any = Rows(["a", 1], Rows("b", 2), iter(["c", 3]))
    keys: Any = Rows("a", "b", "c")
    assert cache.set_many(items) == 3
    assert cache.get_many(keys) == {"a": 1, "b": 2, "c": 3}
    assert cache.delete_many({"a": 0, "b": 0}) == 2


def test_errors_of_the_callers_pairs_arrive_as_they_are(cache: DiskCache) -> None:
    def broken() -> Iterator[Any]:
        yield "a"
        raise TypeError("mine")

    for call in (lambda: cache.set_many([broken()]), lambda: cache.get_many(broken())):  # type: ignore[list-item]
        with pytest.raises(TypeError, match="^mine$"):
            call()
    assert len(cache) == 0


def test_it_is_no_sequence(cache: DiskCache) -> None:
    cache[0] = "first"
    with pytest.raises(TypeError, match="not reversible"):
        reversed(cache)


# -- entries ----------------------------------------------------------------------------------


def test_get_entry(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    cache.set(("a", 1), b"value", expire=60, tag=("t", 2), meta={"etag": "x"})
    written = clock.now / 1e9
    clock.advance(5)
    entry = cache.get_entry(("a", 1))
    assert entry is not None
    assert (entry.key, entry.tag, entry.meta, entry.size) == (("a", 1), ("t", 2), {"etag": "x"}, 5)
    assert entry.created == pytest.approx(written, abs=1e-3)
    assert entry.expires == pytest.approx(written + 60, abs=1e-3)
    assert entry.accessed == pytest.approx(written, abs=1e-3)
    assert "5 bytes" in repr(entry)
    again = cache.get_entry(("a", 1))
    assert again is not None
    assert again.accessed == pytest.approx(written + 5, abs=1e-3)
    assert cache.get_entry("missing") is None
    stats = cache.stats()
    assert (stats.hits, stats.misses) == (2, 1)


@pytest.mark.parametrize("length", [5, 2 << 20])
def test_entry_loads_when_asked(cache: DiskCache, length: int) -> None:
    cache.set("k", noise(length))
    kept, gone, replaced = (cache.get_entry("k") for _ in range(3))
    assert kept is not None and gone is not None and replaced is not None
    assert kept.value == noise(length)
    cache.set("k", b"new")
    with pytest.raises(EntryGone, match="get it again"):
        replaced.value  # noqa: B018
    cache.delete("k")
    with pytest.raises(KeyError):
        gone.value  # noqa: B018
    assert kept.value == noise(length)  # was loaded before


def test_entries(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    cache.set_many({("a", n): n for n in range(4)}, tag="x")
    cache.set_many({("b", n): n for n in range(4)}, tag="y")
    cache.set(("a", 0), 0, expire=5, tag="y")
    cache.set("text", 1)

    def keys(**chosen: Any) -> set[Any]:
        return {entry.key for entry in cache.entries(**chosen)}

    assert keys() == {"text", *((a, n) for a in "ab" for n in range(4))}
    assert keys(prefix=("a",)) == {("a", n) for n in range(4)}
    assert keys(tag="y") == {("a", 0), *(("b", n) for n in range(4))}
    assert keys(prefix=("a",), tag="y") == {("a", 0)}
    assert keys(prefix="t") == {"text"}
    clock.advance(5)
    assert keys(tag="y") == {("b", n) for n in range(4)}
    assert {entry.value for entry in cache.entries(prefix=("b",))} == set(range(4))


# -- mapping ----------------------------------------------------------------------------------


def test_mapping(cache: DiskCache) -> None:
    assert bool(cache)
    assert len(cache) == 0
    assert list(cache) == list(cache.keys()) == []
    cache["a"], cache["b"], cache[1] = 1, 2, 3
    assert len(cache) == 3
    assert set(cache) == set(cache.keys()) == {"a", "b", 1}
    assert "a" in cache and "c" not in cache and True not in cache
    assert {key: cache[key] for key in cache} == {"a": 1, "b": 2, 1: 3}
    assert bool(cache)
    del cache["a"]
    assert set(cache) == {"b", 1}


def test_iterating_while_changing(make: Make) -> None:
    cache = make(size_limit=4 << 20, segment_size=8 << 10)
    cache.set_many({n: noise(200, n) for n in range(1000)})
    seen = []
    for key in cache:
        seen.append(key)
        cache.delete(key)
        cache[f"new{key}"] = noise(200)
    assert len(seen) == len(set(seen))
    assert set(range(1000)) <= set(seen)


def test_in_and_len_count_nothing(cache: DiskCache) -> None:
    cache["a"] = 1
    assert "a" in cache and "b" not in cache
    assert len(cache) == 1
    list(cache)
    list(cache.entries())
    stats = cache.stats()
    assert (stats.hits, stats.misses) == (0, 0)


# -- groups -----------------------------------------------------------------------------------


def test_evict_by_tag(make: Make) -> None:
    cache = make(size_limit=16 << 20, segment_size=SEGMENT)
    cache.set_many({n: n for n in range(300)}, tag="even")
    cache.set_many({n: n for n in range(1, 300, 2)}, tag="odd")
    cache.set("none", 0)
    cache.set("nulltag", 0, tag=("even",))
    cache.set("large", noise(LARGE), tag="even")
    assert cache.evict("missing") == 0
    assert cache.evict("even") == 151
    assert set(cache) == {"none", "nulltag", *range(1, 300, 2)}
    assert cache.evict("even") == 0
    assert cache.stats().deletes == 151
    assert cache.stats().evictions == 0
    assert cache.check() == []


def test_evict_none_means_no_tag_of_its_own(cache: DiskCache) -> None:
    cache.set("untagged", 1)
    cache.set("b", 1, tag="None")
    assert cache.evict(None) == 0
    assert len(cache) == 2


def test_delete_prefix(cache: DiskCache) -> None:
    keys = [
        "a",
        "ab",
        "abc",
        "b",
        b"ab",
        ("ab",),
        ("a", "b"),
        ("a", "c", 1),
        ("a",),
        ("ab", "c"),
        "日本",
        "日本語",
    ]
    cache.set_many((key, 1) for key in keys)
    assert cache.delete_prefix("ab") == 2
    assert cache.delete_prefix(("a", "b")) == 1
    assert cache.delete_prefix("日本") == 2
    assert set(cache) == {"a", "b", b"ab", ("ab",), ("a", "c", 1), ("a",), ("ab", "c")}
    assert cache.delete_prefix(("a",)) == 2
    assert cache.delete_prefix(b"") == 1
    assert cache.delete_prefix("") == 2
    assert set(cache) == {("ab",), ("ab", "c")}
    assert cache.delete_prefix(()) == 2
    assert len(cache) == 0


def test_purging_a_bucket(make: Make) -> None:
    """The plan's purge: string keys by their beginning, or tuples by their first part."""
    cache = make(size_limit=16 << 20, segment_size=SEGMENT)
    for bucket in ("images", "images-small", "docs"):
        for n in range(200):
            cache.set((bucket, f"{n}.png"), noise(100, n))
            cache.set(f"{bucket}/{n}.png", noise(100, n))
    assert cache.delete_prefix(("images",)) == 200
    assert cache.delete_prefix("images/") == 200
    assert len(cache) == 800
    assert cache.check() == []


def test_expire(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    cache.set_many({n: n for n in range(500)}, expire=10)
    cache.set_many({n: n for n in range(100)}, expire=20)
    cache.set_many({n: n for n in range(500, 510)})
    cache.set("large", noise(2 << 20), expire=10)
    assert cache.expire() == 0
    clock.advance(10)
    assert len(cache) == 511  # not yet removed, and not to be seen
    assert set(cache) == {*range(100), *range(500, 510)}
    assert 250 not in cache
    assert cache.expire() == 401
    assert len(cache) == 110
    clock.advance(10)
    assert cache.expire() == 100
    assert cache.expire() == 0
    stats = cache.stats()
    assert (stats.expirations, stats.evictions, stats.deletes) == (501, 0, 0)
    assert cache.check() == []


def test_clear(make: Make, directory: Path) -> None:
    cache = make(size_limit=16 << 20, segment_size=SEGMENT)
    empty = cache.volume()
    for turn in range(3):
        cache.set_many({n: noise(700, n) for n in range(500)}, tag="t")
        cache.set("large", noise(5 * SEGMENT))
        cache.get(1)
        assert cache.clear() == 501
        assert len(cache) == 0 and list(cache) == [] and cache.get(1) is None
        assert os.listdir(directory / "large") == []
        assert cache.clear() == 0
        assert cache.check() == []
        assert cache.volume() <= empty + 2 * SEGMENT + (128 << 10)  # the log of changes, and the index
        stats = cache.stats()
        assert (stats.hits, stats.misses, stats.evictions, stats.deletes) == (turn + 1, turn + 1, 0, 0)
    cache.set("k", 1)
    cache.close()
    (directory / "index").unlink()
    again = make(size_limit=16 << 20, segment_size=SEGMENT)
    assert list(again) == ["k"]


def test_cull_of_a_small_cache_removes_nothing(cache: DiskCache) -> None:
    cache.set_many({n: n for n in range(100)})
    assert cache.cull() == 0
    assert len(cache) == 100


def test_volume_is_what_the_files_take(make: Make, directory: Path) -> None:
    options = {"size_limit": 16 << 20, "segment_size": SEGMENT}
    cache = make(**options)
    for n in range(400):
        cache.set(n, noise(n * 37 % 20_000, n))
    # Beside what is counted there are the tag, settings, and marks of life: a block each.
    others = 4 * 4096
    assert 0 <= cache.volume() + others - disk_blocks(directory) <= SEGMENT + others
    assert cache.volume() == cache.stats().disk_bytes
    cache.close()
    again = make(read_only=True, **options)
    assert 0 <= disk_blocks(directory) - again.volume() <= others


@pytest.mark.parametrize("durability", ["none", "sync"])
def test_flush_and_durability(make: Make, durability: str) -> None:
    cache = make(durability=durability)
    cache.set_many({n: n for n in range(50)})
    cache.set("large", noise(2 << 20))
    assert cache.flush() is None
    cache.set("k", 1)
    cache.delete(1)
    cache.touch(2, 100)
    cache.incr("n")
    assert cache.add("added", noise(2 << 20))
    cache.evict("t")
    cache.flush()
    cache.clear()
    cache.set("k", 2)
    cache.flush()
    cache.close()
    assert make(durability=durability)["k"] == 2
