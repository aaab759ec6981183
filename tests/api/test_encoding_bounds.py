"""Encoding takes no more time and memory than what may be stored, whatever a value or key refers to."""

from __future__ import annotations

import decimal
import fractions
import pathlib
import signal
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ormsgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yatagarasu_cache import DiskCache, SerializationError, TypedSerializer, ValueTooLarge
from yatagarasu_cache.codec import MAX_KEY_BYTES, MsgpackSerializer, ValueCodec, bounds, encode_key, msgpack

pytestmark = [pytest.mark.once, pytest.mark.compiled]

MOST = 1 << 20
TEXT = "x" * 100_000
LISTS = ["y"] * 100_000


def doubled(value: Any, once: Callable[[Any], Any], times: int = 60) -> Any:
    """What refers to itself twice, again and again: 2**60 times `value` to whoever writes it out."""
    for _ in range(times):
        value = once(value)
    return value


def itself() -> Any:
    value: list[Any] = ["z" * 1000]
    value.append((value,))
    return value


ENDLESS: dict[str, Any] = {
    "list": doubled(["leaf"], lambda v: [v, v]),
    "dict": doubled({"a": 1}, lambda v: {"a": v, "b": v}),
    "dict, int keys": doubled({1: 1}, lambda v: {1: v, 2: v}),
    "tuple": doubled(("leaf",), lambda v: (v, v)),
    "of nothing": doubled((), lambda v: (v, v)),
    "list in a tuple": (doubled(["leaf"], lambda v: [v, v]),),
    "frozenset": doubled(frozenset(), lambda v: frozenset({(v, 1), (v, 2)}), 40),
    "mixed": doubled({"a"}, lambda v: ({"k": v}, [v])),
    "wide": [LISTS] * 20_000,
    "wide tuple": (tuple(LISTS),) * 20_000,
    "few wide ones": (LISTS,) * 20_000,
    "text": [TEXT] * 20_000,
    "text in a tuple": (TEXT,) * 20_000,
    "bytes": [TEXT.encode()] * 20_000,
    "bytearrays": (bytearray(100_000),) * 20_000,
    "surrogates": ("\ud800" * 100_000,) * 20_000,
    "ints": [1 << 800_000] * 20_000,
}
LONG: dict[str, Any] = {
    "int": 1 << (8 * 30 * MOST), "str": "x" * (30 * MOST), "bytearray": bytearray(30 * MOST),
    "memoryview": memoryview(bytearray(30 * MOST))[::2],
}  # fmt: skip


