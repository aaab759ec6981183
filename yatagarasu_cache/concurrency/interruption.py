"""Whose an exception is that came up in the middle of something: a signal handler's, another thread's?

A time limit is a TimeoutError as a rule, which is an OSError: taken for one of the disk's it would be a
miss, or a file that is not there, and nobody would hear of it. So code of ours catches what the system
raises by ``except ours(OSError)``.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from opcode import opmap
from types import FrameType, TracebackType
from typing import TypeVar

__all__ = ["descriptor_of", "is_interruption", "ours", "started", "suppressing"]

T = TypeVar("T", bound=BaseException)

_RAISES = frozenset({opmap["RAISE_VARARGS"], opmap["RERAISE"]})
_ENDS = (StopIteration, StopAsyncIteration)  # which compiled code raises without arguments


def ours(*kinds: type[T]) -> tuple[type[T], ...]:
    """What an ``except`` is to catch: `kinds`, but nothing where an interruption came up."""
    return () if _interrupts(sys.exc_info()[1]) else kinds


class suppressing:
    """`contextlib.suppress` of exceptions that are no interruptions."""

    def __init__(self, *kinds: type[BaseException]) -> None:
        self._kinds = kinds

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        return isinstance(error, self._kinds) and not _interrupts(error)


def descriptor_of(
    function: Callable[..., int], *args: object, check: Callable[[int], object] | None = None
) -> int:
    """The descriptor that `function(*args)` gives, which is written in C: os.open, os.dup.

    The interpreter looks for signals as soon as a function in C returns, so one that comes during the
    system call would be raised before the result has a name. Here it is in a list by then, put there by
    C too, and is given back. Callers do nothing else before somebody owns what they get: what is to be looked
    at before is `check`, and where that raises nothing stays open.
    """
    given: list[int] = []
    try:
        given.extend(map(function, *((arg,) for arg in args)))
        if check is not None:
            check(given[0])
        return given[0]
    except BaseException:
        for fd in given:
            with suppressing(OSError):
                os.close(fd)
        raise


def started(thread: threading.Thread) -> bool:
    """Start it. False if there is no thread to be had: a limit of the system, or the end of the interpreter.

    An interruption while it is waited for arrives as itself: Python may hide it in a RuntimeError about the
    lock that it came up at. The thread runs then.
    """
    handled = sys.exc_info()[1]  # by whoever asks for this
    try:
        thread.start()
    except RuntimeError as error:
        hidden = error.__context__
        if hidden is not None and hidden is not handled and is_interruption(hidden):
            raise hidden from None
        return False
    return True


def _interrupts(error: BaseException | None) -> bool:
    if error is None or isinstance(error, OSError) and error.errno is not None:  # which the system gives it
        return False
    return is_interruption(error)


def is_interruption(error: BaseException) -> bool:
    """Whether `error` says nothing about the code in which it came up, and is to be left as it is.

    That is so for what is no Exception, for MemoryError, and for what a signal handler raised or another
    thread (PyThreadState_SetAsyncExc), whatever its type: nobody who only waits for ValueErrors of
    damaged bytes may take a time limit for one.
    """
    if not isinstance(error, Exception) or isinstance(error, MemoryError):
        return True
    last: TracebackType | None = None
    traceback = error.__traceback__
    while traceback is not None:
        if _is_handler(traceback.tb_frame):
            return True
        last, traceback = traceback, traceback.tb_next
    # What another thread raises is a class, made an instance without arguments, where no code raises it.
    return last is not None and not error.args and not isinstance(error, _ENDS) and not _raises(last)


def _is_handler(frame: FrameType) -> bool:
    """Whether a frame is that of a signal handler: one of its arguments is the frame that it interrupted."""
    interrupted = frame.f_back
    if interrupted is None:
        return False
    values = list(frame.f_locals.values())
    return any(
        value is interrupted or (type(value) is tuple and any(part is interrupted for part in value))
        for value in values
    )


def _raises(traceback: TracebackType) -> bool:
    return traceback.tb_frame.f_code.co_code[traceback.tb_lasti] in _RAISES
