"""Values of the standard library: they come back as they were, wherever they are, and hostile bytes are refused."""

from __future__ import annotations

import collections
import datetime as dt
import decimal
import fractions
import ipaddress
import math
import pathlib
import pickle
import subprocess
import sys
import uuid
import zoneinfo
from typing import Any

import ormsgpack
import pytest
from helpers import run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import DEFAULT, canonical, damage, ext, round_trip, values

from yatagarasu_cache import AsyncDiskCache, DiskCache, MsgpackSerializer, SerializationError
from yatagarasu_cache.codec import KIND_MSGPACK
from yatagarasu_cache.codec.scalars import FIRST_SCALAR, LOADERS

ZONES = ["UTC", "Europe/Berlin", "America/Argentina/Buenos_Aires", "Etc/GMT+3"]


def exact(value: Any) -> Any:
    """Equal for two values exactly when they are the same in all that can be seen of them."""
    kind = type(value)
    if kind in (dt.datetime, dt.time):
        return kind, value.replace(tzinfo=None), value.fold, exact(value.tzinfo)
    if kind is dt.timezone:
        return kind, value.__getinitargs__()
    if kind is zoneinfo.ZoneInfo:
        return kind, value.key
    if kind is complex:
        return kind, canonical(value.real), canonical(value.imag)
    if kind is decimal.Decimal:
        return kind, value.as_tuple()
    if kind is range:
        return kind, value.start, value.stop, value.step
    if kind is fractions.Fraction:
        return kind, value.numerator, value.denominator
    if kind is uuid.UUID:
        return kind, value.bytes, value.is_safe
    if isinstance(value, pathlib.PurePath):
        return kind, str(value), value.parts
    if kind is collections.OrderedDict:
        return kind, [(exact(one), exact(other)) for one, other in value.items()]
    if kind in (list, tuple):
        return kind, [exact(item) for item in value]
    if kind in (set, frozenset):
        return kind, sorted(map(repr, map(exact, value)))
    if kind is dict:
        return kind, [(exact(key), exact(item)) for key, item in value.items()]
    return canonical(value)


offsets = st.timedeltas(dt.timedelta(hours=-23, minutes=-59, microseconds=-3), dt.timedelta(hours=23, minutes=59))
timezones = st.builds(dt.timezone, offsets) | st.builds(dt.timezone, offsets, st.text(max_size=5)) | st.just(dt.timezone.utc)
zones = st.none() | timezones | st.sampled_from(ZONES).map(zoneinfo.ZoneInfo)
decimals = st.decimals() | st.sampled_from(
    [decimal.Decimal(text) for text in ("-0", "0E-20", "1E+999999", "sNaN", "-sNaN12", "-NaN", "NaN345", "Infinity", "-Infinity",
                                        "1.10", "123456789" * 40, "-1E-999999")]
)  # fmt: skip
addresses = st.one_of(
    st.ip_addresses(),
    st.ip_addresses(v=4).map(ipaddress.IPv4Interface),
    st.builds(lambda address, bits: ipaddress.ip_network((address, bits), strict=False), st.ip_addresses(v=4), st.integers(0, 32)),
    st.builds(lambda address, bits: ipaddress.ip_network((address, bits), strict=False), st.ip_addresses(v=6), st.integers(0, 128)),
    st.sampled_from([ipaddress.ip_address("fe80::1%eth0"), ipaddress.ip_interface("fe80::2%3/64"), ipaddress.ip_interface("::1/7")]),
)  # fmt: skip
path_texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
paths = st.builds(lambda kind, text: kind(text), st.sampled_from([pathlib.PurePosixPath, pathlib.Path]), path_texts)
scalars = st.one_of(
    st.datetimes(timezones=zones, allow_imaginary=True), st.dates(), st.times(timezones=st.none() | timezones), st.timedeltas(),
    timezones, st.sampled_from(ZONES).map(zoneinfo.ZoneInfo), decimals, st.fractions(), st.uuids(), st.complex_numbers(),
    st.builds(range, st.integers(), st.integers(), st.integers().filter(bool)), paths, addresses, st.just(...),
)  # fmt: skip