def peak(work: Callable[[], Any]) -> int:
    """Bytes of memory that `work` had at once, at most."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("most", [MOST, 1 << 28])  # the latter: beyond what is packed before it is measured
@pytest.mark.parametrize("name", ENDLESS)
def test_what_has_no_end_is_refused(name: str, most: int, core: str) -> None:
    def refused() -> None:
        with pytest.raises(ValueTooLarge, match=f"more than {most} bytes .*max_value_size or size_limit"):
            ValueCodec().encode(ENDLESS[name], most)

    if name in ("list", "wide", "text", "few wide ones"):
        assert peak(refused) < 70 << 20  # a list of the content of the widest, beside what is packed by then
    else:
        refused()


@pytest.mark.parametrize("name", LONG)
def test_what_is_long_is_not_copied_first(name: str, core: str) -> None:
    def refused() -> None:
        with pytest.raises(ValueTooLarge, match="max_value_size"):
            ValueCodec().encode(LONG[name], MOST)

    assert peak(refused) < MOST


LONE: dict[str, Any] = {
    "Decimal": decimal.Decimal("7" * 70_000), "Fraction": fractions.Fraction(1 << 600_000, 3), "range": range(1 << 600_000),
    "path": pathlib.PurePosixPath("x" * 70_000), "surrogates": "\ud800" * 70_000, "int": 1 << 600_000,
}  # fmt: skip


@pytest.mark.parametrize("name", LONE)
def test_a_long_scalar_alone_is_stored_or_too_large(tmp_path: Path, name: str, core: str) -> None:
    value = LONE[name]
    for options in ({}, {"serializer": TypedSerializer([])}, {"compression": "lz4"}):
        with DiskCache(tmp_path / f"c{len(str(options))}", **options) as cache:  # type: ignore[arg-type]
            cache.set("k", value, meta=value)
            cache.set_many({"many": value})
            cache.modify("many", lambda old: old)
            entry = cache.get_entry("k")
            assert entry is not None and entry.meta == value
            assert cache["k"] == value and cache["many"] == value
    assert MsgpackSerializer().loads(MsgpackSerializer().dumps(value)) == value
    with DiskCache(tmp_path / "small", max_value_size=60_000) as cache:
        with pytest.raises(ValueTooLarge, match="max_value_size"):
            cache.set("k", value)


DEEP: dict[str, Any] = {
    "itself": itself(), "holds itself": [itself()], "lists": doubled([], lambda v: [v], 50_000),
    "tuples": ([doubled((), lambda v: (v,), 50_000)],),
}  # fmt: skip


@pytest.mark.parametrize("name", DEEP)
def test_what_contains_itself_or_is_very_deep(name: str, core: str) -> None:
    with pytest.raises(SerializationError, match="nested deeper than .* or contains itself"):
        ValueCodec().encode(DEEP[name])


def test_through_the_cache(tmp_path: Path, core: str) -> None:
    """Before anything changes, and for metadata as well."""
    with DiskCache(tmp_path / "c", max_value_size=MOST) as cache:
        cache.set("k", "old")
        before = cache.volume()
        for name in ("list", "tuple"):
            for call in (
                lambda v: cache.set("k", v), lambda v: cache.add("new", v),
                lambda v: cache.set_many({"new": 1, "k": v}), lambda v: cache.set("k", 1, meta=v),
            ):  # fmt: skip
                with pytest.raises(ValueTooLarge, match="max_value_size|keep meta small"):
                    call(ENDLESS[name])
        assert (cache.get("k"), len(cache), cache.volume()) == ("old", 1, before)
        cache.set("k", [b"x" * (MOST - 10)])
        with pytest.raises(ValueTooLarge):
            cache.set("k", [b"x" * MOST])


LONG_KEYS: dict[str, Any] = {
    "more than deep": doubled(("x" * 200,), lambda v: (v, v)), "doubled": doubled(("a" * 100, 1), lambda v: (v, v), 30),
    "text": (TEXT,) * 1_000_000, "short text": ("x" * 60_000,) * 1_000_000, "wide": ((),) * 1_000_000,
    "deep": doubled((), lambda v: (v,), 50_000), "str": "x" * 10**7, "bytes": b"x" * 10**7, "int": 1 << 10**8,
    "not ASCII": "ä" * 40_000,
}  # fmt: skip


@pytest.mark.parametrize("name", LONG_KEYS)
def test_keys(tmp_path: Path, name: str) -> None:
    key = LONG_KEYS[name]

    def refused() -> None:
        for call in (
            cache.get, cache.delete, lambda k: cache.set(k, 1), lambda k: cache.get_many([k, (k,)]),
            lambda k: cache.delete_many([k, (k,)]), lambda k: cache.set_many([(k, 1), ((k,), 2)]),
        ):  # fmt: skip
            with pytest.raises(SerializationError, match=f"{MAX_KEY_BYTES} are allowed|nested deeper"):
                call(key)

    with DiskCache(tmp_path / "c") as cache:
        if name.startswith(("text", "short text", "str")):
            assert peak(refused) < 64 << 20  # the tuple itself has 8 MB
        else:
            refused()


def test_the_longest_keys() -> None:
    for key in ("x" * 65_534, "ä" * 32_767, b"x" * 65_534, 1 << (8 * 65_534 - 2), ("x" * 65_531,), ((),) * 21_844):
        assert 65_533 <= len(encode_key(key)) <= MAX_KEY_BYTES


def test_ctrl_c_while_it_is_encoded() -> None:
    """The compiled core lets signals in; a large value takes as long as it takes."""
    if msgpack._core is None:
        pytest.skip("ormsgpack does not")
    seen = 0

    def handler(*_: Any) -> None:
        nonlocal seen
        seen += 1
        raise KeyboardInterrupt

    def watch(_value: Any, _most: int) -> None:
        signal.raise_signal(signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            msgpack._core.pack([bytes(1 << 20)] * 20, 1 << 30, watch, False)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert seen == 1


@pytest.mark.parametrize("change", ["shrink", "grow", "replace"])
def test_a_value_that_changes_while_it_is_encoded(change: str) -> None:
    """Whoever is let in may do anything to it: it is then looked at anew."""
    if msgpack._core is None:
        pytest.skip("nobody is let in")
    large = [bytes([n]) * (1 << 20) for n in range(20)]
    for value in ([{"a": large}, "end"], {"a": [large], "b": "end"}):
        content: list[bytes] = list(large)

        def watch(value: Any, _most: int, content: list[bytes] = content) -> None:
            if change == "shrink":
                del content[1:]
            elif change == "grow":
                content.append(b"more")
            else:
                content[:] = [b"other"] * len(content)

        whole: Any = [{"a": content}, "end"] if type(value) is list else {"a": [content], "b": "end"}
        packed = msgpack._core.pack(whole, 1 << 30, watch, False)
        assert packed is NotImplemented if change != "replace" else len(ormsgpack.unpackb(packed)) == 2


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
EDGES = [sign * (2**bits) + more for bits in (5, 7, 8, 15, 16, 31, 32, 62) for sign in (1, -1) for more in (-1, 0, 1)]
PLAIN = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | WORDS | st.binary()
    | st.integers(-(2**63), 2**64 - 1) | st.sampled_from(EDGES),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(WORDS, inner, max_size=20),
    max_leaves=40,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(PLAIN)
def test_the_compiled_core_writes_what_ormsgpack_writes(value: Any) -> None:
    if msgpack._core is None:
        pytest.skip("there is no compiled core")
    expected = ormsgpack.packb(value)
    assert msgpack._core.pack(value, 1 << 30, None, False) == expected
    assert msgpack._core.pack(value, len(expected), None, False) == expected
    assert msgpack._core.pack(value, len(expected) - 1, None, False) is None


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 8, 15, 16, 17, 31, 32, 255, 256, 5000, 65_535, 65_536, 70_000])
def test_lengths(length: int) -> None:
    if msgpack._core is None:
        pytest.skip("there is no compiled core")
    for value in ("x" * length, b"x" * length, [None] * length, {str(n): n for n in range(length)}):
        assert msgpack._core.pack(value, 1 << 30, None, False) == ormsgpack.packb(value)
    extension = msgpack._core.pack([(3, bytes(length))], 1 << 30, None, True)
    assert extension == ormsgpack.packb([ormsgpack.Ext(3, bytes(length))])


def test_what_is_not_plain() -> None:
    if msgpack._core is None:
        pytest.skip("there is no compiled core")

    class Text(str):
        __slots__ = ()

    for value in (
        (1,), {1}, {1: 2}, {b"a": 1}, 1 << 64, -(1 << 63) - 1, "\ud800", bytearray(b"x"), memoryview(b"x"),
        Text("x"), {Text("x"): 1}, doubled([], lambda v: [v], 300), 1j, ormsgpack.Ext(1, b"x"),
    ):  # fmt: skip
        assert msgpack._core.pack(value, 1 << 30, None, False) is NotImplemented
        assert msgpack._core.pack([1, value], 1 << 30, None, False) is NotImplemented
    deepest = doubled(1, lambda v: [v], 255)
    assert MsgpackSerializer().loads(msgpack._core.pack(deepest, 1 << 30, None, False)) == deepest


# What grows, and would still be allowed in a cache of many gigabytes

HUGE = 1 << 40
GROWING: dict[str, Any] = {
    "list": doubled(["leaf"], lambda v: [v, v], 27),
    "dict": doubled({"a": 1}, lambda v: {"a": v, "b": v}, 27),
    "dict, int keys": doubled({1: 1}, lambda v: {1: v, 2: v}, 22),
    "tuple": doubled((), lambda v: (v, v), 22),
    "tuple, more": doubled((), lambda v: (v, v), 30),
    "wide tuples": doubled(1, lambda v: (v,) * 100, 5),
    "frozenset": doubled(frozenset(), lambda v: frozenset({(v, 1), (v, 2)}), 22),
    "mixed": doubled({"a"}, lambda v: ({"k": v}, [v]), 22),
    "key": {doubled((), lambda v: (v, v), 20): (), "other": doubled((), lambda v: (v, v), 22)},
    "text": [TEXT] * 20_000,
    "text in a tuple": (TEXT,) * 20_000,
    "text in dicts": [{1: TEXT}] * 20_000,
    "bytes": {"a": [TEXT.encode()] * 20_000},
    "ints": (1 << 800_000,) * 20_000,
}


@pytest.mark.parametrize("name", ["list", "dict", "bytes", "text", "text in a tuple"])
def test_what_grows_is_refused_by_both_cores(name: str, core: str) -> None:
    test_what_grows_out_of_all_proportion_is_refused(name)


@pytest.mark.parametrize("name", GROWING)
def test_what_grows_out_of_all_proportion_is_refused(name: str) -> None:
    """Before it grew, whatever the cache has room for."""

    def refused() -> None:
        with pytest.raises(ValueTooLarge, match="the value refers to the same things again and again, .* 64 times"):
            ValueCodec().encode(GROWING[name], HUGE)

    if name in ("list", "tuple, more", "text", "text in a tuple"):
        assert peak(refused) < 60 << 20  # 16 MiB are packed before anything is measured
    else:
        refused()


def test_that_it_is_long_or_repeats_itself_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "_MUCH", 1 << 16)
    text = ["x" * 600 + str(n) for n in range(1000)]
    for value in (
        text, tuple(text), [("a", 1)] * 30_000, [["row", 1, None]] * 30_000, {n: (n,) for n in range(20_000)},
        [{"name": "x" * 50, "n": n} for n in range(10_000)], ["y" * 500] * 10_000, [1 << 2000] * 10_000,
        [frozenset({n}) for n in range(10_000)], ["x" * 10_000] * 60, [b"x" * (1 << 20)],
    ):  # fmt: skip
        bounds.measure(value, HUGE, bounds.CONTAINER_COST)


# Hashes that are the same

SAME = 2**61 - 1  # ints are hashed modulo this
COLLIDING: dict[str, Callable[[int], Any]] = {
    "ints": lambda n: SAME * n,
    "negative ints": lambda n: -SAME * n - 1,
    "floats": lambda n: 2.0 ** (61 * n % 1000) if n < 17 else SAME * n + 1,
    "tuples": lambda n: (SAME * n, "a"),
    "tuples in tuples": lambda n: ((1, (SAME * n,)), 2),
    "minus one and two": lambda n: tuple([-1 - (n >> bit & 1) for bit in range(15)]),
    "frozensets": lambda n: frozenset({SAME * n, 1}),
    "frozensets in tuples": lambda n: (frozenset({SAME * n, (1, SAME)}),),
    "long ints": lambda n: (1 << 6100) + SAME * n,
}


def members(name: str, number: int) -> list[Any]:
    return [COLLIDING[name](n) for n in range(number)]


def flat(content: list[Any], steps: list[int], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """What a set or dict of `content` would have been encoded as, before it was looked at."""
    monkeypatch.setattr(bounds.Collisions, "too_many", lambda *_: False)
    data = MsgpackSerializer().dumps(tuple(content))
    monkeypatch.undo()
    packed = ormsgpack.unpackb(data, ext_hook=lambda _, content: content)
    parts, found = ormsgpack.unpackb(packed, ext_hook=ormsgpack.Ext)
    found[-3:] = [steps[0], *found[-2:]]
    return ormsgpack.packb(ormsgpack.Ext(0, ormsgpack.packb([parts, [*found, *steps[1:]]])))


def no_building(content: list[Any]) -> frozenset[Any]:
    assert len(content) < 10, "nobody is to begin with it"
    return frozenset(content)


@pytest.mark.parametrize("kind", ["set", "frozenset", "dict"])
@pytest.mark.parametrize("name", COLLIDING)
def test_hashes_that_collide_are_refused_before_anything_is_built(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = {"set": msgpack._SET, "frozenset": msgpack._FROZENSET, "dict": msgpack._DICT}[kind]
    content = members(name, 10_000)
    if kind == "dict":
        content = [part for member in content for part in (member, None)]
    data = flat(content, [step], monkeypatch)
    monkeypatch.setitem(msgpack._BUILDERS, step, no_building)
    with pytest.raises(SerializationError, match="damaged: too many members or keys of the same hash"):
        MsgpackSerializer().loads(data)


def test_many_sets_of_them_are_refused_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them is small enough."""
    content = members("ints", 2000)
    parts, steps = content * 20, [msgpack._SET, 2000, 2000] * 20 + [msgpack._LIST, 0, 20]
    built = 0

    def build(content: list[Any]) -> Any:
        nonlocal built
        built += 1
        return content

    monkeypatch.setitem(msgpack._BUILDERS, msgpack._SET, build)
    with pytest.raises(ValueError, match="of the same hash"):
        msgpack._rebuild(parts, steps, 500_000, msgpack._BUILDERS, bounds.OPENERS)
    assert built == 4


