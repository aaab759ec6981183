"""Values of the standard library that are no containers, as a tag and bytes, and back.

Only exact types are taken, and a module is loaded only for a value of it that is stored. Whatever is read is
built by the constructor of its type, which runs nothing but the standard library's code, and takes time in
proportion to its bytes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from struct import Struct
from typing import TYPE_CHECKING, Any

from ..concurrency.interruption import is_interruption
from ..errors import SerializationError
from .basics import from_int, from_utf8, to_int, type_name, utf8
from .loading import module

if TYPE_CHECKING:
    from decimal import Decimal
    from fractions import Fraction
    from pathlib import PurePath
    from uuid import UUID
    from zoneinfo import ZoneInfo

__all__ = ["FIRST_SCALAR", "LOADERS", "ZONE_TAG", "scalar_part", "two_zones"]

FIRST_SCALAR = 4  # the tags before it are those of `msgpack`
(
    _DATETIME, _DATE, _TIME, _TIMEDELTA, _TIMEZONE, _ZONE, _DECIMAL, _FRACTION, _UUID, _COMPLEX, _RANGE,
    _PATH, _IP, _CONSTANT, _TZINFO,
) = range(FIRST_SCALAR, FIRST_SCALAR + 15)  # fmt: skip

ZONE_TAG = _ZONE  # that of a ZoneInfo

_Part = tuple[int, bytes]

_DATETIME_FIELDS = Struct("<HBBBBBIB")  # year, month, day, hour, minute, second, microsecond, fold
_DATE_FIELDS = Struct("<HBB")
_TIME_FIELDS = Struct("<BBBIB")
_TIMEDELTA_FIELDS = Struct("<iii")  # days, seconds, microseconds
_TWO_DOUBLES = Struct("<dd")
_LENGTH = Struct("<I")
_SECONDS = Struct("<i")


# -- dates and times -----------------------------------------------------------------------------


def _datetime_part(value: datetime) -> _Part:
    fields = _DATETIME_FIELDS.pack(
        value.year, value.month, value.day,
        value.hour, value.minute, value.second, value.microsecond, value.fold,
    )  # fmt: skip
    return _DATETIME, fields + _zone_bytes(value.tzinfo)


def _load_datetime(data: bytes) -> datetime:
    *fields, fold = _DATETIME_FIELDS.unpack_from(data)
    return datetime(*fields, _to_zone(data[_DATETIME_FIELDS.size :]), fold=fold)  # type: ignore[arg-type, misc]


def _date_part(value: date) -> _Part:
    return _DATE, _DATE_FIELDS.pack(value.year, value.month, value.day)


def _load_date(data: bytes) -> date:
    return date(*_DATE_FIELDS.unpack(data))


def _time_part(value: time) -> _Part:
    fields = _TIME_FIELDS.pack(value.hour, value.minute, value.second, value.microsecond, value.fold)
    return _TIME, fields + _zone_bytes(value.tzinfo)


def _load_time(data: bytes) -> time:
    *fields, fold = _TIME_FIELDS.unpack_from(data)
    return time(*fields, _to_zone(data[_TIME_FIELDS.size :]), fold=fold)  # type: ignore[arg-type, misc]


def _timedelta_part(value: timedelta) -> _Part:
    return _TIMEDELTA, _TIMEDELTA_FIELDS.pack(value.days, value.seconds, value.microseconds)


def _load_timedelta(data: bytes) -> timedelta:
    days, seconds, microseconds = _TIMEDELTA_FIELDS.unpack(data)
    if not (0 <= seconds < 86400 and 0 <= microseconds < 10**6):
        raise ValueError("a timedelta that is not in its normal form")
    return timedelta(days, seconds, microseconds)


def _zone_bytes(zone: tzinfo | None) -> bytes:
    """What stands behind the fields of a time: nothing if it is naive."""
    if zone is None:
        return b""
    tag, data = _named(zone)
    return bytes((tag,)) + data


def _to_zone(data: bytes) -> tzinfo | None:
    """The inverse of `_zone_bytes`."""
    if not data:
        return None
    load = _ZONE_LOADERS.get(data[0])
    if load is None:
        raise ValueError("a time zone of an unknown kind")
    return load(data[1:])


def _named(zone: tzinfo) -> _Part:
    part = scalar_part(zone)
    if part is not None:
        return part
    raise SerializationError(
        f"a tzinfo of type {type_name(zone)} would not come back as what it is: use datetime.timezone or"
        " zoneinfo.ZoneInfo (value.astimezone(...), or value.replace(tzinfo=...))"
    )


def _timezone_part(value: timezone) -> _Part:
    offset, *name = value.__getinitargs__()  # type: ignore[attr-defined]
    return _TIMEZONE, b"".join([_timedelta_part(offset)[1], *(b"=" + utf8(text) for text in name)])


def _load_timezone(data: bytes) -> timezone:
    offset, name = _load_timedelta(data[: _TIMEDELTA_FIELDS.size]), data[_TIMEDELTA_FIELDS.size :]
    if not name:
        return timezone(offset)
    if name[:1] != b"=":
        raise ValueError("a time zone with something else behind its offset than a name")
    return timezone(offset, from_utf8(name[1:]))


# As in the tz database. Neither "..", nor a dot at all: a key is looked for below directories.
_ZONE_KEY = re.compile(r"[A-Za-z0-9_+-]{1,64}(/[A-Za-z0-9_+-]{1,64}){0,4}", re.ASCII)


def _zone_part(value: Any) -> _Part:
    key = value.key
    if not (type(key) is str and _ZONE_KEY.fullmatch(key) and _is_of_the_database(value, key)):
        raise SerializationError(
            f"the time zone {value} would not come back as what it is: it was read from a file of its own;"
            " use zoneinfo.ZoneInfo(key)"
        )
    return _ZONE, key.encode()


def _is_of_the_database(value: Any, key: str) -> bool:
    """False if it was made by `from_file`: pickle refuses that too."""
    try:
        if type(value)(key) is value:
            return True
        value.__reduce__()
    except Exception as error:  # PicklingError, or ZoneInfoNotFoundError
        if is_interruption(error):
            raise
        return False
    return True


def two_zones(value: object) -> SerializationError:
    """For a second ZoneInfo of one key: they are equal only to themselves, and would come back as one."""
    return SerializationError(
        f"the value has two time zones {value} in it that are not the same, and would come back as one: use"
        " zoneinfo.ZoneInfo(key), not no_cache, for both"
    )


def _load_zone(data: bytes) -> ZoneInfo:
    key = data.decode("ascii")
    if not _ZONE_KEY.fullmatch(key):
        raise ValueError("a time zone with an impossible name")
    try:
        return module("zoneinfo").ZoneInfo(key)  # type: ignore[no-any-return]
    except (KeyError, OSError, ValueError) as error:  # not there, a directory, or damaged
        raise SerializationError(
            f"the time zone {key!r} of a stored value is not known on this system: install the package tzdata"
        ) from error


def _tzinfo_part(value: tzinfo) -> _Part:
    """Of the times that pydantic has parsed."""
    offset: Any = value.utcoffset(None)
    return _TZINFO, _SECONDS.pack(offset.days * 86400 + offset.seconds)


def _load_tzinfo(data: bytes) -> tzinfo:
    (seconds,) = _SECONDS.unpack(data)
    try:
        return module("pydantic_core").TzInfo(seconds)  # type: ignore[no-any-return]
    except ImportError as error:
        if is_interruption(error):
            raise
        raise SerializationError(
            "a stored value has a time in it whose zone is of pydantic's, and that is not there: pip install"
            " pydantic"
        ) from error


_ZONE_LOADERS: dict[int, Callable[[bytes], tzinfo]] = {
    _TIMEZONE: _load_timezone,
    _ZONE: _load_zone,
    _TZINFO: _load_tzinfo,
}


# -- numbers -------------------------------------------------------------------------------------


def _decimal_part(value: Decimal) -> _Part:
    return _DECIMAL, _decimal_text(value).encode()


def _decimal_text(value: Decimal) -> str:
    """Sign, digits, exponent, and what a NaN carries. The thread's context may have `str` write an "e"."""
    return str(value).replace("e", "E")


