"""Compression by setting: what saves room is compressed, what does not is left alone, and all of it is read."""

from __future__ import annotations

import asyncio
import json
import os
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest
from helpers import run_python
from hypothesis import given
from hypothesis import strategies as st
from samples import DEFAULT, canonical, damage, values

from yatagarasu_cache import (
    AsyncDiskCache,
    ConfigurationError,
    DiskCache,
    PickleSerializer,
    SerializationError,
)
from yatagarasu_cache.codec import KIND_BYTES, KIND_COMPRESSED, ValueCodec
from yatagarasu_cache.codec.compression import Compression, decompressed

try:
    import compression.zstd as _  # type: ignore[import-not-found]  # noqa: F401
except ImportError:
    pytest.importorskip("backports.zstd")
pytest.importorskip("lz4.block")

Make = Callable[..., DiskCache]
NAMES = ["zstd", "lz4"]
TEXT = json.dumps([{"id": i, "name": f"user {i}", "tags": ["a", "b"]} for i in range(2000)])
RANDOM = random.Random(1).randbytes(200_000)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def codec(name: str, level: int | None = None, smallest: int = 0, **options: Any) -> ValueCodec:
    return ValueCodec(compression=Compression(name, level, smallest), **options)


COMPRESSIBLE: dict[str, Any] = {
    "bytes": TEXT.encode(), "str": TEXT, "surrogates": TEXT + "\ud800", "msgpack": json.loads(TEXT), "flat": [(i, "x") for i in range(3000)],
    "view": memoryview(TEXT.encode()), "bytearray": bytearray(TEXT.encode()),
}  # fmt: skip


@pytest.mark.parametrize("what", COMPRESSIBLE)
def test_it_takes_less_room_and_comes_back(make: Make, name: str, core: str, what: str) -> None:
    value = COMPRESSIBLE[what]
    cache = make(compression=name)
    cache.set("k", value, expire=60, tag="t", meta={"m": 1})
    cache.set_many({"many": value})
    assert cache.add("added", value) and not cache.add("added", 1)
    entry = cache.get_entry("k")
    assert entry is not None and 0 < entry.size < len(bytes(DEFAULT.encode(value)[0])) / 1.5
    found = [cache["k"], cache["many"], cache.get_many(["added"])["added"], entry.value, cache.pop("added")]
    expected = DEFAULT.decode(bytes(DEFAULT.encode(value)[0]), DEFAULT.encode(value)[1])
    assert all(canonical(one) == canonical(expected) for one in found)
    with make(cache.directory) as plain:  # whose own setting does not matter
        assert canonical(plain["k"]) == canonical(expected)
        plain["k"] = value
        assert plain.get_entry("k").size == len(bytes(DEFAULT.encode(value)[0]))  # type: ignore[union-attr]
    assert canonical(cache["k"]) == canonical(expected) and not cache.check()


def test_arrays_too(make: Make, name: str) -> None:
    np = pytest.importorskip("numpy")
    cache = make(compression=name, size_limit=1 << 27)
    array = np.asfortranarray(np.zeros((1000, 500)))
    cache["k"], cache["in"] = array, {"x": array}
    for back in (cache["k"], cache["in"]["x"]):
        assert (back == array).all() and back.flags.writeable and back.flags.f_contiguous
    assert cache.get_entry("k").size < array.nbytes / 50  # type: ignore[union-attr]
    view = cache.view("k")
    assert (view == array).all() and not view.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        view.flags.writeable = True


def test_signed_pickles_too(make: Make, name: str) -> None:
    cache = make(compression=name, serializer=PickleSerializer(b"secret"))
    cache["k"] = [1j] * 5000
    assert cache["k"] == [1j] * 5000 and cache.get_entry("k").size < 500  # type: ignore[union-attr]
    found = cache._store.reading.fetch(*cache._desk.identify("k"))
    cache._desk.put(cache._desk.encode_key("other"), found.payload, found.flags)
    with pytest.raises(SerializationError, match="'other'.*signature of a stored pickle is wrong"):
        cache["other"]
    assert cache["k"] == [1j] * 5000


