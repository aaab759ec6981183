"""numpy's arrays and scalars: exact, without a copy too many, and never object dtypes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import ormsgpack
import pytest
from helpers import run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import DEFAULT, damage, round_trip

from yatagarasu_cache import AsyncDiskCache, DiskCache, SerializationError, ValueTooLarge
from yatagarasu_cache.codec import (
    KIND_ARRAY,
    KIND_MSGPACK,
    MsgpackSerializer,
    PickleSerializer,
    ValueCodec,
    bounds,
)

np = pytest.importorskip("numpy")

Make = Callable[..., DiskCache]

STRUCTURED = np.dtype([("a", "<i4"), ("b", ">f8", (2, 3)), ("c", [("d", "S3"), ("e", "<M8[us]")])])
SPACED = np.dtype({"names": ["x", "y"], "formats": ["<f4", "u1"], "offsets": [8, 2], "itemsize": 24})
OVERLAPPING = np.dtype({"names": ["x", "y"], "formats": ["<i4", "<i2"], "offsets": [0, 2]})
TITLED = np.dtype({"names": ["x"], "formats": ["<f4"], "titles": ["the first"]})
ALIGNED = np.dtype([("a", "i1"), ("b", "f8")], align=True)
DTYPES = [
    "?", "i1", "<i2", ">i4", "<i8", "u1", "<u8", "<f2", ">f4", "<f8", "<c8", ">c16", "S5", "<U3", ">U2", "V7", "<M8[ns]", "<M8[25us]",
    ">m8[D]", "<m8", "q", "l", "Q", "L", STRUCTURED, SPACED, OVERLAPPING, TITLED, ALIGNED,
]  # fmt: skip
SHAPES: list[Any] = [(), (0,), (3,), (2, 3), (0, 5), (2, 0, 3), (2, 3, 4), (1,) * 20]


def filled(dtype: Any, shape: Any) -> Any:
    array = np.zeros(shape, dtype)
    if array.nbytes and array.dtype.kind not in "UM" and not array.dtype.names:
        array.reshape(-1).view("u1")[:] = np.arange(array.nbytes, dtype="u1") % (2 if array.dtype.kind == "b" else 250)
    return array


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other) is np.ndarray
    assert one.dtype == other.dtype and one.dtype.char == other.dtype.char and one.dtype.type is other.dtype.type
    assert one.dtype.isalignedstruct == other.dtype.isalignedstruct and one.dtype.fields == other.dtype.fields
    assert one.shape == other.shape
    assert (one == other).all() if one.dtype.names else one.tobytes() == other.tobytes()
    assert (one.flags.c_contiguous, one.flags.f_contiguous) == (other.flags.c_contiguous, other.flags.f_contiguous)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_come_back_exactly(dtype: Any) -> None:
    for shape in SHAPES:
        for order in "CF":
            array = np.asarray(filled(dtype, shape), order=order)
            payload, kind = DEFAULT.encode(array)
            assert kind == KIND_ARRAY and len(payload) == len(bytes(payload))
            back = round_trip(array)
            inside = round_trip({"x": [array, 1], "y": (array,)})
            for found in (back, inside["x"][0], inside["y"][0], MsgpackSerializer().loads(MsgpackSerializer().dumps(array))):
                assert_same(found, array)
                assert found.flags.writeable


def test_what_does_not_lie_together_is_copied() -> None:
    base = np.arange(60).reshape(3, 4, 5)
    for array in (base[::2], base[:, 1], base.transpose(1, 0, 2), base[::-1], np.broadcast_to(np.arange(3), (2, 3)), base[..., None][:, ::3]):
        back = round_trip(array)
        assert (back == array).all() and back.flags.c_contiguous and back.shape == array.shape


def test_the_memory_of_an_array_is_not_copied() -> None:
    array = np.zeros(1 << 20, "u1")
    for value in (array, {"a": 1, "b": array}, [array, array]):
        payload, _ = DEFAULT.encode(value)
        array[:4] = 1, 2, 3, 4
        assert b"\1\2\3\4" in bytes(payload)
        array[:4] = 0


def test_it_lies_on_what_is_given_to_decode() -> None:
    array = np.arange(1000.0)
    payload = bytes(DEFAULT.encode(array)[0])
    own = bytearray(payload)
    on_top = DEFAULT.decode(own, KIND_ARRAY)
    assert on_top.flags.writeable
    on_top[0] = 7
    assert bytes(own[:8]) == np.float64(7).tobytes()
    shown = DEFAULT.decode(memoryview(payload), KIND_ARRAY)
    assert not shown.flags.writeable and np.shares_memory(shown, np.frombuffer(payload, "u1"))
    copied = DEFAULT.decode(payload, KIND_ARRAY)
    assert copied.flags.writeable and not np.shares_memory(copied, shown)
    assert_same(on_top[1:].copy(), array[1:])


SCALARS = [
    np.float32(1.5), np.float64("nan"), np.float16(-0.0), np.int8(-3), np.uint64(2**64 - 1), np.longlong(5), np.ulonglong(5), np.intc(3),
    np.bool_(True), np.complex64(1 - 2j), np.datetime64("2020-01-02T03", "h"), np.datetime64("NaT"), np.timedelta64(3, "ms"),
    np.bytes_(b"x" * 70_000), np.str_("x" * 70_000), np.void(b"x" * 70_000), np.str_("a\0"), np.str_("é\ud800"), np.bytes_(b"a\0\0"), np.str_(""), np.void(b"abc"),
    np.zeros((), STRUCTURED)[()],
]  # fmt: skip


@pytest.mark.parametrize("value", SCALARS, ids=lambda value: f"{type(value).__name__}-{value!r:.40}")
def test_scalars_come_back_exactly(value: Any) -> None:
    for back in (round_trip(value), round_trip([1, {"a": value}])[1]["a"], round_trip((value,))[0]):
        assert type(back) is type(value) and back.dtype == value.dtype
        assert back.tobytes() == value.tobytes()
        if isinstance(value, (str, bytes)):
            assert type(value).__mro__[1].__eq__(back, value) and len(back) == len(value)
    if not isinstance(value, np.void):
        assert type(next(iter(round_trip({value: 1})))) is type(value)
        assert type(next(iter(round_trip({value})))) is type(value)


def test_scalars_with_fields_may_be_keys_if_they_are_read_only() -> None:
    fixed = np.zeros(2, [("a", "<i4"), ("b", "S3")])
    fixed["a"] = 1, 2
    fixed.flags.writeable = False
    value = fixed[1]
    for back in (next(iter(round_trip({value: 1}))), next(iter(round_trip({(value, 1)})))[0], round_trip(value)):
        assert type(back) is np.void and back.dtype == value.dtype and back == value and hash(back) == hash(value)
        assert not back.flags.writeable
    assert round_trip(np.zeros(1, fixed.dtype)[0]).flags.writeable


def test_names_that_msgpack_lacks_are_refused() -> None:
    array = np.zeros(1, [("\ud800", "i4")])
    titled = np.zeros(1, np.dtype({"names": ["x"], "formats": ["<f4"], "titles": ["\udc00"]}))
    for value in (array, [array], array[0], {"a": array[0]}, titled, titled[0]):
        with pytest.raises(SerializationError, match="would not come back as what it is"):
            round_trip(value)


@pytest.mark.parametrize("size", [1024, 400 << 10, 3 << 20])
def test_a_view_stays_read_only(make: Make, core: str, size: int) -> None:
    cache = make(size_limit=1 << 26)
    array = np.arange(size // 8, dtype="f8").reshape(2, -1)
    cache["k"], cache["column"] = array, np.asfortranarray(array)
    for key in ("k", "column"):
        shown = cache.view(key)
        assert_same(shown, cache[key])
        with pytest.raises(ValueError, match="WRITEABLE"):
            shown.flags.writeable = True
        with pytest.raises(ValueError, match="WRITEABLE"):
            shown[:].setflags(write=True)
        assert not shown.flags.writeable


def test_a_dtype_that_was_changed_is_nobody_elses() -> None:
    payload, kind = DEFAULT.encode(np.zeros(2, STRUCTURED))
    first = DEFAULT.decode(bytes(payload), kind)
    first.dtype.names = ("x", "y", "z")
    assert DEFAULT.decode(bytes(payload), kind).dtype.names == ("a", "b", "c")


class Subclass(np.ndarray):
    pass


class Float(np.float64):
    pass


REFUSED = [
    np.array([1, "a"], dtype=object), np.zeros(3, [("a", "O")]), np.ma.masked_array([1]), np.zeros(3).view(Subclass),
    np.rec.array([(1, 2.0)]), np.asarray(np.zeros(1, np.dtype((np.record, [("a", "i4")])))), np.zeros(2, np.longdouble), np.longdouble(1),
    np.zeros(2, np.clongdouble), np.dtype("f8"), Float(1), np.zeros(3, np.dtype("f8", metadata={"a": 1})), np.float64,
    np.zeros((1 << 20,), "V0"),
]  # fmt: skip


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_what_would_not_come_back_is_refused(value: Any) -> None:
    for whole in (value, [value], {"a": (value,)}):
        with pytest.raises(SerializationError, match=r"PickleSerializer\(secret=...\)|without bytes"):
            round_trip(whole)


def test_refusals_say_what_helps() -> None:
    with pytest.raises(SerializationError, match=r"dtype object holds Python objects, .*astype"):
        round_trip(np.array([None]))
    with pytest.raises(SerializationError, match=r"numpy\.asarray\(value\)"):
        round_trip(np.ma.masked_array([1]))
    if hasattr(np.dtypes, "StringDType"):
        with pytest.raises(SerializationError, match="convert it"):
            round_trip(np.array(["a"], dtype=np.dtypes.StringDType()))


@pytest.mark.parametrize("size", [1024, 400 << 10, 3 << 20])  # joined, in pieces, in a file of its own
def test_in_a_cache(make: Make, core: str, size: int) -> None:
    cache = make(size_limit=1 << 26)
    arrays = {"f": np.arange(size // 8, dtype="f8"), "i": np.asfortranarray(np.arange(size // 8, dtype="i8").reshape(2, -1))}
    for key, array in arrays.items():
        cache.set(key, array, expire=60, tag="arrays")
        assert_same(cache[key], array)
        cache[key][0] += 1  # a copy of one's own
        assert_same(cache[key], array)
    cache["sample"] = {"x": arrays["f"], "y": [arrays["i"]], "label": 3}
    assert_same(cache["sample"]["y"][0], arrays["i"])
    assert cache.set_many([("one", arrays["f"]), ("two", arrays["i"])]) == 2
    found = cache.get_many(["one", "two", "none"])
    assert_same(found["one"], arrays["f"])
    assert cache.add("added", arrays["f"]) and not cache.add("added", arrays["i"])
    assert_same(cache.pop("added"), arrays["f"])
    assert_same(cache.get_entry("two").value, arrays["i"])  # type: ignore[union-attr]
    with pytest.raises(TypeError, match="neither bytes nor str"):
        cache.open("one")
    assert not cache.check()


def test_under_asyncio(directory: Any, backend: str) -> None:
    small, middle, large = np.arange(10), np.arange(1 << 16), np.arange(1 << 19)

    async def main() -> None:
        async with AsyncDiskCache(directory, backend=backend) as cache:
            await asyncio.gather(cache.set("s", small), cache.set("l", large), cache.set("d", {"a": large, "b": small}))
            await asyncio.gather(cache.set_many({"m": large, "n": middle}), cache.set("o", middle))
            assert_same(await cache.get("n"), middle)
            assert_same(await cache.get("o"), middle)
            assert_same(await cache.get("s"), small)
            assert_same(await cache.get("l"), large)
            found = await cache.get_many(["d", "m"])
            assert_same(found["d"]["a"], large)
            assert_same(found["m"], large)

    asyncio.run(main())


def test_limits_hold_without_a_copy(directory: Any) -> None:
    array = np.zeros(1 << 20)
    with DiskCache(directory, size_limit=1 << 26, max_value_size=1 << 20) as cache:
        for value in (array, [array], {"a": array}):
            with pytest.raises(ValueTooLarge):
                cache["k"] = value


def test_what_refers_to_an_array_again_and_again_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(bounds, "_MUCH", 1 << 16)
    array = np.zeros(1 << 10)
    round_trip([array] * 60)
    with pytest.raises(ValueTooLarge, match="refers to the same things again and again"):
        DEFAULT.encode([array] * 100)


@pytest.mark.parametrize("size", [400 << 10, 3 << 20])
def test_an_array_that_changes_while_it_is_written_corrupts_nothing(directory: Any, core: str, size: int) -> None:
    """Its writer gets what he wrote, whatever that is, or a miss; others keep their values."""
    import threading

    array, stop = np.zeros(size, "u1"), threading.Event()

    def change() -> None:
        while not stop.is_set():
            array[:] += 1

    thread = threading.Thread(target=change)
    with DiskCache(directory, size_limit=1 << 27) as cache:
        cache["other"] = b"x"
        thread.start()
        try:
            for _ in range(20):
                cache["torn"] = array
                found = cache.get("torn")
                assert found is None or found.shape == array.shape
        finally:
            stop.set()
            thread.join()
        assert cache["other"] == b"x"
        cache["torn"] = array
        assert_same(cache["torn"], array)
        assert not [problem for problem in cache.check() if problem.kind != "corrupt"]


def test_other_serializers_get_arrays() -> None:
    class Own:
        name = "own"

        def dumps(self, value: Any) -> bytes:
            return b"own"

        def loads(self, data: bytes) -> Any:
            return data

    assert round_trip(np.zeros(3), ValueCodec(Own())) == b"own"
    codec = ValueCodec(PickleSerializer(b"secret"))
    payload, flags = codec.encode(np.array([None]), key="k")
    assert codec.decode(bytes(payload), flags, "k")[0] is None
    payload, flags = DEFAULT.encode(np.arange(3))
    assert_same(codec.decode(bytes(payload), flags, "k"), np.arange(3))


def test_numpy_is_loaded_when_an_array_is_read(directory: Any) -> None:
    with DiskCache(directory) as cache:
        cache["k"], cache["in"] = np.arange(3), [np.int8(1)]
    code = """