def _load_decimal(data: bytes) -> Decimal:
    text = data.decode("ascii")
    value: Decimal = module("decimal").Decimal(text)
    if _decimal_text(value) != text:
        raise ValueError("a decimal that is not in its normal form")
    return value


def _fraction_part(value: Fraction) -> _Part:
    numerator, denominator = value.numerator, value.denominator
    if type(numerator) is not int or type(denominator) is not int:
        raise SerializationError("a Fraction of other numbers than int would not come back as what it is")
    data = _from_ints(numerator, denominator)
    if _is_long(numerator, denominator):
        raise SerializationError(
            f"a Fraction whose numerator and denominator both have more than {_LONG_BITS} bits takes too long"
            " to read: store the two numbers"
        )
    return _FRACTION, data


_LONG_BITS = 1 << 15


def _is_long(numerator: int, denominator: int) -> bool:
    """Whether their greatest common divisor takes long: as many steps as the product of their lengths."""
    return min(numerator.bit_length(), denominator.bit_length()) > _LONG_BITS


def _load_fraction(data: bytes) -> Fraction:
    numerator, denominator = _to_ints(data, 2)
    if denominator < 1 or _is_long(numerator, denominator):
        raise ValueError("a fraction with an impossible denominator")
    value: Fraction = module("fractions").Fraction(numerator, denominator)
    if value.denominator != denominator:
        raise ValueError("a fraction that is not in lowest terms")
    return value