def is_hashable(value: Any) -> bool:
    return not (isinstance(value, decimal.Decimal) and value.is_snan())


@settings(max_examples=300)
@given(scalars)
def test_it_comes_back_wherever_it_is(value: Any) -> None:
    around: list[Any] = [value, [value], (1, value), {"a": [value, b"x"]}, collections.OrderedDict([("z", value), ("a", 1)])]
    if is_hashable(value):
        around += [{value}, frozenset({value, "other"}), {value: 1}, {(1, value): value}, [{1: {value}}]]
    for whole in around:
        assert exact(round_trip(whole)) == exact(whole)
        assert exact(MsgpackSerializer().loads(MsgpackSerializer().dumps(whole))) == exact(whole)


@given(values, scalars)
def test_among_others(value: Any, scalar: Any) -> None:
    whole = [value, {"a": scalar}, value, scalar]
    assert exact(round_trip(whole)) == exact(whole)


WINDOWS = ["c:\\x\\y", "c:x", "\\\\host\\share\\x", "a/b", ".", "..\\x", "con", "c:\\", "", "\ud800"]


@pytest.mark.parametrize("text", WINDOWS)
def test_windows_paths(text: str) -> None:
    path = pathlib.PureWindowsPath(text)
    assert exact(round_trip([path])) == exact([path])


@pytest.mark.parametrize("text", ["//a", "/", "a//b/./c/", "\ud800\udcff", "~", "a\0b"])
def test_posix_paths(text: str) -> None:
    assert exact(round_trip(pathlib.PurePosixPath(text))) == exact(pathlib.PurePosixPath(text))


def test_a_path_of_another_system_is_told_of() -> None:
    other = "W" if sys.platform != "win32" else "P"
    tag = next(tag for tag, load in LOADERS.items() if "path" in load.__name__)
    with pytest.raises(SerializationError, match="Path cannot be made on this system: store a pure path"):
        DEFAULT.decode(ext(tag, other.encode() + b"a"), KIND_MSGPACK)


def test_ordered_dicts_keep_their_order_and_type() -> None:
    value = collections.OrderedDict([(2, "b"), (1, "a"), ("x", collections.OrderedDict())])
    back = round_trip({"in": [value]})["in"][0]
    assert type(back) is collections.OrderedDict and list(back) == [2, 1, "x"]
    back.move_to_end(2)
    assert type(round_trip(value)["x"]) is collections.OrderedDict
    value.attribute = 1  # type: ignore[attr-defined]
    with pytest.raises(SerializationError, match="without them"):
        round_trip(value)


def test_a_zone_from_a_file_of_its_own_is_refused() -> None:
    with open(f"{zoneinfo.TZPATH[0]}/Europe/Berlin", "rb") if zoneinfo.TZPATH else pytest.skip("no zones") as file:  # type: ignore[attr-defined]
        zone = zoneinfo.ZoneInfo.from_file(file, key="Europe/Berlin")
    for value in (zone, dt.datetime(2020, 1, 1, tzinfo=zone)):
        with pytest.raises(SerializationError, match="read from a file of its own"):
            round_trip(value)
    apart = zoneinfo.ZoneInfo.no_cache("Europe/Berlin")
    assert round_trip(apart).key == "Europe/Berlin"


def test_two_zones_of_one_key_are_refused_where_they_would_become_one() -> None:
    berlin, apart = zoneinfo.ZoneInfo("Europe/Berlin"), zoneinfo.ZoneInfo.no_cache("Europe/Berlin")
    values: list[Any] = [{berlin: 1, apart: 2}, {berlin, apart}, {(1, berlin), (1, apart)}, [berlin, apart]]
    for value in values:
        with pytest.raises(SerializationError, match="two time zones Europe/Berlin in it that are not the same"):
            round_trip(value)
    assert round_trip([{berlin: 1}, {berlin: 2, zoneinfo.ZoneInfo("UTC"): 3}]) == [{berlin: 1}, {berlin: 2, zoneinfo.ZoneInfo("UTC"): 3}]