def test_what_does_not_save_is_left_alone(name: str) -> None:
    values_ = codec(name)
    for value in (RANDOM, RANDOM[:100], b"", 5, 1.5, None, True, os.urandom(9000), 2**10_000, RANDOM + TEXT.encode()[:1000]):
        payload, flags = values_.encode(value)
        assert (bytes(payload), flags) == (bytes(DEFAULT.encode(value)[0]), DEFAULT.encode(value)[1])
    assert values_.encode(bytes(100))[1] == KIND_COMPRESSED  # short, but it saves


def test_incompressible_data_is_recognised_by_a_sample(name: str, monkeypatch: Any) -> None:
    compression = Compression(name, None, 0)
    lengths: list[int] = []
    compress = Compression._compress
    monkeypatch.setattr(Compression, "_compress", lambda self, data, level: lengths.append(len(data)) or compress(self, data, level))
    assert compression.tried(RANDOM, KIND_BYTES) is None
    assert sum(lengths) < 10_000
    assert compression.tried(bytes(200_000), KIND_BYTES) is not None


def test_what_is_short_is_left_alone(make: Make, name: str) -> None:
    cache = make(compression=name)
    cache["short"], cache["long"] = b"x" * 1023, b"x" * 1024
    assert cache.get_entry("short").size == 1023  # type: ignore[union-attr]
    assert cache.get_entry("long").size < 100  # type: ignore[union-attr]
    with make(cache.directory, compression=name, compression_min_size=2000) as other:
        other["long"] = b"x" * 1024
        assert other.get_entry("long").size == 1024  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "levels"), [("zstd", range(1, 23)), ("lz4", range(1, 13))])
def test_levels(name: str, levels: range) -> None:
    data = TEXT.encode()[:20_000]
    for level in levels:
        payload, flags = codec(name, level).encode(data)
        assert flags == KIND_COMPRESSED and DEFAULT.decode(bytes(payload), flags) == data


def test_streams_are_not_compressed(make: Make, name: str) -> None:
    cache = make(compression=name, size_limit=1 << 26)
    for size in (10, 300):
        cache.set("s", iter([bytes(10_000)] * size))
        assert cache.get_entry("s").size == size * 10_000  # type: ignore[union-attr]


def test_files_of_compressed_values(make: Make, name: str) -> None:
    cache = make(compression=name)
    cache["k"], cache["text"], cache["list"] = TEXT.encode(), TEXT, json.loads(TEXT)
    for key in ("k", "text"):
        with pytest.raises(TypeError, match=r"compressed: read it with get\(\), or open\(\)"):
            cache.location(key)
        with cache.open(key) as file:
            assert file.seekable() and file.read(10) == TEXT[:10].encode()
            assert file.seek(-10, 2) and file.read() == TEXT[-10:].encode()
            with pytest.raises(OSError):
                file.write(b"x")
    with pytest.raises(TypeError, match=r"neither bytes nor str: read it with get\(\)"):
        cache.open("list")


def test_large_ones(make: Make, name: str, core: str) -> None:
    cache = make(compression=name, size_limit=1 << 27)
    value = TEXT.encode() * 100 + RANDOM * 10
    cache["k"] = value
    assert cache["k"] == value and cache.open("k").read() == value