def _complex_part(value: complex) -> _Part:
    return _COMPLEX, _TWO_DOUBLES.pack(value.real, value.imag)


def _load_complex(data: bytes) -> complex:
    return complex(*_TWO_DOUBLES.unpack(data))


def _range_part(value: range) -> _Part:
    return _RANGE, _from_ints(int(value.start), int(value.stop), int(value.step))


def _load_range(data: bytes) -> range:
    return range(*_to_ints(data, 3))


def _from_ints(*numbers: int) -> bytes:
    """Each behind its length."""
    return b"".join([_LENGTH.pack(len(data)) + data for data in map(from_int, numbers)])


def _to_ints(data: bytes, count: int) -> list[int]:
    numbers, at = [], 0
    for _ in range(count):
        start = at + _LENGTH.size
        at = start + _LENGTH.unpack_from(data, at)[0]
        numbers.append(to_int(data[start:at]))
    if at != len(data):
        raise ValueError("numbers of another length than they say")
    return numbers


# -- names ---------------------------------------------------------------------------------------


_SAFETIES = {b"": "unknown", b"s": "safe", b"u": "unsafe"}  # whether processes may have made the same UUID
_SAFETY_LETTERS = {name: letter for letter, name in _SAFETIES.items()}


def _uuid_part(value: UUID) -> _Part:
    return _UUID, value.bytes + _SAFETY_LETTERS[value.is_safe.name]


def _load_uuid(data: bytes) -> UUID:
    uuid = module("uuid")
    return uuid.UUID(bytes=data[:16], is_safe=uuid.SafeUUID[_SAFETIES[data[16:]]])  # type: ignore[no-any-return]


_PATHS = {b"p": "PurePosixPath", b"w": "PureWindowsPath", b"P": "PosixPath", b"W": "WindowsPath"}
_PATH_LETTERS = {name: letter for letter, name in _PATHS.items()}


def _path_part(value: PurePath) -> _Part:
    kind, text = type(value), str(value)
    again = kind(text)
    if again != value or str(again) != text:
        raise SerializationError(f"the path {text!r} would not come back as what it is: store str(path)")
    return _PATH, _PATH_LETTERS[kind.__name__] + utf8(text)


