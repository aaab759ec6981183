"""Serializers: pickles, signed and not, and those of a caller's own."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import pickle
from typing import Any

import pytest
from helpers import named
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import (
    DEFAULT,
    SECRET,
    Bytes,
    Color,
    Int,
    Level,
    Point,
    Str,
    assert_exact,
    ext,
    label,
    nested,
    round_trip,
    scalars,
)

from yatagarasu_cache.codec import (
    KIND_CUSTOM,
    MsgpackSerializer,
    PickleSerializer,
    Serializer,
    ValueCodec,
    pickling,
)
from yatagarasu_cache.errors import ConfigurationError, SerializationError, ValueTooLarge


class Bomb:
    """Unpickling this leaves a trace."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return pathlib.Path.touch, (self.path,)


@dataclasses.dataclass
class Thing:
    name: str
    parts: list[Any] = dataclasses.field(default_factory=list)


class Reversing:
    """A serializer of str, for tests."""

    name = "reversing"

    def dumps(self, value: Any) -> bytes:
        return repr(value).encode()[::-1]

    def loads(self, data: bytes) -> Any:
        return "loaded " + data[::-1].decode()


class Returning:
    """A serializer that gives, or raises, what it is told."""

    name = "returning"

    def __init__(self, dumped: Any = b"", loaded: Any = None) -> None:
        self.dumped, self.loaded = dumped, loaded

    def dumps(self, value: Any) -> bytes:
        return self._give(self.dumped)  # type: ignore[no-any-return]

    def loads(self, data: bytes) -> Any:
        return self._give(self.loaded)

    def _give(self, what: Any) -> Any:
        if isinstance(what, BaseException):
            raise what
        return what


PICKLES = [
    PickleSerializer(), PickleSerializer(SECRET), PickleSerializer(SECRET * 10, protocol=0),
    PickleSerializer(SECRET, old_secrets=[b"old"]),
]  # fmt: skip
OTHERS = [PickleSerializer(only_others=True), PickleSerializer(SECRET, only_others=True)]


@pytest.mark.parametrize("serializer", PICKLES, ids=named)
def test_pickled_values_come_back(serializer: PickleSerializer) -> None:
    values_ = ValueCodec(serializer)
    for value in (Thing("a", [1]), Color.RED, Point(1, 2), collections.OrderedDict(a=1), [1, (2,)]):
        payload, flags = values_.encode(value, key="k")
        assert flags == KIND_CUSTOM
        back = values_.decode(bytes(payload), flags, "k")
        assert back == value
        assert type(back) is type(value)


@settings(max_examples=50)
@given(scalars)
def test_scalars_stay_native_whatever_the_serializer(value: Any) -> None:
    values_ = ValueCodec(Reversing())
    assert values_.encode(value) == DEFAULT.encode(value)
    assert_exact(value, values_)


def test_everything_else_goes_to_the_serializer() -> None:
    values_ = ValueCodec(Reversing())
    for value in ([1], (1,), {"a": 1}, {1}, bytearray(b"a"), Str("a"), Level.LOW, 1j, Int(1), Bytes(b"a")):
        payload, flags = values_.encode(value)
        assert flags == KIND_CUSTOM
        assert bytes(payload).startswith(b"\x09reversing")
        assert values_.decode(bytes(payload), flags) == f"loaded {value!r}"
    assert type(round_trip(bytearray(b"a"), ValueCodec("pickle"))) is bytearray
    assert round_trip(memoryview(b"abc"), ValueCodec("pickle")) == b"abc"


def test_msgpack_values_open_under_every_serializer() -> None:
    payload, flags = DEFAULT.encode({"a": (1, 2)})
    assert ValueCodec("pickle").decode(bytes(payload), flags) == {"a": (1, 2)}