def test_zones_of_pydantic(directory: Any) -> None:
    """Those of the times that it has parsed."""
    core = pytest.importorskip("pydantic_core")
    east = core.TzInfo(7200)
    moments = [dt.datetime(2026, 1, 2, tzinfo=east), dt.datetime(2026, 7, 2, 1, fold=1, tzinfo=core.TzInfo(-12345)), dt.time(3, tzinfo=east)]
    for whole in (*moments, moments, {"a": (moments[0], 1)}, {moments[0]: 1}, east, [east]):
        back = round_trip(whole)
        assert back == whole and repr(back) == repr(whole)
    assert type(round_trip(moments[0]).tzinfo) is core.TzInfo and type(round_trip(east)) is core.TzInfo
    tag = next(tag for tag, load in LOADERS.items() if "tzinfo" in load.__name__)
    for data in (b"", b"123", b"12345", (86400).to_bytes(4, "little"), b"\xff" * 3 + b"\x7f"):
        with pytest.raises(SerializationError, match="damaged"):
            DEFAULT.decode(ext(tag, data), KIND_MSGPACK)
    with DiskCache(directory) as cache:
        cache["k"] = moments
    code = """
import sys
sys.modules["pydantic_core"] = None
from yatagarasu_cache import DiskCache, SerializationError
with DiskCache(sys.argv[1]) as cache:
    try:
        cache["k"]
    except SerializationError as error:
        assert "pip install pydantic" in str(error), error
    else:
        raise AssertionError
"""
    run_python(code, directory)


def test_a_uuid_keeps_whether_it_is_safe() -> None:
    """At no cost where that is not known."""
    for safe in uuid.SafeUUID:
        value = uuid.UUID(int=7, is_safe=safe)
        for whole in (value, [value], {value: 1}):
            assert exact(round_trip(whole)) == exact(whole)
        assert round_trip(value).is_safe is safe
    sizes = {safe.name: len(DEFAULT.encode(uuid.UUID(int=7, is_safe=safe))[0]) for safe in uuid.SafeUUID}
    assert sizes["unknown"] == 18 and sizes["safe"] == sizes["unsafe"] == 20


MAPPED = ["::ffff:1.2.3.4", "::ffff:0:0", "::1.2.3.4"]


def test_addresses_are_stored_as_their_bits() -> None:
    """Some have another text in other releases of Python."""
    for text in MAPPED:
        address = ipaddress.IPv6Address(text)
        for value in (address, ipaddress.ip_interface(f"{text}/96"), ipaddress.ip_network(f"{text}/128")):
            assert address.packed in bytes(DEFAULT.encode(value)[0]) and exact(round_trip(value)) == exact(value)
    for value in (
        ipaddress.ip_network("fe80::%3/64"), ipaddress.ip_interface("fe80::2%eth0/0"), ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_interface("1.2.3.4/24"),
    ):  # fmt: skip
        back = round_trip([value])[0]
        assert type(back) is type(value) and back == value and str(back) == str(value) and repr(back) == repr(value)


def test_long_fractions_are_refused_before_they_take_long() -> None:
    assert round_trip(fractions.Fraction(10**50_000, 3)) == fractions.Fraction(10**50_000, 3)
    with pytest.raises(SerializationError, match="takes too long to read: store the two numbers"):
        round_trip(fractions.Fraction(3**50_000, 2**50_000))


