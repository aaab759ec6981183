"""Locks between threads that nothing leaves taken, and what this thread holds of these and of other locks.

An exception may come between any two steps of the interpreter: that of Ctrl-C or another signal's handler,
one that a thread throws into another, or lack of memory. No `finally` helps if it comes before the block
has begun, or after its last line. So what a thread holds is not noted down; the locks themselves are asked,
and a public method that ends with an exception gives all of it back (`give_back`).

Signal handlers, destructors and handlers of log records run anywhere, also where this thread is in the
middle of a change. A cache used there would change what is half changed: it refuses (`ensure_not_within`).
"""

from __future__ import annotations

import functools
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any, TypeVar

from ..errors import Reentered
from .cancelling import heed, is_heeding

F = TypeVar("F")
_PACKAGE = __name__.partition(".")[0]
_FACES = (f"{_PACKAGE}.compat.",)  # written as users write: what of it holds locks is called through `guard`
_HEED_EVERY = 0.02  # seconds that a thread working for a task waits before it checks whether to go on
_alone: set[CodeType] = set()
_calling_out: set[CodeType] = set()
_releasing: set[CodeType] = set()
# Held while modules of this package are imported late: forks wait for it (see engine.py), since a child would
# wait for ever for a module that another thread was importing.
importing = threading.RLock()


class _Registry:
    """Weak references to locks. Other threads may add some during an iteration."""

    def __init__(self) -> None:
        self._references: dict[int, weakref.ref[Any]] = {}

    def add(self, lock: Any) -> None:
        key, references = id(lock), self._references
        # In C, where nothing can interrupt it: it is called like a destructor.
        references[key] = weakref.ref(lock, functools.partial(references.pop, key))

    def __iter__(self) -> Iterator[Any]:
        for reference in self._references.copy().values():
            lock = reference()
            if lock is not None:
                yield lock


_thread_locks = _Registry()
_thread_locks.add(importing)
file_locks = _Registry()  # of processes: see file_locks.py


def new_lock() -> Any:
    """A lock between threads that `give_back` knows; the thread that has it may take it again."""
    lock: Any = threading.RLock()
    _thread_locks.add(lock)
    return lock


_RLock: Any = type(threading.RLock())


class _LongLock(_RLock):  # type: ignore[misc]
    """A lock between threads whose holder may be waiting for other processes."""

    def __enter__(self) -> bool:
        return self.acquire(False) or await_lock(self)


def new_long_lock() -> Any:
    """`new_lock`, for one that threads may have to wait for a long time."""
    lock = _LongLock()
    _thread_locks.add(lock)
    return lock


def await_lock(lock: Any, timeout: float | None = None) -> bool:
    """Acquire a lock that another thread has. False if that takes longer than `timeout` seconds."""
    if not is_heeding():
        taken: bool = lock.acquire(timeout=-1 if timeout is None else timeout)
        return taken
    deadline = None if timeout is None else time.monotonic() + timeout
    while not lock.acquire(timeout=_HEED_EVERY):
        heed()
        if deadline is not None and time.monotonic() >= deadline:
            return False
    return True


def runs_alone(function: Any) -> Any:
    """Mark the outermost function of a thread of ours."""
    _alone.add(function.__code__)
    return function


def calls_out(function: F) -> F:
    """Mark a function that calls the caller's code where nothing of ours is under way: that is outside."""
    _calling_out.add(function.__code__)  # type: ignore[attr-defined]
    return function


def only_calls(function: F) -> F:
    """Mark a function that users call, and that calls public methods as they do, holding nothing itself."""
    runs_alone(function)
    return function


def releases(function: F) -> F:
    """Mark a method of a face that sees itself to what `guard.released` does for others."""
    _releasing.add(function.__code__)  # type: ignore[attr-defined]
    return function


def releases_itself(function: Any) -> bool:
    """Whether it is marked so."""
    return function.__code__ in _releasing


def at_the_outside(frame: FrameType | None) -> bool:
    """Whether no function of ours is among the callers, direct or not: `frame` and those above it."""
    while frame is not None and frame.f_code not in _calling_out:
        if _is_ours(frame) and frame.f_code not in _alone:
            return False
        frame = frame.f_back
    return True


def package_of(frame: FrameType) -> str:
    """The package, or the module, whose code runs in a frame."""
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def _is_ours(frame: FrameType) -> bool:
    if package_of(frame) != _PACKAGE:
        return False
    return frame.f_code in _releasing or not str(frame.f_globals["__name__"]).startswith(_FACES)


def is_holding() -> bool:
    """Whether this thread holds any lock of ours."""
    return any(lock.threads._is_owned() for lock in file_locks) or any(
        lock._is_owned() for lock in _thread_locks
    )


def give_back() -> None:
    """Release whatever this thread holds. What it was changing is repaired as after a kill."""
    for file_lock in file_locks:
        file_lock.give_up_own()
    for lock in _thread_locks:
        while lock._is_owned():
            lock.release()


def ensure_not_within(root: str) -> None:
    """Refuse to go on in a thread that holds locks because it is in the middle of something.

    If it holds some but is not, an exception kept it from giving them back: that is done now.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_ours(frame):  # the public method, and what calls this
        frame = frame.f_back
    if not at_the_outside(frame):
        raise Reentered(
            f"the cache in {root!r} is in the middle of a call, which a signal handler, a destructor or a "
            "logging handler has interrupted: have that use the cache later, or in another thread"
        )
    give_back()
