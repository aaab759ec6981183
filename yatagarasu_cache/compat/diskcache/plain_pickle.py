"""Pickles of plain values, read by code that can neither import nor call anything.

What it knows are the opcodes of scalars and containers (`pickletools` describes all); at any other one it
stops. It makes nothing that is larger than the pickle: a length is compared with what there is before memory
is asked for, and what is remembered is a dict, not an array as long as the largest number in it.

Old protocols write sets and bytes as calls. Those few calls are known by name, and what stands for one of
them is replaced by what it would return; nothing is imported for that.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from .hash_work import HashWork, twice

__all__ = ["NotPlain", "loads"]

_MARK: Any = object()
_MOST_DIGITS = 4000  # of a number in text: Python reads no more by itself


class NotPlain(ValueError):
    """It is damaged, or of something that is no plain value."""


class _Call:
    """What stands for a function until it is called."""

    __slots__ = ("name",)

    def __init__(self, name: bytes) -> None:
        self.name = name


_SETS: dict[bytes, Callable[[list[Any]], Any]] = {b"set": set, b"frozenset": frozenset}
_BYTES: dict[bytes, Callable[[], Any]] = {b"bytes": bytes, b"bytearray": bytearray}
_BUILT_IN = frozenset({*_SETS, *_BYTES})


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._work = HashWork(len(data))
        self._calls = 0  # that were named, and not made yet
        self._copied = len(data)  # bytes and items that calls may still copy: honest ones take each but once

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
                    return self._result()
                what = bytes((code,))
                raise NotPlain(_WHY.get(what, f"it has the opcode {what!r}, which no plain value needs"))
            act(self)
        raise NotPlain("it is cut off")

    def _result(self) -> Any:
        if self._calls:  # then what stands for one is somewhere in the value
            raise NotPlain(_IMPORTS)
        return self._pop()

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
        if type(value) is _Call:
            raise NotPlain(_IMPORTS)
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

    def octets(self, size: int) -> None:
        self._push(self._take(self._number(size)))

    def octet_array(self) -> None:
        self._push(bytearray(self._take(self._number(8))))

    def tuple_of(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(items)))

    def append(self) -> None:
        item = self._pop()
        self._top(list).append(item)

    def appends(self) -> None:
        items = self._since_mark()
        self._top(list).extend(items)

    def _add_pairs(self, keys: list[Any], values: list[Any]) -> None:
        if len(keys) != len(values):
            raise NotPlain("a value is missing")
        target = self._top(dict)
        self._work.add(keys, target)
        size = len(target) + len(keys)
        target.update(zip(keys, values, strict=True))
        if len(target) != size:
            raise twice()

    def setitem(self) -> None:
        value, key = self._pop(), self._pop()
        self._add_pairs([key], [value])

    def setitems(self) -> None:
        items = self._since_mark()
        self._add_pairs(items[::2], items[1::2])

    def dict_since_mark(self) -> None:
        items = self._since_mark()
        self._push({})
        self._add_pairs(items[::2], items[1::2])

    def additems(self) -> None:
        items = self._since_mark()
        target = self._top(set)
        self._work.add(items, target)
        size = len(target) + len(items)
        target.update(items)
        if len(target) != size:
            raise twice()

    def frozenset_since_mark(self) -> None:
        self._push(self._set_of(frozenset, self._since_mark()))

    def _set_of(self, kind: Callable[[list[Any]], Any], items: list[Any]) -> Any:
        self._work.add(items)
        made = kind(items)
        if len(made) != len(items):
            raise twice()
        return made

    # -- calls of old protocols ---------------------------------------------------------------

    def global_lines(self) -> None:
        self._name_call(self._line(), self._line())

    def global_of_stack(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise NotPlain(_IMPORTS)
        self._name_call(module.encode(), name.encode())

    def _name_call(self, module: bytes, name: bytes) -> None:
        if (module, name) != (b"_codecs", b"encode") and (
            module not in (b"builtins", b"__builtin__") or name not in _BUILT_IN
        ):
            raise NotPlain(_IMPORTS)
        self._calls += 1
        self._push(_Call(name))

    def reduce(self) -> None:
        """A call: replaced by what it would return for the arguments that pickle writes."""
        arguments, call = self._pop(), self._pop()
        if type(call) is not _Call or type(arguments) is not tuple:
            raise NotPlain(_IMPORTS)
        self._calls -= 1
        self._copied -= sum([len(one) for one in arguments if type(one) in (str, bytes, list)])
        if self._copied < 0:
            raise NotPlain("it copies the same thing again and again")
        self._push(self._called(call.name, arguments))

    def _called(self, name: bytes, arguments: tuple[Any, ...]) -> Any:
        kinds = tuple(map(type, arguments))
        if name in _SETS and kinds == (list,):
            return self._set_of(_SETS[name], arguments[0])
        if name == b"encode" and kinds == (str, str) and arguments[1] == "latin1":
            return arguments[0].encode("latin-1")
        if name in _BYTES and kinds == ():
            return _BYTES[name]()
        if name == b"bytearray" and kinds == (bytes,):
            return bytearray(arguments[0])
        if name == b"bytearray" and kinds == (str, str) and arguments[1] == "latin-1":
            return bytearray(arguments[0], "latin-1")
        raise NotPlain(_IMPORTS)

    def put(self, index: int) -> None:
        if not self._stack or self._stack[-1] is _MARK:
            raise NotPlain("a value is missing")
        self._memo[index] = self._stack[-1]

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise NotPlain("it refers to what is not there")
        value = self._memo[index]
        self._calls += type(value) is _Call
        self._push(value)


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
    b"C": lambda r: r.octets(1),
    b"B": lambda r: r.octets(4),
    b"\x8e": lambda r: r.octets(8),
    b"\x96": _Reader.octet_array,
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
    b"c": _Reader.global_lines,
    b"\x93": _Reader.global_of_stack,
    b"R": _Reader.reduce,
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
_WHY = dict.fromkeys((b"i", b"o", b"b", b"\x81", b"\x92", b"\x82", b"\x83", b"\x84"), _IMPORTS)


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
