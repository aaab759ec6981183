"""Pickles of plain values, read by code that can neither import nor call anything.

What it knows are the opcodes of scalars and containers (`pickletools` describes all); at any other one it
stops. It makes nothing that is larger than the pickle: a length is compared with what there is before memory
is asked for, and what is remembered is a dict, not an array as long as the largest number in it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

__all__ = ["NotPlain", "loads"]

_MARK: Any = object()
_MOST_HASHED, _DEEPEST_KEY = 1 << 20, 200
_MOST_DIGITS = 4000  # of a number in text: Python reads no more by itself


class NotPlain(ValueError):
    """It is damaged, or of something that is no plain value."""


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._hashed = _MOST_HASHED

    # -- bytes --------------------------------------------------------------------------------

    def _take(self, count: int) -> bytes:
        end = self._at + count
        taken = self._data[self._at : end]
        if len(taken) != count:
            raise NotPlain("it is cut off")
        self._at = end
        return taken

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _line(self) -> bytes:
        end = self._data.find(b"\n", self._at, self._at + _MOST_DIGITS)
        if end < 0:
            raise NotPlain("a line without an end, or too long a number")
        return self._take(end + 1 - self._at)[:-1]

    # -- the stack ----------------------------------------------------------------------------

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise NotPlain("a value is missing")
        return self._stack.pop()

    def _since_mark(self) -> list[Any]:
        items: list[Any] = []
        while self._stack:
            item = self._stack.pop()
            if item is _MARK:
                items.reverse()
                return items
            items.append(item)
        raise NotPlain("a mark is missing")

    def _top(self, kind: type) -> Any:
        if not self._stack or type(self._stack[-1]) is not kind:
            raise NotPlain(f"a {kind.__name__} is missing")
        return self._stack[-1]

    # -- opcodes ------------------------------------------------------------------------------

    def load(self) -> Any:
        data, end, acts = self._data, len(self._data), _ACTS_OF
        while self._at < end:
            code = data[self._at]
            self._at += 1
            act = acts[code]
            if act is None:
                if code == _STOP:
                    return self._pop()
                what = bytes((code,))
                raise NotPlain(_WHY.get(what, f"it has the opcode {what!r}, which no plain value needs"))
            act(self)
        raise NotPlain("it is cut off")

    def protocol(self) -> None:
        if self._number(1) > 5:
            raise NotPlain("its protocol is unknown")

    def frame(self) -> None:
        self._take(8)  # how long it is does not matter: all is in memory

    def mark(self) -> None:
        self._stack.append(_MARK)

    def pop(self) -> None:
        if not self._stack:
            raise NotPlain("a value is missing")
        self._stack.pop()

    def dup(self) -> None:
        value = self._pop()
        self._stack += [value, value]

    def int_line(self) -> None:
        line = self._line()
        self._push({b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line))

    def long_line(self) -> None:
        self._push(int(self._line().rstrip(b"L")))

    def binint(self) -> None:
        self._push(int.from_bytes(self._take(4), "little", signed=True))

    def long(self, size: int) -> None:
        self._push(int.from_bytes(self._take(self._number(size)), "little", signed=True))

    def float_line(self) -> None:
        self._push(float(self._line()))

    def binfloat(self) -> None:
        self._push(struct.unpack(">d", self._take(8))[0])

    def unicode_line(self) -> None:
        end = self._data.find(b"\n", self._at)
        if end < 0:
            raise NotPlain("a line without an end")
        line = self._take(end + 1 - self._at)
        self._push(line[:-1].decode("raw-unicode-escape"))

    def text(self, size: int) -> None:
        self._push(self._take(self._number(size)).decode("utf-8", "surrogatepass"))

    def bytes(self, size: int) -> None:
        self._push(self._take(self._number(size)))

    def bytearray(self) -> None:
        self._push(bytearray(self._take(self._number(8))))

    def tuple_of(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(items)))

    def _check_keys(self, keys: list[Any]) -> None:
        """Before they are hashed: Python does that to tuples in tuples however deep they are, which ends the
        process, and however often one of them is met, which takes for ever."""
        for key in keys:
            if type(key) is tuple:
                self._check_key(key)

    def _check_key(self, key: tuple[Any, ...]) -> None:
        depth, level = 0, [key]
        while level:
            depth, self._hashed = depth + 1, self._hashed - sum(map(len, level))
            if depth > _DEEPEST_KEY or self._hashed < 0:
                raise NotPlain("a key of tuples in too many tuples")
            level = [item for one in level for item in one if type(item) is tuple]

    def append(self) -> None:
        item = self._pop()
        self._top(list).append(item)

    def appends(self) -> None:
        items = self._since_mark()
        self._top(list).extend(items)

    def setitem(self) -> None:
        value, key = self._pop(), self._pop()
        self._check_keys([key])
        self._top(dict)[key] = value

    def setitems(self) -> None:
        items = self._since_mark()
        if len(items) % 2:
            raise NotPlain("a value is missing")
        self._check_keys(items[::2])
        self._top(dict).update(zip(items[::2], items[1::2], strict=True))

    def additems(self) -> None:
        items = self._since_mark()
        self._check_keys(items)
        self._top(set).update(items)

    def frozenset_since_mark(self) -> None:
        items = self._since_mark()
        self._check_keys(items)
        self._push(frozenset(items))

    def dict_since_mark(self) -> None:
        items = self._since_mark()
        if len(items) % 2:
            raise NotPlain("a value is missing")
        self._check_keys(items[::2])
        self._push(dict(zip(items[::2], items[1::2], strict=True)))

    def put(self, index: int) -> None:
        if not self._stack or self._stack[-1] is _MARK:
            raise NotPlain("a value is missing")
        self._memo[index] = self._stack[-1]

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise NotPlain("it refers to what is not there")
        self._push(self._memo[index])


_ACTS: dict[bytes, Callable[[_Reader], None]] = {
    b"\x80": _Reader.protocol,
    b"\x95": _Reader.frame,
    b"(": _Reader.mark,
    b"0": _Reader.pop,
    b"1": lambda r: void(r._since_mark()),
    b"2": _Reader.dup,
    b"N": lambda r: r._push(None),
    b"\x88": lambda r: r._push(True),
    b"\x89": lambda r: r._push(False),
    b"I": _Reader.int_line,
    b"L": _Reader.long_line,
    b"J": _Reader.binint,
    b"K": lambda r: r._push(r._number(1)),
    b"M": lambda r: r._push(r._number(2)),
    b"\x8a": lambda r: r.long(1),
    b"\x8b": lambda r: r.long(4),
    b"F": _Reader.float_line,
    b"G": _Reader.binfloat,
    b"V": _Reader.unicode_line,
    b"\x8c": lambda r: r.text(1),
    b"X": lambda r: r.text(4),
    b"\x8d": lambda r: r.text(8),
    b"C": lambda r: r.bytes(1),
    b"B": lambda r: r.bytes(4),
    b"\x8e": lambda r: r.bytes(8),
    b"\x96": _Reader.bytearray,
    b")": lambda r: r._push(()),
    b"t": lambda r: r._push(tuple(r._since_mark())),
    b"\x85": lambda r: r.tuple_of(1),
    b"\x86": lambda r: r.tuple_of(2),
    b"\x87": lambda r: r.tuple_of(3),
    b"]": lambda r: r._push([]),
    b"l": lambda r: r._push(r._since_mark()),
    b"a": _Reader.append,
    b"e": _Reader.appends,
    b"}": lambda r: r._push({}),
    b"d": _Reader.dict_since_mark,
    b"s": _Reader.setitem,
    b"u": _Reader.setitems,
    b"\x8f": lambda r: r._push(set()),
    b"\x90": _Reader.additems,
    b"\x91": _Reader.frozenset_since_mark,
    b"p": lambda r: r.put(int(r._line())),
    b"q": lambda r: r.put(r._number(1)),
    b"r": lambda r: r.put(r._number(4)),
    b"\x94": lambda r: r.put(len(r._memo)),
    b"g": lambda r: r.get(int(r._line())),
    b"h": lambda r: r.get(r._number(1)),
    b"j": lambda r: r.get(r._number(4)),
}

_ACTS_OF = [_ACTS.get(bytes((code,))) for code in range(256)]
_STOP = ord(".")

_IMPORTS = "it is of objects of classes, which pickle would import"
_WHY = dict.fromkeys((b"c", b"\x93", b"i", b"o", b"R", b"b", b"\x81", b"\x92", b"\x82", b"\x83", b"\x84"),
_IMPORTS)


def void(_: object) -> None:
    """For what is dropped."""


def loads(data: bytes) -> Any:
    """The plain value in a pickle of any protocol. Raises `NotPlain`, and nothing else."""
    try:
        return _Reader(data).load()
    except NotPlain:
        raise
    except (ValueError, TypeError, RecursionError, MemoryError, OverflowError) as error:
        raise NotPlain(str(error)) from error  # what is no text or number, or can't be a key
