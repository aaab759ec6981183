"""An exception at any step of the package's own code."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import yatagarasu_cache

PACKAGE = str(Path(yatagarasu_cache.__file__).parent)


class Interrupt(BaseException):
    """What comes up; nobody of ours can know it."""


class TimeLimit(TimeoutError):
    """What handlers of SIGALRM raise as a rule: an OSError, as those of the disk are."""


class Interrupter:
    """Counts the steps of our code, and raises at one of them."""

    def __init__(self, at: int, opcodes: bool, error: BaseException) -> None:
        self.at, self.opcodes, self.error, self.steps = at, opcodes, error, 0
        self.where, self.in_destructor = "", False  # where Python drops it
        self.watch: Callable[[], bool] | None = None
        self.seen: list[int] = []  # steps at which that was true
        self.pause = 0.0  # seconds before it is raised, for other threads

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = self.opcodes, not self.opcodes
        return self.step

    def step(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == ("opcode" if self.opcodes else "line"):
            self.steps += 1
            if self.watch is not None and self.watch():
                self.seen.append(self.steps)
            if self.steps == self.at:
                time.sleep(self.pause)
                self.where = f"{frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name}:{frame.f_lineno}"
                # From CPython 3.14 on a generator that is let go of half way takes a step without a line.
                self.in_destructor = frame.f_lineno is None or any(
                    one.f_code.co_name == "__del__" for one in frames(frame)
                )
                raise self.error
        return self.step


def frames(frame: FrameType | None) -> Iterator[FrameType]:
    """`frame`, and those that it was called from."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def steps_of(
    call: Callable[[], object], at: int, opcodes: bool, error: BaseException | None = None,
    watch: Callable[[], bool] | None = None, pause: float = 0.0,
) -> Interrupter:  # fmt: skip
    """Run `call`, interrupted at step `at` if that is above 0; by `error`, which is to arrive, if it is given."""
    interrupter = Interrupter(at, opcodes, error or Interrupt())
    interrupter.watch, interrupter.pause = watch, pause
    before = sys.gettrace()
    sys.settrace(interrupter)
    try:
        call()
        if error is not None and interrupter.where and not interrupter.in_destructor:
            raise AssertionError(f"{error!r} was lost at {interrupter.where}")
    except (Interrupt, TimeLimit):
        pass
    finally:
        sys.settrace(before)
    return interrupter