def test_the_names_of_serializers() -> None:
    assert ValueCodec().serializer.name == "msgpack"
    assert ValueCodec("pickle").serializer.name == "pickle"
    assert PickleSerializer(SECRET).name == "pickle-signed"
    for serializer in (MsgpackSerializer(), PickleSerializer(), Reversing()):
        assert isinstance(serializer, Serializer)
        assert ValueCodec(serializer).serializer is serializer
    assert ValueCodec(MsgpackSerializer()).encode([1]) == DEFAULT.encode([1])


@pytest.mark.parametrize(
    "serializer",
    [
        "",
        "json",
        "Pickle",
        b"pickle",
        None,
        1,
        object(),
        pickle,
        PickleSerializer,
        MsgpackSerializer,
        Str("x"),
    ],
    ids=named,
)
def test_what_is_no_serializer(serializer: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"^serializer is .*must be 'msgpack', 'pickle' or an object"
    ):
        ValueCodec(serializer)


@pytest.mark.parametrize("name", ["", "x" * 256, "é" * 128, b"name", None, 1])
def test_names_that_cannot_be_stored(name: Any) -> None:
    serializer = Reversing()
    serializer.name = name
    with pytest.raises(ConfigurationError, match=r"serializer has the name .* 1 to 255 bytes"):
        ValueCodec(serializer)


def test_the_longest_name() -> None:
    serializer = Reversing()
    serializer.name = "é" * 127 + "x"
    assert round_trip([1], ValueCodec(serializer)) == "loaded [1]"


@pytest.mark.parametrize(
    ("writer", "remedy"),
    [
        (PickleSerializer(), r"stored with serializer 'pickle'.*serializer='pickle'.*if you trust"),
        (
            PickleSerializer(SECRET),
            r"stored with serializer 'pickle-signed'.*PickleSerializer\(secret=\.\.\.\)",
        ),
        (Reversing(), r"stored with serializer 'reversing'.*<your serializer named 'reversing'>"),
    ],
    ids=named,
)
def test_values_of_another_serializer_are_refused_with_directions(writer: Any, remedy: str) -> None:
    payload, flags = ValueCodec(writer).encode([1], key="k")
    for reader in (MsgpackSerializer(), PickleSerializer(), PickleSerializer(SECRET), Reversing()):
        if reader.name != writer.name:
            with pytest.raises(SerializationError, match=remedy) as caught:
                ValueCodec(reader).decode(bytes(payload), flags, "k")
            assert f"this cache uses {reader.name!r}" in str(caught.value)


@pytest.mark.parametrize("error", [ValueError("no"), TypeError("no"), RecursionError("no")])
def test_errors_of_serializers_are_wrapped(error: Exception) -> None:
    with pytest.raises(
        SerializationError, match="'returning' cannot store a value of type list: no"
    ) as caught:
        ValueCodec(Returning(dumped=error)).encode([1])
    assert caught.value.__cause__ is error
    payload, flags = ValueCodec(Returning()).encode([1])
    with pytest.raises(SerializationError, match="'returning' cannot load a stored value: no") as caught:
        ValueCodec(Returning(loaded=error)).decode(bytes(payload), flags)
    assert caught.value.__cause__ is error


def test_errors_of_ours_and_interrupts_pass_unchanged() -> None:
    payload, flags = ValueCodec(Returning()).encode([1])
    for error in (SerializationError("mine"), KeyboardInterrupt("stop"), MemoryError("no")):
        with pytest.raises(type(error)) as caught:
            ValueCodec(Returning(dumped=error)).encode([1])
        assert caught.value is error
        with pytest.raises(type(error)) as caught:
            ValueCodec(Returning(loaded=error)).decode(bytes(payload), flags)
        assert caught.value is error


@pytest.mark.parametrize("dumped", ["text", None, 1, [b"a"]], ids=label)
def test_dumps_has_to_return_bytes(dumped: Any) -> None:
    with pytest.raises(
        SerializationError, match=f"'returning' returned {label(dumped)}; it has to return bytes"
    ):
        ValueCodec(Returning(dumped=dumped)).encode([1])