def test_frozensets_that_are_long_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few of them, each of which was looked at by itself and let pass: to compare two is what takes long."""
    inner = [SAME * n for n in range(1, 1001)]
    sets = [frozenset([*inner, SAME * (2000 + n)]) for n in range(8)]
    collisions = bounds.Collisions()
    for one in sets:
        collisions.add(list(one))
    each = collisions.work // 8
    assert not collisions.too_many(0)
    collisions.add([(one, 1) for one in sets])
    assert collisions.work > each * (8 + 8 * 7 // 2) and collisions.too_many(0)
    for _ in range(50):  # nested: work grows, the time to find it out doesn't
        sets = [frozenset({one, SAME}) for one in sets]
    before = collisions.work
    collisions.add(sets)
    assert collisions.work > before


HONEST: dict[str, Any] = {
    "ints": set(range(50_000)), "far apart": {n << 40 for n in range(20_000)}, "random": {n * n * 12345 for n in range(9999)},
    "multiples": {SAME * n for n in range(1, 4000)}, "powers": {2**n for n in range(5000)},
    "floats": {2.0**n for n in range(-1074, 1024)}, "halves": {n / 2 for n in range(10_000)},
    "grid": {(x, y) for x in range(-50, 50) for y in range(-50, 50)}, "signs": {COLLIDING["minus one and two"](n << 5) for n in range(1024)},
    "keys": {SAME * n: (n,) for n in range(2000)}, "texts": {str(n) for n in range(10_000)},
    "sets": {frozenset({n, n + 1}) for n in range(5000)}, "subsets": {frozenset(b for b in range(12) if n >> b & 1) for n in range(4096)},
    "many": [{SAME * n for n in range(m, m + 40)} for m in range(1, 500)], "bytes": {bytes([n]) for n in range(256)},
    "mixed": {1, 2.5, "a", b"a", None, (1, SAME), frozenset(), True + 2, SAME, -SAME},
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_honest_values_are_not_refused(name: str) -> None:
    value = HONEST[name]
    assert MsgpackSerializer().loads(MsgpackSerializer().dumps(value)) == value


WRAPS: list[Callable[[Any], Any]] = [set, lambda v: [frozenset(v)], lambda v: dict.fromkeys(v, 1)]


@pytest.mark.parametrize("wrap", WRAPS)
def test_what_could_not_be_read_is_not_stored(wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same limit on the way in, to the last member."""
    monkeypatch.setattr(bounds, "_COMPARISONS", 5000)
    most = 0
    for number in range(50, 200):
        value = wrap([SAME * n for n in range(number)])
        try:
            data = MsgpackSerializer().dumps(value)
        except SerializationError as error:
            assert "so many members or keys of the same hash" in str(error)
            break
        most = number
        assert MsgpackSerializer().loads(data) == value
    assert 100 < most < 130


def test_it_is_refused_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "_COMPARISONS", 1000)
    value = {SAME * n for n in range(100)}
    with DiskCache(tmp_path / "c") as cache:
        cache.set("k", "old")
        for call in (
            lambda v: cache.set("k", v), lambda v: cache.add("new", v), lambda v: cache.set_many({"k": v}),
            lambda v: cache.set("k", 1, meta=v),
        ):  # fmt: skip
            with pytest.raises(SerializationError, match="of the same hash"):
                call(value)
        assert cache.get("k") == "old" and len(cache) == 1


def test_the_most_that_is_read() -> None:
    value = {SAME * n for n in range(4096)}
    assert len(MsgpackSerializer().loads(MsgpackSerializer().dumps(value))) == 4096