def test_under_asyncio(directory: Any, name: str) -> None:
    async def main() -> None:
        async with AsyncDiskCache(directory, compression=name) as cache:
            await asyncio.gather(*(cache.set(i, TEXT + str(i)) for i in range(20)))
            assert await cache.get(3) == TEXT + "3" and len(await cache.get_many(range(20))) == 20
            assert (await cache.get_entry(3)).size < len(TEXT) / 2  # type: ignore[union-attr]
            async with await cache.open(3) as file:
                assert await file.read(5) == TEXT[:5].encode()
            with pytest.raises(TypeError, match="compressed"):
                await cache.location(3)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"compression": "gzip"}, "compression is"), ({"compression": True}, "compression is"), ({"compression_level": 3}, "without compression"),
        ({"compression": "lz4", "compression_level": 13}, "at most 12 with lz4"), ({"compression": "zstd", "compression_level": 23}, "1 to 22"),
        ({"compression": "zstd", "compression_level": 0}, "compression_level is"), ({"compression": "zstd", "compression_min_size": -1}, "compression_min_size"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(directory: Any, options: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigurationError, match=what):
        DiskCache(directory, **options)


def test_a_library_that_is_not_there_is_told_of(make: Make, name: str) -> None:
    with make(compression=name) as cache:
        cache["k"], cache["plain"] = TEXT, b"x"
    code = """
import sys
for module in ("compression.zstd", "backports.zstd", "lz4", "lz4.block"):
    sys.modules[module] = None
from yatagarasu_cache import ConfigurationError, DiskCache, SerializationError
with DiskCache(sys.argv[1]) as cache:
    assert cache["plain"] == b"x"
    for read in (lambda: cache["k"], lambda: cache.open("k")):
        try:
            read()
        except SerializationError as error:
            assert "'k'" in str(error) and "yatagarasu_cache[compression]" in str(error)
        else:
            raise AssertionError
with DiskCache(sys.argv[1], on_unreadable="miss") as cache:
    assert cache.get("k", 5) == 5 and cache.stats().unreadable == 1
    try:
        cache.open("k")
    except KeyError:
        pass
    else:
        raise AssertionError
try:
    DiskCache(sys.argv[1], compression=sys.argv[2])
except ConfigurationError as error:
    assert sys.argv[2] in str(error) and "yatagarasu_cache[compression]" in str(error)
else:
    raise AssertionError
"""
    run_python(code, cache.directory, name)


# -- hostile bytes ---------------------------------------------------------------------------------


@given(values, st.sampled_from(NAMES), st.data())
def test_damage_is_noticed_or_gives_a_value(value: Any, name: str, data: st.DataObject) -> None:
    payload, flags = codec(name).encode([value, "x" * 200])
    assert flags == KIND_COMPRESSED
    try:
        DEFAULT.decode(damage(bytes(payload), data), flags)
    except SerializationError as error:
        assert "stored" in str(error)


@given(st.binary(max_size=80))
def test_any_bytes_are_a_value_or_refused(payload: bytes) -> None:
    for head in (b"", b"\1\0", b"\2\0", b"\1\0" + struct.pack("<Q", 5)):
        try:
            DEFAULT.decode(head + payload, KIND_COMPRESSED)
        except SerializationError as error:
            assert "stored" in str(error)


def test_the_length_is_what_comes_out(name: str) -> None:
    """Nothing longer than was said is ever made, and no memory asked for that so few bytes can't fill."""
    payload = bytes(codec(name).encode(bytes(5_000_000))[0])
    head, rest = struct.Struct("<BBQ"), payload[10:]
    number, kind, length = head.unpack_from(payload)
    assert (kind, length) == (KIND_BYTES, 5_000_000)
    for lie in (0, 1, length - 1, length + 1, 2**40, 2**63, 2**64 - 1):
        with pytest.raises(SerializationError, match="damaged"):
            DEFAULT.decode(head.pack(number, kind, lie) + rest, KIND_COMPRESSED)
    for inner in (KIND_COMPRESSED, 2, 4, 200):
        with pytest.raises(SerializationError, match="impossible kind"):
            DEFAULT.decode(head.pack(number, inner, length) + rest, KIND_COMPRESSED)
    with pytest.raises(SerializationError, match="unknown algorithm"):
        DEFAULT.decode(head.pack(9, kind, length) + rest, KIND_COMPRESSED)
    for wrong in (payload + b"x", payload[:-1], payload[:10]):
        with pytest.raises(SerializationError):
            DEFAULT.decode(wrong, KIND_COMPRESSED)
    assert decompressed(payload) == (bytes(5_000_000), KIND_BYTES)
