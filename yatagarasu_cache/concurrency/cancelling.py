"""Changes whose caller was cancelled, and waits only until nothing more takes effect.

A thread cannot be stopped from outside. So a task that is cancelled asks its worker thread to end. The
thread heeds that (`heed`) where it waits without bound, which is for a lock that others hold, and between
the parts of a long change. There it raises `GivenUp`: unwinding leaves everything incomplete as it had
been. Work that is running is not interrupted.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

__all__ = ["Call", "GivenUp", "ensure_wanted", "give_up", "heed", "is_heeding", "putting_in_order"]

T = TypeVar("T")


class GivenUp(BaseException):
    """Ends the work of a call that was cancelled. Not an Exception: nobody takes it for a failure."""


class Call:
    """Work for a thread, which begins it unless it is cancelled before."""

    __slots__ = ("_answers", "_chance", "_ends", "_given_up", "done", "is_putting_in_order")

    def __init__(self) -> None:
        self.done = self._given_up = self.is_putting_in_order = False
        self._chance = [None]  # whoever pops it decides: the thread to begin, or `cancel`
        self._answers: deque[Callable[[], None]] = deque()
        self._ends: deque[Callable[[], None]] = deque()

    def cancel(self) -> bool:
        """True if it had not begun: now it never will."""
        try:
            self._chance.pop()
        except IndexError:
            return False
        return True

    @property
    def is_running(self) -> bool:
        return not (self._chance or self.done)

    def work(self, function: Callable[..., T], *args: object) -> T:
        """What the thread does."""
        try:
            if not self.cancel():
                raise GivenUp
            _here.call = self
            return function(*args)
        finally:
            _here.call = None
            self.done = True
            _tell(self._answers)
            _tell(self._ends)

    def ask(self, answer: Callable[[], None]) -> None:
        """Ask the work to end. `answer` is called, in any thread, once nothing more of it takes effect."""
        self._answers.append(answer)
        if self.done or self._given_up:  # set before the work looks for answers: one of both finds this one
            _tell(self._answers)

    def at_end(self, ended: Callable[[], None]) -> None:
        """Have `ended` called, in any thread, when the thread is through with the work."""
        self._ends.append(ended)
        if self.done:
            _tell(self._ends)

    def heed(self) -> None:
        if self._answers and not self._given_up:
            self._given_up = True
            _tell(self._answers)
            if not self.is_putting_in_order:
                raise GivenUp

    def ensure_wanted(self) -> None:
        if self._answers or self._given_up:
            self.give_up()

    def give_up(self) -> NoReturn:
        """Raise `GivenUp`. From here on there is only unwinding, which nothing interrupts."""
        self._given_up = True
        _tell(self._answers)
        raise GivenUp

    def go_on(self) -> None:
        """Begin anew, for those who have not asked it to end by now."""
        self._given_up = False


def _tell(whom: deque[Callable[[], None]]) -> None:
    while whom:
        try:
            tell = whom.popleft()
        except IndexError:  # another thread was here too
            return
        tell()


class _Here(threading.local):
    call: Call | None = None


_here = _Here()


def is_heeding() -> bool:
    """Whether this thread works for a call."""
    return _here.call is not None


def heed() -> None:
    """Called while waiting: raise `GivenUp`, once a call, if this thread's call was cancelled."""
    call = _here.call
    if call is not None:
        call.heed()


def ensure_wanted() -> None:
    """Called before each part, or try, of a change: the same, also after an answer was given."""
    call = _here.call
    if call is not None:
        call.ensure_wanted()


def give_up() -> NoReturn:
    """Raise `GivenUp` because it is known that the call was cancelled."""
    call = _here.call
    if call is not None:
        call.give_up()
    raise GivenUp


@contextlib.contextmanager
def putting_in_order() -> Iterator[None]:
    """The block runs to its end, but whoever asks for an end meanwhile is answered at once: nothing of the
    change takes effect before the next `ensure_wanted`, which ends the work then."""
    call = _here.call
    if call is None:
        yield
        return
    before, call.is_putting_in_order = call.is_putting_in_order, True
    try:
        yield
    finally:
        call.is_putting_in_order = before