import sys
from yatagarasu_cache import DiskCache
with DiskCache(sys.argv[1]) as cache:
    cache["plain"] = [1]
    assert "numpy" not in sys.modules
    assert cache["k"].tolist() == [0, 1, 2] and cache["in"] == [1]
"""
    run_python(code, directory)
    code = """
import sys
sys.modules["numpy"] = None
from yatagarasu_cache import DiskCache, SerializationError
with DiskCache(sys.argv[1]) as cache:
    for key in ("k", "in"):
        try:
            cache[key]
        except SerializationError as error:
            assert "pip install numpy" in str(error) and repr(key) in str(error), error
        else:
            raise AssertionError
"""
    run_python(code, directory)


# -- hostile bytes ---------------------------------------------------------------------------------


def payload_of(description: Any, memory: bytes = b"") -> bytes:
    packed = ormsgpack.packb(description)
    return memory + packed + len(packed).to_bytes(4, "little")


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"abc", b"\xff" * 4, b"\xff" * 100, payload_of([]), payload_of(["|O", [1], "C"], bytes(8)), payload_of(["O8", [1], "C"], bytes(8)),
        payload_of(["<f8", [2], "C"], bytes(8)), payload_of(["<f8", [1], "X"], bytes(8)), payload_of(["<f8", [-1], "C"]),
        payload_of(["<f8", [1.0], "C"], bytes(8)), payload_of(["<f8", [True], "C"], bytes(8)), payload_of(["<f8", [1] * 70, "C"], bytes(8)),
        payload_of(["<f8", [2**62, 2**62], "C"]), payload_of(["<f8", [0, 2**62, 2**62], "C"]), payload_of(["|V0", [2**50], "C"]),
        payload_of(["f8,f8", [1], "C"], bytes(16)), payload_of(["(2,)f8", [1], "C"], bytes(16)), payload_of(["<f16", [1], "C"], bytes(16)),
        payload_of([[8, False, [["a", None, 0, "|O8"]]], [1], "C"], bytes(8)), payload_of([[8, False, [["a", None, 4, "<f8"]]], [1], "C"], bytes(8)),
        payload_of([[8, False, [["a", None, 0, "<f4"], ["a", None, 4, "<f4"]]], [1], "C"], bytes(8)),
        payload_of([{"base": "<f8", "shape": [2**62]}, [1], "C"], bytes(8)), payload_of([{"base": "<f8"}, [1], "C"], bytes(8)),
        payload_of([[2**40, False, [["a", None, 0, "<f8"]]], [1], "C"], bytes(8)), payload_of(["<M8[zz]", [1], "C"], bytes(8)),
        payload_of(["|S999999999999", [1], "C"]), payload_of(["|S9999999999", [0], "C"]),
    ],
)  # fmt: skip
def test_hostile_arrays_are_refused(payload: bytes) -> None:
    with pytest.raises(SerializationError):
        DEFAULT.decode(payload, KIND_ARRAY)


@settings(max_examples=300)
@given(st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.sampled_from("CF"), st.booleans(), st.data())
def test_damaged_arrays_are_arrays_or_refused(dtype: Any, shape: Any, order: str, inside: bool, data: st.DataObject) -> None:
    array = np.asarray(filled(dtype, shape), order=order)  # type: ignore[call-overload]
    payload, flags = DEFAULT.encode([array, b"x", (array, 1)] if inside else array)
    damaged = damage(bytes(payload), data)
    for whole in (damaged, bytearray(damaged), memoryview(damaged)):
        try:
            DEFAULT.decode(whole, flags)
        except SerializationError as error:
            assert "stored" in str(error) or "array" in str(error)


@settings(max_examples=200)
@given(st.binary(max_size=60), st.sampled_from([KIND_ARRAY, KIND_MSGPACK]))
def test_any_bytes_are_refused_or_a_value(payload: bytes, kind: int) -> None:
    try:
        DEFAULT.decode(payload, kind)
    except SerializationError:
        assert sys.exc_info()[0] is not MemoryError