def test_what_pickle_cannot_store() -> None:
    for value in (lambda: 1, [len, (i for i in ())], nested(100_000, lambda inner: [inner])):
        with pytest.raises(SerializationError, match="serializer 'pickle' cannot store") as caught:
            ValueCodec("pickle").encode(value)
        assert caught.value.__cause__ is not None


@settings(max_examples=50)
@given(st.binary(max_size=30))
def test_damaged_pickles_are_refused(data: bytes) -> None:
    payload = b"\x06pickle" + data[:3] + b"\xff"  # no opcode: never loads
    with pytest.raises(SerializationError, match="'pickle' cannot load"):
        ValueCodec("pickle").decode(payload, KIND_CUSTOM)


# Pickles: nothing runs that was not asked for


def test_a_bomb_does_go_off_when_pickle_was_chosen(tmp_path: pathlib.Path) -> None:
    """Or the tests below would prove nothing."""
    round_trip(Bomb(tmp_path / "trace"), ValueCodec("pickle"))
    assert (tmp_path / "trace").exists()


def test_no_payload_is_unpickled_by_the_default(tmp_path: pathlib.Path) -> None:
    trace = tmp_path / "trace"
    bomb = Bomb(trace)
    payloads = [pickle.dumps(bomb), b"\x06pickle" + pickle.dumps(bomb)]
    payloads += [bytes(ValueCodec(serializer).encode(bomb, key="k")[0]) for serializer in PICKLES]
    payloads += [ext(tag, payload) for tag in range(6) for payload in payloads]
    for payload in payloads:
        for flags in range(256):
            try:
                DEFAULT.decode(payload, flags)
            except SerializationError:
                pass
            assert not trace.exists()


def test_no_foreign_pickle_is_loaded_with_a_secret(tmp_path: pathlib.Path) -> None:
    trace = tmp_path / "trace"
    bomb = pickle.dumps(Bomb(trace))
    values_ = ValueCodec(PickleSerializer(SECRET))
    other = PickleSerializer(b"another secret").dumps(Bomb(trace))
    unsigned = [b"\x06pickle" + bomb, b"\x0dpickle-signed" + bomb, b"\x0dpickle-signed" + bytes(32) + bomb]
    for payload in [*unsigned, b"\x0dpickle-signed" + other]:
        with pytest.raises(SerializationError):
            values_.decode(payload, KIND_CUSTOM, "k")
        assert not trace.exists()


def test_each_changed_byte_of_a_signed_pickle_is_noticed_before_loading(monkeypatch: Any) -> None:
    signed = PickleSerializer(SECRET)
    data = signed.dumps([1, Thing("a")])
    assert signed.loads(data) == [1, Thing("a")]
    loaded: list[bytes] = []
    monkeypatch.setattr(pickling.pickle, "loads", loaded.append)
    changed = [data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :] for at in range(len(data))]
    cut = [data[:length] for length in range(len(data))]
    for tampered in [*changed, *cut, data + b"\0"]:
        with pytest.raises(
            SerializationError, match="signature of a stored pickle is wrong, it was not loaded"
        ):
            signed.loads(tampered)
    assert loaded == []


@pytest.mark.parametrize("secret", [b"", "text", bytearray(b"abc"), 1, True])
def test_what_is_no_secret(secret: Any) -> None:
    with pytest.raises(ConfigurationError, match="^secret must be bytes"):
        PickleSerializer(secret)


@pytest.mark.parametrize("protocol", [-1, pickle.HIGHEST_PROTOCOL + 1, "5", None, True])
def test_what_is_no_protocol(protocol: Any) -> None:
    with pytest.raises(ConfigurationError, match="^protocol must be an int"):
        PickleSerializer(protocol=protocol)


def test_secrets_of_any_length_differ() -> None:
    data = {
        PickleSerializer(secret).dumps(1) for secret in (b"a", b"b", b"a" * 64, b"a" * 65, b"a" * 66, b"a\0")
    }
    assert len(data) == 6


