"""What a handle has to say to whoever keeps the log: each thing once, and never in the middle of a change."""

from __future__ import annotations

import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable

from ..concurrency.interruption import ours, suppressing
from ..log import log as _log


class Notices:
    """Lines for the log. `is_busy` tells whether this thread holds a lock: handlers run what they like."""

    def __init__(self, root: str, is_busy: Callable[[], bool]) -> None:
        self._root, self._is_busy = root, is_busy
        self._topics: set[str] = set()
        self.waiting: deque[str] = deque()
        self.telling: set[int] = set()  # threads that log a line just now

    @property
    def is_telling(self) -> bool:
        """Whether this thread is in the middle of a log call."""
        return bool(self.telling) and threading.get_ident() in self.telling

    def log_once(self, topic: str, line: str) -> None:
        if topic not in self._topics:
            self._topics.add(topic)
            self.waiting.append(line)
            self.say()

    def say(self) -> None:
        """Log what is waiting for that, unless this thread holds a lock: handlers run whatever they like.

        But they don't use this cache, in the middle of a call of which they know nothing (see `entering`).
        """
        thread = threading.get_ident()
        while self.waiting and not self.is_telling and not self._is_busy():
            self.telling.add(thread)
            try:
                with suppressing(IndexError):  # another thread took it
                    self._log(self.waiting.popleft())
            finally:
                self.telling.discard(thread)

    def _log(self, line: str) -> None:
        try:
            _log.warning("%s: %s", self._root, line)
        except ours(Exception):  # a handler's; we go on, and it is told as logging itself does
            if logging.raiseExceptions:
                traceback.print_exc()

    def forget_telling(self) -> None:
        """An exception kept this thread from noting that it had come to an end with that."""
        self.telling.discard(threading.get_ident())

    def after_fork(self) -> None:
        self.telling = set()
