"""A few threads that compute anew, in the background, what callers are served meanwhile."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from ..concurrency import forks
from ..concurrency.interruption import started
from ..concurrency.locks import new_lock, runs_alone

__all__ = ["Background", "refreshes"]

_THREADS = 4
_MOST_WAITING = 256


class Background:
    """At most so many daemon threads, which end when there is nothing to do. What is asked for beyond them
    waits, and beyond a bound is not taken: who needs it asks again."""

    def __init__(self, threads: int = _THREADS, most_waiting: int = _MOST_WAITING) -> None:
        self._most, self._most_waiting = threads, most_waiting
        self.after_fork()

    def after_fork(self) -> None:
        """A child has none of the threads, nor their work."""
        self._waiting: deque[Callable[[], None]] = deque()
        self._threads = 0
        self._guard = new_lock()

    def submit(self, job: Callable[[], None]) -> bool:
        """Have it done, which raises nothing; False if it won't be."""
        with self._guard:
            if len(self._waiting) >= self._most_waiting:
                return False
            self._waiting.append(job)
            if self._threads >= self._most:
                return True
            self._threads += 1
        thread = threading.Thread(target=self._work, name="yatagarasu-refresh", daemon=True)
        if started(thread):
            return True
        with self._guard:
            self._threads -= 1
            if not self._threads and job in self._waiting:
                self._waiting.remove(job)
                return False
        return True

    @runs_alone
    def _work(self) -> None:
        while True:
            with self._guard:
                if not self._waiting:
                    self._threads -= 1
                    return
                job = self._waiting.popleft()
            try:
                job()
            except BaseException:  # the end of this thread; the next job has another one begun
                with self._guard:
                    self._threads -= 1
                raise


refreshes = Background()
forks.register(refreshes.after_fork)