def test_the_same_in_a_cache(directory: Any) -> None:
    value = {"at": dt.datetime(2026, 1, 2, tzinfo=dt.timezone.utc), "price": decimal.Decimal("1.10")}
    with DiskCache(directory) as cache:
        cache["a"], cache["b"] = value, uuid.UUID(int=7)
        assert cache.get_many(["a", "b"]) == {"a": value, "b": uuid.UUID(int=7)}
        assert cache.pop("b") == uuid.UUID(int=7)
    import asyncio

    async def read() -> Any:
        async with AsyncDiskCache(directory) as cache:
            await cache.set("c", value)
            return await cache.get("a"), await cache.get("c")

    assert asyncio.run(read()) == (value, value)


def test_modules_are_loaded_for_values_of_theirs_alone() -> None:
    code = """
import sys, tempfile, urllib.parse
before = set(sys.modules)  # some Pythons load ipaddress for urllib, which pathlib asks for
from yatagarasu_cache import DiskCache
with DiskCache(tempfile.mkdtemp() + "/c") as cache:
    cache["k"] = {"a": (1, 2)}
    assert cache["k"] == {"a": (1, 2)}
    print(*{"decimal", "fractions", "ipaddress", "zoneinfo", "numpy", "pydantic", "lz4"} & (sys.modules.keys() - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split()


# -- hostile bytes ---------------------------------------------------------------------------------


@settings(max_examples=500)
@given(st.sampled_from(sorted(LOADERS)), st.binary(max_size=40))
def test_any_bytes_are_a_value_or_refused(tag: int, data: bytes) -> None:
    for payload in (ext(tag, data), ext(0, ormsgpack.packb([[ormsgpack.Ext(tag, data)], [1, 1, 1]]))):
        try:
            value = DEFAULT.decode(payload, KIND_MSGPACK)
        except SerializationError as error:
            assert "stored" in str(error)
        else:
            assert exact(round_trip(value)) == exact(value)


@settings(max_examples=500)
@given(st.lists(scalars, min_size=1, max_size=3), st.data())
def test_damage_is_noticed_or_gives_a_value(content: list[Any], data: st.DataObject) -> None:
    payload, flags = DEFAULT.encode(content)
    try:
        value = DEFAULT.decode(damage(bytes(payload), data), flags)
    except SerializationError as error:
        assert "stored" in str(error)
    else:
        round_trip(value)


def encoded_as(value: Any, *, instead: bytes) -> bytes:
    """The payload of a scalar with other bytes in it."""
    payload = ormsgpack.unpackb(bytes(DEFAULT.encode(value)[0]), ext_hook=lambda tag, _: tag)
    return ext(payload, instead)


@pytest.mark.parametrize("key", ["../../etc/passwd", "/etc/localtime", "a..b", ".", "..", "Europe", "x" * 300, "A/../UTC", "", "No/Such", "a b"])
def test_zones_are_not_looked_for_elsewhere(key: str) -> None:
    with pytest.raises(SerializationError, match="impossible name|not known on this system"):
        DEFAULT.decode(encoded_as(zoneinfo.ZoneInfo("UTC"), instead=key.encode()), KIND_MSGPACK)


@pytest.mark.parametrize(
    ("value", "data"),
    [
        (decimal.Decimal(1), b"1_0"), (decimal.Decimal(1), b" 1"), (decimal.Decimal(1), b"1e5"), (decimal.Decimal(1), b""),
        (decimal.Decimal(1), b"1E+99999999999999999999"), (fractions.Fraction(1), b"\1\0\0\0\1\1\0\0\0\0"),
        (fractions.Fraction(1), b"\1\0\0\0\2\1\0\0\0\4"), (fractions.Fraction(1), b"\1\0\0\0\2\1\0\0\0\xff"),
        (fractions.Fraction(1), b"\xff\xff\xff\xff"), (range(3), b"\1\0\0\0\1" * 2 + b"\1\0\0\0\0"), (uuid.UUID(int=1), b"1"),
        (dt.timedelta(1), b"\0" * 4 + b"\xff" * 8), (dt.timezone.utc, b"\0" * 12 + b"x"), (dt.date(1, 1, 1), b"\0" * 4),
        (ipaddress.ip_address("::1"), b"6::0001"), (ipaddress.ip_address("::1"), b"x1"),
        (ipaddress.ip_address("::1"), b"6" + bytes(15)), (ipaddress.ip_address("::1"), b"6" + bytes(16) + b"a%b"), (ipaddress.ip_address("::1"), b"I" + bytes(16)),
        (ipaddress.ip_address("::1"), b"N" + bytes(15) + b"\1\x40"), (ipaddress.ip_address("::1"), b"I" + bytes(16) + b"\x81"),
        (ipaddress.ip_address("::1"), b"6" + bytes(16) + b"a/1"), (ipaddress.ip_address("1.2.3.4"), b"41.2.3.4"), (ipaddress.ip_address("1.2.3.4"), b"i\1\2\3\4\x21"),
        (uuid.UUID(int=1), bytes(17)), (uuid.UUID(int=1), bytes(16) + b"ss"), (pathlib.PurePosixPath("a"), b"pa//b"),
        (..., b"x"), (1j, b"1"),
    ],
)  # fmt: skip
def test_what_no_value_is_encoded_as(value: Any, data: bytes) -> None:
    with pytest.raises(SerializationError, match="damaged"):
        DEFAULT.decode(encoded_as(value, instead=data), KIND_MSGPACK)


def test_decimals_do_not_depend_on_the_context() -> None:
    with decimal.localcontext() as context:
        context.prec, context.Emax = 3, 5
        for trap in context.traps:
            context.traps[trap] = False
        assert str(round_trip(decimal.Decimal("1.23456789E+50"))) == "1.23456789E+50"
        with pytest.raises(SerializationError, match="damaged"):
            DEFAULT.decode(encoded_as(decimal.Decimal(1), instead=b"rubbish"), KIND_MSGPACK)


@pytest.mark.parametrize("text", ["1E+30", "-1.5E-30", "sNaN12", "-Infinity", "NaN", "0E+5", "1E+999999", "123"])
def test_decimals_are_the_same_bytes_whatever_the_context_writes(text: str) -> None:
    value = decimal.Decimal(text)
    plain = bytes(DEFAULT.encode([value])[0])
    with decimal.localcontext() as context:
        context.capitals, context.prec, context.Emax, context.Emin, context.clamp = 0, 1, 0, 0, 1
        for trap in context.traps:
            context.traps[trap] = True
        assert bytes(DEFAULT.encode([value])[0]) == plain
        assert exact(DEFAULT.decode(plain, KIND_MSGPACK)) == exact([value])


def test_long_numbers_of_one_hash_take_no_time() -> None:
    """A Decimal is compared with an int of its hash by converting that: members are refused before it is."""
    long = [ormsgpack.Ext(1, (sys.hash_info.modulus * (1 << 400_000 + i)).to_bytes(60_000, "little")) for i in range(50)]
    tag = next(tag for tag, load in LOADERS.items() if "decimal" in load.__name__)
    members = [*long, *[ormsgpack.Ext(tag, str(decimal.Decimal(sys.hash_info.modulus * i)).encode()) for i in range(2, 60)]]
    payload = ext(0, ormsgpack.packb([members, [2, len(members), len(members)]]))
    with pytest.raises(SerializationError, match="same hash|damaged"):
        DEFAULT.decode(payload, KIND_MSGPACK)


def test_no_error_recommends_pickles_without_a_signature() -> None:
    for stranger in (object(), [len], {1: pickle}, (slice(1),)):
        with pytest.raises(SerializationError) as caught:
            round_trip(stranger)
        assert "TypedSerializer(types=[...])" in str(caught.value) and "PickleSerializer(secret=...)" in str(caught.value)
        assert "'pickle'" not in str(caught.value)


def test_tags_are_one_behind_the_other() -> None:
    assert sorted(LOADERS) == list(range(FIRST_SCALAR, FIRST_SCALAR + len(LOADERS))) and math.isfinite(len(LOADERS))
