"""What the user raised in the middle of something arrives as what it was; only damage is told as damage."""

from __future__ import annotations

import ctypes
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from yatagarasu_cache import DiskCache, SerializationError
from yatagarasu_cache.codec import PickleSerializer, ValueCodec, decode_key, encode_key, msgpack
from yatagarasu_cache.concurrency.interruption import descriptor_of, is_interruption


class TimeLimit(Exception):
    """As those of Celery and of decorators that limit time."""


class Plain:
    """A serializer of one's own, which calls functions of its own."""

    name = "plain"

    def dumps(self, value: Any) -> bytes:
        return self.text(value).encode()

    def loads(self, data: bytes) -> Any:
        return self.text(data.decode())

    def text(self, value: Any) -> str:
        return str(value)


class Hooked:
    """Runs code of the user's in the middle of pickling and unpickling."""

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuilt, (1,)


def rebuilt(number: int) -> int:
    return number + 1


VALUE = [(1, {2}), frozenset({b"x"}), {1: bytearray(b"y")}, 10**30, "\ud800", [[1.5], {"a": None}]]
KEY = ("a", b"b", 3, (1.5, None, (True,)), 10**30, "\ud800")
CODECS: dict[str, tuple[Any, Any]] = {
    "msgpack": ("msgpack", VALUE), "json-like": ("msgpack", [{"a": [1, 2.5, "x" * 40]}, []]),
    "int": ("msgpack", -(10**30)), "str": ("msgpack", "\ud800"), "view": ("msgpack", memoryview(bytearray(b"x"))),
    "pickle": ("pickle", Hooked()), "signed": (PickleSerializer(b"secret"), [Hooked()]), "own": (Plain(), "text"),
}  # fmt: skip

CODE = {__file__, *map(str, Path(msgpack.__file__).parent.glob("*.py"))}  # whose lines are interrupted


def interrupted_everywhere(work: Callable[[], Any], error: type[BaseException]) -> Iterator[BaseException | None]:
    """What comes out of `work` when a signal handler raises at its 1st, 2nd, ... line."""
    at = 0
    while True:
        at += 1
        raised = error("the user's own")
        left = at

        def handler(_number: int, _frame: FrameType | None, raised: BaseException = raised) -> None:
            raise raised

        def trace(frame: FrameType, event: str, _: Any, handler: Any = handler) -> Any:
            nonlocal left
            if frame.f_code.co_filename in CODE and event == "line":
                left -= 1
                if not left:
                    sys.settrace(None)
                    handler(signal.SIGALRM, frame)
            return trace

        before = sys.gettrace()
        caught: BaseException | None = None
        try:
            sys.settrace(trace)
            work()
        except BaseException as found:
            caught = found
        finally:
            sys.settrace(before)
        if left > 0:
            return
        assert caught is raised, f"at line {at}: {caught!r}"
        yield caught


