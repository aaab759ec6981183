"""The locks of one handle.

They are taken in this order: `appending` (threads of this handle), `reclaiming`, `checkpointing`, `index`
(everybody's; comments call it "the lock").
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from ..backends.base import Backend
from ..concurrency.file_locks import FileLock, NoLock
from ..concurrency.locks import new_long_lock
from ..config import Settings
from . import format as f
from .notices import Notices


class Locks:
    """All of them. There are no files before `open`, and none for a handle that only reads."""

    def __init__(self) -> None:
        self.appending = new_long_lock()
        self.reclaiming: FileLock | NoLock = NoLock()
        self.checkpointing: FileLock | NoLock = NoLock()
        self.index: FileLock | NoLock = NoLock()

    def open(
        self, backend: Backend, settings: Settings, notices: Notices, on_gone: Callable[[], None]
    ) -> FileLock:
        """Open the files; the lock of the index. `on_gone` is called where one of them was removed."""

        def new_lock(name: str) -> FileLock:
            path, timeout = os.path.join(settings.directory, name), settings.lock_timeout
            lock = FileLock(backend, path, settings.file_mode, timeout, on_gone)
            lock.waiting, lock.on_exit = notices.waiting, notices.say
            return lock

        self.checkpointing = new_lock(f.CHECKPOINT_LOCK_NAME)
        self.reclaiming = new_lock(f.RECLAIM_LOCK_NAME)
        self.index = lock = new_lock(f.LOCK_NAME)
        return lock

    def on_gone(self, on_gone: Callable[[], None]) -> None:
        """Call this from now on where one of the files was removed."""
        for lock in (self.checkpointing, self.reclaiming, self.index):
            if isinstance(lock, FileLock):
                lock.on_gone = on_gone

    def are_mine(self) -> bool:
        """Whether this thread holds one of them: it is in the middle of a change."""
        return bool(
            self.appending._is_owned()  # which whoever takes `reclaiming` holds as well
            or self.index.threads._is_owned()
            or self.checkpointing.threads._is_owned()
        )

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # the last one first, however those before it end
            for lock in (self.index, self.checkpointing, self.reclaiming):
                stack.callback(lock.close)

    def let_go_in_child(self) -> None:
        for lock in (self.index, self.checkpointing, self.reclaiming):
            lock.let_go_in_child()

    def after_fork(self) -> None:
        self.appending = new_long_lock()
        for lock in (self.index, self.checkpointing, self.reclaiming):
            lock.after_fork()