def _load_path(data: bytes) -> PurePath:
    name, text = _PATHS[data[:1]], from_utf8(data[1:])
    try:
        path: PurePath = getattr(module("pathlib"), name)(text)
    except NotImplementedError as error:
        raise SerializationError(
            f"a stored {name} cannot be made on this system: store a pure path to share it"
        ) from error
    if str(path) != text:
        raise ValueError("a path that is not in its normal form")
    return path


_IPS = {
    b"4": "IPv4Address", b"n": "IPv4Network", b"i": "IPv4Interface",
    b"6": "IPv6Address", b"N": "IPv6Network", b"I": "IPv6Interface",
}  # fmt: skip
_IP_LETTERS = {name: letter for letter, name in _IPS.items()}


def _ip_part(value: Any) -> _Part:
    """Its bits, the length of its prefix unless it is an address, its scope. Its text is another one in other
    releases of Python."""
    name, prefix = type(value).__name__, b""
    if not name.endswith("Address"):
        prefix = bytes((getattr(value, "network", value).prefixlen,))
    address = getattr(value, "network_address", value)
    scope = getattr(address, "scope_id", None) or ""
    return _IP, _IP_LETTERS[name] + address.packed + prefix + utf8(scope)


def _load_ip(data: bytes) -> Any:
    name = _IPS[data[:1]]
    end = 5 if name.startswith("IPv4") else 17
    address: Any = data[1:end]
    at = end if name.endswith("Address") else end + 1
    if len(data) > at:
        address = f"{address.hex(':', 2)}%{from_utf8(data[at:])}"
    value = getattr(module("ipaddress"), name)(address if at == end else (address, data[end]))
    if _ip_part(value)[1] != data:
        raise ValueError("an address that is not in its normal form")
    return value


_CONSTANTS: dict[bytes, Any] = {b".": ...}


def _constant_part(_value: object) -> _Part:
    return _CONSTANT, b"."


# -- which is which ------------------------------------------------------------------------------

_Encoder = Callable[[Any], _Part]

# Those of modules that are loaded here; others are added when they are seen.
_encoders: dict[type, _Encoder] = {
    complex: _complex_part,
    date: _date_part,
    datetime: _datetime_part,
    range: _range_part,
    time: _time_part,
    timedelta: _timedelta_part,
    timezone: _timezone_part,
    type(...): _constant_part,
}
_PLACES: dict[str, tuple[str, _Encoder]] = {
    "Decimal": ("decimal", _decimal_part),
    "Fraction": ("fractions", _fraction_part),
    "TzInfo": ("pydantic_core", _tzinfo_part),
    "UUID": ("uuid", _uuid_part),
    "ZoneInfo": ("zoneinfo", _zone_part),
    **dict.fromkeys(_PATH_LETTERS, ("pathlib", _path_part)),
    **dict.fromkeys(_IP_LETTERS, ("ipaddress", _ip_part)),
}


def scalar_part(value: object) -> _Part | None:
    """(tag, bytes) of a value of a known type; None for any other. Refuses what would not come back."""
    encoder = _encoders.get(type(value)) or _known(type(value))
    return None if encoder is None else encoder(value)


def _known(kind: type) -> _Encoder | None:
    """What encodes values of a type whose module somebody else has loaded."""
    name = kind.__name__
    if name not in _PLACES:
        return None
    place, encoder = _PLACES[name]
    if getattr(sys.modules.get(place), name, None) is not kind:
        return None
    _encoders[kind] = encoder
    return encoder


LOADERS: dict[int, Callable[[bytes], Any]] = {
    _DATETIME: _load_datetime,
    _DATE: _load_date,
    _TIME: _load_time,
    _TIMEDELTA: _load_timedelta,
    _TIMEZONE: _load_timezone,
    _ZONE: _load_zone,
    _DECIMAL: _load_decimal,
    _FRACTION: _load_fraction,
    _UUID: _load_uuid,
    _COMPLEX: _load_complex,
    _RANGE: _load_range,
    _PATH: _load_path,
    _IP: _load_ip,
    _CONSTANT: _CONSTANTS.__getitem__,
    _TZINFO: _load_tzinfo,
}