@pytest.mark.parametrize("error", [TimeLimit, TimeoutError, ValueError, TypeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("name", CODECS)
def test_a_handler_raises_while_a_value_is_encoded_or_decoded(name: str, error: type[BaseException]) -> None:
    serializer, value = CODECS[name]
    values = ValueCodec(serializer)
    payload, flags = values.encode(value, key="k")
    assert len(list(interrupted_everywhere(lambda: values.encode(value, key="k"), error))) > 1
    assert len(list(interrupted_everywhere(lambda: values.decode(bytes(payload), flags, "k"), error))) > 1


@pytest.mark.parametrize("error", [TimeLimit, ValueError, SystemExit])
def test_a_handler_raises_while_a_key_is_encoded_or_decoded(error: type[BaseException]) -> None:
    data = encode_key(KEY)
    assert len(list(interrupted_everywhere(lambda: encode_key(KEY), error))) > 10
    assert len(list(interrupted_everywhere(lambda: decode_key(data), error))) > 10


@pytest.fixture
def on_alarm() -> Iterator[Callable[[Any], None]]:
    """Sets what SIGALRM does."""
    before = signal.getsignal(signal.SIGALRM)
    yield lambda handler: signal.signal(signal.SIGALRM, handler) and None
    signal.signal(signal.SIGALRM, before)


def out_of_time(*_: Any) -> None:
    raise TimeoutError("the user's own")


@pytest.mark.parametrize("handler", [signal.default_int_handler, out_of_time])
def test_a_signal_during_get_and_set(
    tmp_path: Path, on_alarm: Any, monkeypatch: pytest.MonkeyPatch, handler: Any
) -> None:
    """Where tuples are built again, which was inside of ormsgpack, and in a stream of the user's."""
    expected = KeyboardInterrupt if handler is signal.default_int_handler else TimeoutError

    def build(content: list[Any]) -> Any:
        signal.raise_signal(signal.SIGALRM)
        return tuple(content)

    def parts() -> Iterator[bytes]:
        yield bytes(100)
        signal.raise_signal(signal.SIGALRM)
        yield bytes(100)

    class File(io.BytesIO):
        def fileno(self) -> int:
            signal.raise_signal(signal.SIGALRM)
            raise OSError

    on_alarm(handler)
    with DiskCache(tmp_path / "c") as cache:
        cache.set("k", [(1, {2})])
        with monkeypatch.context() as patch:
            patch.setitem(msgpack._BUILDERS, msgpack._TUPLE, build)
            for call in (
                lambda: cache.get("k"), lambda: cache.get_many(["k"]), lambda: cache.pop("k"),
                lambda: cache.get_entry("k").value,
            ):  # fmt: skip
                with pytest.raises(expected) as caught:
                    call()
                assert caught.type is expected
        for stream in (parts(), File(b"x")):
            with pytest.raises(expected) as caught:
                cache.set("k", stream)
            assert caught.type is expected
        assert cache.get("k") == [(1, {2})]


def interrupt_this_thread(error: type[BaseException]) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(threading.get_ident()), ctypes.py_object(error)
    )


@pytest.mark.parametrize("error", [TimeLimit, TimeoutError, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["msgpack", "own"])
def test_another_thread_raises_during_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: type[BaseException]
) -> None:
    def busy(content: Any) -> Any:
        interrupt_this_thread(error)
        for _ in range(1000):
            pass
        return content

    monkeypatch.setitem(msgpack._BUILDERS, msgpack._TUPLE, busy)
    monkeypatch.setattr(Plain, "text", lambda _, value: busy(value) if value == "text" else str(value))
    with DiskCache(tmp_path / "c", serializer=Plain() if name == "own" else "msgpack") as cache:
        value: Any = ["text"] if name == "own" else [(1,)]
        cache.set("k", value)
        monkeypatch.setattr(Plain, "loads", lambda self, _: self.text("text"))
        with pytest.raises(error) as caught:
            cache.get("k")
        assert caught.type is error


def test_what_a_serializer_raises_is_told_as_its_failure(tmp_path: Path) -> None:
    class Failing(Plain):
        error: Any = TimeLimit

        def loads(self, data: bytes) -> Any:
            raise self.error

    serializer = Failing()
    with DiskCache(tmp_path / "c", serializer=serializer) as cache:
        cache.set("k", [1])
        for error in (TimeLimit, TimeLimit("with arguments"), ValueError, EOFError()):
            serializer.error = error
            with pytest.raises(SerializationError) as caught:
                cache.get("k")
            assert type(caught.value.__cause__) is (error if isinstance(error, type) else type(error))


def test_what_is_no_interruption() -> None:
    def raising(error: Any) -> None:
        raise error

    for action in (lambda: raising(ValueError), lambda: int("x"), lambda: next(iter([])), lambda: {}["x"]):
        with pytest.raises(Exception) as caught:
            action()
        assert not is_interruption(caught.value)
    assert is_interruption(MemoryError()) and is_interruption(SystemExit())


def opened_and_interrupted(path: Path) -> Iterator[int]:
    """Gives a descriptor, and has Ctrl-C come before the interpreter goes on: all of it runs in C."""
    steps = (
        partial(os.open, path, os.O_RDONLY),
        partial(ctypes.pythonapi.PyErr_SetInterruptEx, int(signal.SIGINT)),  # which returns 0
    )
    return map(partial.__call__, steps)


def test_a_descriptor_that_an_interruption_follows_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()

    def opened() -> list[int]:
        target = str(path.resolve())
        return [
            int(fd) for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == target
        ]

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            descriptor_of(max, opened_and_interrupted(path))
        assert opened() == []
        with pytest.raises(KeyboardInterrupt):
            _ = max(opened_and_interrupted(path))  # what it is there for
        (left,) = opened()
        os.close(left)
    finally:
        signal.signal(signal.SIGINT, before)
    fd = descriptor_of(os.open, path, os.O_RDONLY)
    other = descriptor_of(os.dup, fd)
    assert sorted(opened()) == sorted([fd, other])
    os.close(fd)
    os.close(other)
    with pytest.raises(FileNotFoundError):
        descriptor_of(os.open, tmp_path / "nothing", os.O_RDONLY)
