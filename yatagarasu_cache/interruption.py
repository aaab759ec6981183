"""Whose an exception is that came up in the middle of something: a signal handler's, another thread's?"""

from __future__ import annotations

from opcode import opmap
from types import FrameType, TracebackType

__all__ = ["is_interruption"]

_RAISES = frozenset({opmap["RAISE_VARARGS"], opmap["RERAISE"]})
_ENDS = (StopIteration, StopAsyncIteration)  # which compiled code raises without arguments


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
