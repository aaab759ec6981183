"""Tells an interruption (a signal handler's exception, another thread's) from an error of the code it hits.

A time limit usually raises a TimeoutError, which is an OSError: taken for one of the disk's, it would become
a miss, or a missing file, and be lost. So our code catches errors of the system by
``except ours(OSError)``.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from opcode import opmap
from types import FrameType, TracebackType
from typing import TypeVar

__all__ = ["descriptor_of", "is_interruption", "is_signals", "ours", "started", "suppressing"]

T = TypeVar("T", bound=BaseException)

_RAISES = frozenset({opmap["RAISE_VARARGS"], opmap["RERAISE"]})
_ENDS = (StopIteration, StopAsyncIteration)  # compiled code raises these without arguments


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
    """The descriptor that `function(*args)`, which is written in C, gives: os.open, os.dup.

    The interpreter looks for signals as soon as a function in C returns, so one that comes during the
    system call would be raised before the result has a name. Here C has put the result into a list by then,
    and it is closed. Callers give what they get an owner at once; what has to be checked before that is up
    to `check`: if it raises, the descriptor is closed.
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
    """Start it. False if it can't be: a limit of the system, or the end of the interpreter.

    An interruption while waiting for the start is raised as itself: Python may hide it in a RuntimeError
    about the lock at which it came. The thread runs then.
    """
    handled = sys.exc_info()[1]  # by the caller
    try:
        thread.start()
    except RuntimeError as error:
        hidden = error.__context__
        if hidden is not None and hidden is not handled and is_interruption(hidden):
            raise hidden from None
        return False
    return True


def _interrupts(error: BaseException | None) -> bool:
    if error is None or isinstance(error, OSError) and error.errno is not None:  # set by the system
        return False
    return is_interruption(error)


def is_interruption(error: BaseException) -> bool:
    """Whether `error` says nothing about the code in which it came up, and must be left as it is.

    That is so for what is no Exception, for MemoryError, and for what a signal handler or another thread
    (PyThreadState_SetAsyncExc) raised, whatever its type: a time limit must not be taken for, say, the
    ValueError of damaged bytes.
    """
    if not isinstance(error, Exception) or isinstance(error, MemoryError):
        return True
    if is_signals(error):
        return True
    last, traceback = None, error.__traceback__
    while traceback is not None:
        last, traceback = traceback, traceback.tb_next
    # Another thread's exception is an instance without arguments, at a place where no code raises it.
    return last is not None and not error.args and not isinstance(error, _ENDS) and not _raises(last)


def is_signals(error: BaseException) -> bool:
    """Whether a signal handler has raised it."""
    # The first frame is the one that has caught it, which the handler may have interrupted and cannot be. It
    # still names the exception, and before Python 3.13 a frame keeps what was seen of its variables: they
    # would keep each other alive.
    traceback = error.__traceback__ and error.__traceback__.tb_next
    while traceback is not None:
        if _is_handler(traceback.tb_frame):
            return True
        traceback = traceback.tb_next
    return False


def _is_handler(frame: FrameType) -> bool:
    """Whether a frame is a signal handler's: one of its arguments is the frame that it interrupted."""
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
