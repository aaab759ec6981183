"""Which exceptions may leave a public method: errors of this package, and those that are not its business.

That is `CacheError`; errors of arguments; KeyError, MemoryError and RecursionError; whatever is no
`Exception`; and what the caller's own code raised: a method calls serializers, streams, iterables and
mappings that it was given, and signal handlers and other threads interrupt it. Where an exception was raised
tells whose it is: functions that only call the caller's code, or only look at arguments, are marked as
`callers`. Every other exception is a failure of ours, or of the disk, and is raised as one.
"""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from types import CodeType, FrameType, FunctionType, TracebackType
from typing import Any, TypeVar, cast

from .concurrency.interruption import is_interruption
from .concurrency.locks import at_the_outside, give_back, is_holding, releases_itself
from .errors import CacheError, CacheIOError, ClosedError, from_os_error

__all__ = ["all_released", "callers", "constructed", "guarded", "is_callers", "release", "released", "tell"]

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
_PASSING = (CacheError, KeyError, MemoryError, RecursionError)
_callers: set[CodeType] = set()
_UNRELEASED = frozenset({"__init__", "__getattr__", "__getstate__", "__setstate__"})  # there is no store yet
# As in the flags of code (`inspect.CO_...`, which costs more to import than all the rest here).
_GENERATOR, _COROUTINE, _ASYNC_GENERATOR = 0x20, 0x80, 0x200


def callers(function: F) -> F:
    """Mark a function that does nothing but call the caller's code, or look at arguments."""
    _callers.add(function.__code__)
    return function


@callers
def constructed(cls: Callable[..., T], directory: str, options: dict[str, Any]) -> T:
    """`cls(directory, **options)`: the constructor of a subclass is the caller's code."""
    return cls(directory, **options)


def is_callers(error: BaseException) -> bool:
    """Whether an exception came out of a function that is marked as the caller's, or interrupted ours."""
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code in _callers:
            return True
        traceback = traceback.tb_next
    return is_interruption(error)


def tell(error: BaseException, subject: object) -> None:
    """Raise what `error` means to the user of `subject`; return if it may leave as it is.

    Called by the public method that it leaves. First, all locks that this thread holds are released.
    """
    _leave(error, getattr(subject, "_store", None), sys._getframe(2))
    if isinstance(error, Exception):
        _tell(error, subject)


def _leave(error: BaseException, store: Any, caller: FrameType) -> bool:
    """Release the locks of this thread, if nothing of ours is left among the callers. Whether that is so."""
    # A generator that is closed before its end is left in order.
    interrupted = is_interruption(error) and not isinstance(error, GeneratorExit)
    if not (interrupted or is_holding()) or not at_the_outside(caller):
        return False
    give_back()
    if interrupted and store is not None:
        store.was_interrupted()
    return True


def _tell(error: Exception, subject: object) -> None:
    bad_descriptor = isinstance(error, CacheIOError) and error.errno == errno.EBADF  # of a closed handle
    if isinstance(error, _PASSING) and not bad_descriptor or is_callers(error):
        return
    if isinstance(error, TypeError) and _was_no_call(error.__traceback__):
        return
    root = None if isinstance(subject, type) else getattr(subject, "directory", None)
    if root is not None and _is_closed(subject):
        raise ClosedError(f"the cache in {root!r} is closed: open it anew") from error
    if bad_descriptor:
        return
    from .store.index import IndexDamaged  # not for the import of the package

    if isinstance(error, IndexDamaged):
        raise CacheIOError(errno.EIO, f"the index is damaged ({error}): run check(fix=True)", root) from error
    if isinstance(error, OSError):
        raise from_os_error(error, "the cache cannot do this") from error
    raise CacheError(f"internal error, please report it: {type(error).__name__}: {error}") from error


def _was_no_call(traceback: TracebackType | None) -> bool:
    """True if the arguments did not fit the method: it never ran."""
    if traceback is None or traceback.tb_frame.f_globals is not globals():
        return False
    return traceback.tb_next is None


def _is_closed(subject: object) -> bool:
    try:
        return bool(subject.closed)  # type: ignore[attr-defined]
    except Exception:  # it was never opened
        return False


def guarded(method: F) -> F:
    """A public method, generator or coroutine that lets no other exceptions out."""
    flags = method.__code__.co_flags
    if flags & _ASYNC_GENERATOR:
        wrapper = _guarded_async_generator(method)
    elif flags & _COROUTINE:
        wrapper = _guarded_coroutine(method)
    elif flags & _GENERATOR:
        wrapper = _guarded_generator(method)
    else:
        wrapper = _guarded_function(method)
    return cast("F", functools.update_wrapper(wrapper, method))


def released(method: F) -> F:
    """A method of a face that says what diskcache would: it lets all exceptions out, and no locks are left
    behind it. `self._was_left` is called then, if an exception leaves the outermost such method."""
    is_generator = method.__code__.co_flags & _GENERATOR
    wrapper = _released_generator(method) if is_generator else _released_function(method)
    return cast("F", functools.update_wrapper(wrapper, method))


def release(error: BaseException, subject: Any) -> None:
    """What `released` does when `error` leaves a method of `subject`, for one that sees to it itself, since a
    call more would count (`locks.releases`)."""
    if _leave(error, subject._store, sys._getframe(2)):
        subject._was_left()


def all_released(cls: type[T]) -> type[T]:
    """A class whose public methods, and those that Python calls, are `released`."""
    for name, method in vars(cls).copy().items():
        is_called = not name.startswith("_") or name.startswith("__") and name not in _UNRELEASED
        if is_called and isinstance(method, FunctionType) and not releases_itself(method):
            setattr(cls, name, released(method))
    return cls


def _released_function(method: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(self: Any, *args: Any, **options: Any) -> Any:
        try:
            return method(self, *args, **options)
        except BaseException as error:
            release(error, self)
            raise

    return wrapper


def _released_generator(method: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(self: Any, *args: Any, **options: Any) -> Iterator[Any]:
        try:
            yield from method(self, *args, **options)
        except BaseException as error:
            release(error, self)
            raise

    return wrapper


def _guarded_function(method: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(self: object, *args: Any, **options: Any) -> Any:
        try:
            store = getattr(self, "_store", None)
            if store is not None:
                store.entering()
            return method(self, *args, **options)
        except BaseException as error:
            tell(error, self)
            raise

    return wrapper


def _guarded_generator(method: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(self: object, *args: Any, **options: Any) -> Iterator[Any]:
        try:
            store = getattr(self, "_store", None)
            if store is not None:
                store.entering()
            yield from method(self, *args, **options)
        except BaseException as error:
            tell(error, self)
            raise

    return wrapper


def _guarded_coroutine(method: Callable[..., Any]) -> Callable[..., Any]:
    async def wrapper(self: object, *args: Any, **options: Any) -> Any:
        try:
            return await method(self, *args, **options)
        except BaseException as error:
            tell(error, self)
            raise

    return wrapper


def _guarded_async_generator(method: Callable[..., Any]) -> Callable[..., Any]:
    async def wrapper(self: object, *args: Any, **options: Any) -> AsyncIterator[Any]:
        iterator = method(self, *args, **options)
        try:
            async for item in iterator:
                yield item
        except BaseException as error:
            tell(error, self)
            raise
        finally:
            await iterator.aclose()

    return wrapper