@pytest.mark.parametrize("serializer", OTHERS, ids=named)
def test_only_what_the_default_serializer_refuses_is_pickled(serializer: PickleSerializer) -> None:
    values_ = ValueCodec(serializer)
    natives: list[Any] = [[1, (2,)], {"a": {1}}, collections.OrderedDict(a=1), 1j, b"a", "a", 1, None]
    for value in natives:
        assert values_.encode(value, key="k") == DEFAULT.encode(value)
        assert_exact(value, values_)
    for value in (Thing("a", [1]), Color.RED, Point(1, 2), [Thing("a"), {1}], Str("a"), bytearray(b"a"), {"a": Level.LOW}):
        payload, flags = values_.encode(value, key="k")
        assert flags == KIND_CUSTOM
        back = values_.decode(bytes(payload), flags, "k")
        assert back == value and type(back) is type(value)
        assert values_.decode(*DEFAULT.encode([1]), "k") == [1]


def test_a_list_that_holds_itself_is_pickled_with_the_others() -> None:
    ring: list[Any] = [1]
    ring.append(ring)
    values_ = ValueCodec(OTHERS[1])
    payload, flags = values_.encode(ring, key="k")
    back = values_.decode(bytes(payload), flags, "k")
    assert back[0] == 1 and back[1] is back


def test_what_is_too_large_is_not_pickled_instead() -> None:
    with pytest.raises(ValueTooLarge):
        ValueCodec(OTHERS[1]).encode([b"x" * 1000], 100, "k")


@pytest.mark.parametrize("serializer", OTHERS, ids=named)
def test_what_can_neither_be_kept_nor_pickled_is_refused(serializer: PickleSerializer) -> None:
    with pytest.raises(SerializationError, match="cannot store a value of type"):
        ValueCodec(serializer).encode(lambda: None, key="k")


def test_old_secrets_are_read_and_not_written() -> None:
    old, new = PickleSerializer(b"old"), PickleSerializer(b"new", old_secrets=[b"older", b"old"])
    assert new.loads(old.dumps([1])) == new.loads(PickleSerializer(b"older").dumps([1])) == [1]
    assert new.dumps([1]) == PickleSerializer(b"new").dumps([1])
    with pytest.raises(SerializationError, match="signature"):
        old.loads(new.dumps([1]))
    with pytest.raises(SerializationError, match="signature"):
        new.loads(PickleSerializer(b"oldest").dumps([1]))
    payload, flags = ValueCodec(old).encode([1], key="k")
    assert ValueCodec(new).decode(bytes(payload), flags, "k") == [1]
    with pytest.raises(SerializationError, match="signature"):
        ValueCodec(new).decode(bytes(payload), flags, "other")


@pytest.mark.parametrize("old", [b"old", "old", [b""], ["old"], [None]])
def test_what_are_no_old_secrets(old: Any) -> None:
    with pytest.raises(ConfigurationError, match="^old_secrets must be a list of bytes"):
        PickleSerializer(SECRET, old_secrets=old)


def test_old_secrets_without_a_new_one_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="^old_secrets need a secret"):
        PickleSerializer(old_secrets=[b"old"])


def test_only_others_is_true_or_false() -> None:
    with pytest.raises(ConfigurationError, match="^only_others must be"):
        PickleSerializer(SECRET, only_others=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("serializer", [*PICKLES, *OTHERS], ids=named)
def test_pickle_serializers_travel_to_other_processes(serializer: PickleSerializer) -> None:
    there = pickle.loads(pickle.dumps(serializer))
    assert there.name == serializer.name and there.only_others == serializer.only_others
    assert there._old_secrets == serializer._old_secrets
    assert there.loads(serializer.dumps([1])) == [1]
    assert there.dumps([1]) == serializer.dumps([1])


def test_the_secret_is_not_shown() -> None:
    assert SECRET.decode() not in repr(PickleSerializer(SECRET))
    assert repr(PickleSerializer(SECRET)) == "<PickleSerializer 'pickle-signed' protocol=5>"
