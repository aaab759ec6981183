"""Waking those who wait for one thing, be they threads, or tasks of any event loop."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

__all__ = ["Bell"]


class Bell:
    """Rings once. No lock is taken, so that it may ring anywhere, in a destructor too."""

    __slots__ = ("_wakes", "rung")

    def __init__(self) -> None:
        self.rung = False
        self._wakes: deque[Callable[[], object]] = deque()

    def ring(self) -> None:
        self.rung = True
        while self._wakes:
            try:
                wake = self._wakes.popleft()
            except IndexError:  # another thread was here too
                return
            wake()

    def call(self, wake: Callable[[], object]) -> None:
        """Have `wake` called once it rings, in any thread, and once only."""
        self._wakes.append(wake)
        if self.rung:  # set before those who wait are looked for: one of both finds this one
            self.ring()

    def wait(self, seconds: float | None) -> bool:
        """Have this thread wait, `seconds` at most; whether it has rung."""
        if not self.rung and (seconds is None or seconds > 0):
            gate = threading.Lock()  # not an Event, which takes a lock of its own
            gate.acquire()
            self.call(gate.release)
            gate.acquire(timeout=-1 if seconds is None else min(seconds, threading.TIMEOUT_MAX))
        return self.rung

    def silence(self) -> None:
        """In the child of a fork: it has rung, and those who waited are the parent's."""
        self.rung = True
        self._wakes.clear()
