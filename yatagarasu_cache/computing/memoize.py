"""Functions whose results are kept in a cache: what `DiskCache.memoize` and `AsyncDiskCache.memoize` make.

A decorated function is an object that is called like the function. In a class it binds as functions do, and
so do its `cache_key` and `invalidate`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Iterable
from types import MethodType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, NoReturn, ParamSpec, Protocol, TypeVar, overload

from ..arguments import encode_meta, encode_tag, expiry
from ..codec import Key, encode_key
from ..concurrency.locks import only_calls
from ..errors import SerializationError
from ..guard import tell
from .call_keys import ByArguments, ByFunction
from .names import described, function_name, why_ambiguous
from .once import Once
from .terms import Terms
from .ways import is_async

if TYPE_CHECKING:
    from .aio_once import AsyncOnce

__all__ = ["AsyncMemoized", "AsyncMemoizing", "Memoized", "Memoizing"]

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R", covariant=True)
S = TypeVar("S")
T = TypeVar("T")

MOST_NAME_BYTES = 4096
"""The longest name or version: with its arguments a key still is short enough."""

_MISSING: Any = object()


class Cache(Protocol):
    """Of a `DiskCache`, what this needs."""

    @property
    def _once(self) -> Once: ...
    def get(self, key: Key, default: Any = None) -> Any: ...
    def delete(self, key: Key) -> bool: ...
    def delete_prefix(self, prefix: tuple[Key, ...]) -> int: ...


class AsyncCache(Protocol):
    """The same of an `AsyncDiskCache`."""

    @property
    def _once(self) -> AsyncOnce: ...
    async def get(self, key: Key, default: Any = None) -> Any: ...
    async def delete(self, key: Key) -> bool: ...
    async def delete_prefix(self, prefix: tuple[Key, ...]) -> int: ...


class _Decorated(Generic[P, R]):
    """What all decorated functions have in common."""

    __slots__ = ("__dict__", "__weakref__", "_function", "_keys", "_name")

    __wrapped__: Callable[..., Any]
    __name__: str
    __qualname__: str

    def __init__(self, function: Callable[..., Any], name: str, keys: ByArguments | ByFunction) -> None:
        functools.update_wrapper(self, function)  # type: ignore[arg-type]
        for ours in ("cache_key", "__cache_key__", "invalidate", "cache_clear"):
            self.__dict__.pop(ours, None)  # of the function itself: it may be another cache's, decorated
        self._function, self._name, self._keys = function, name, keys

    def cache_key(self, /, *args: P.args, **kwargs: P.kwargs) -> Key:
        """The key under which the result of such a call is kept. Raises as the call does."""
        return self._keys.of(args, kwargs)

    __cache_key__ = cache_key

    def __reduce__(self) -> str:
        return self.__qualname__  # as functions are pickled: by name

    def __repr__(self) -> str:
        return f"<memoized {self._name}>"


class Memoized(_Decorated[P, R]):
    """A function whose results are kept in a `DiskCache`."""

    __slots__ = ("_cache", "_get", "_is_direct", "_terms")

    def __init__(
        self, function: Callable[..., Any], name: str, keys: ByArguments | ByFunction, cache: Cache,
        terms: Terms,
    ) -> None:  # fmt: skip
        super().__init__(function, name, keys)
        self._cache, self._terms = cache, terms
        # A hit needs nobody's turn, unless it may be time to compute anew.
        self._is_direct = terms.stale is None and terms.refresh_early is None
        self._get = cache.get if self._is_direct else _miss

    @only_calls
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        key = self._keys.of(args, kwargs)
        value: Any = self._get(key, _MISSING)
        if value is not _MISSING:
            return value  # type: ignore[no-any-return]
        function: Any = functools.partial(self._function, *args, **kwargs)
        try:
            once = self._cache._once
            compute = once.compute if self._is_direct else once.get_or_compute
            return compute(key, function, self._terms)  # type: ignore[no-any-return]
        except BaseException as error:
            tell(error, self._cache)
            raise

    @only_calls
    def invalidate(self, /, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Forget the result of such a call. True if there was one. What is being computed is kept."""
        return self._cache.delete(self._keys.of(args, kwargs))

    @only_calls
    def cache_clear(self) -> int:
        """Forget all results of this function, in all its versions; how many. Walks over the whole cache."""
        return self._cache.delete_prefix((self._name,))

    @overload
    def __get__(self, instance: None, owner: type[Any]) -> Memoized[P, R]: ...

    @overload
    def __get__(
        self: Memoized[Concatenate[S, Q], T], instance: S, owner: type[Any] | None = None
    ) -> Memoized[Q, T]: ...

    def __get__(self, instance: Any, owner: type[Any] | None = None) -> Any:
        return self if instance is None else _Bound(self, instance)


class AsyncMemoized(_Decorated[P, R]):
    """A function whose results are kept in an `AsyncDiskCache`. All but `cache_key` is awaited."""

    __slots__ = ("_cache", "_is_direct", "_terms")

    def __init__(
        self, function: Callable[..., Any], name: str, keys: ByArguments | ByFunction, cache: AsyncCache,
        terms: Terms,
    ) -> None:  # fmt: skip
        super().__init__(function, name, keys)
        self._cache, self._terms = cache, terms
        self._is_direct = terms.stale is None and terms.refresh_early is None

    @only_calls
    async def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        key, cache = self._keys.of(args, kwargs), self._cache
        if self._is_direct:
            value: Any = await cache.get(key, _MISSING)
            if value is not _MISSING:
                return value  # type: ignore[no-any-return]
        function: Any = functools.partial(self._function, *args, **kwargs)
        try:
            once = cache._once
            compute = once.compute if self._is_direct else once.get_or_compute
            return await compute(key, function, self._terms)  # type: ignore[no-any-return]
        except BaseException as error:
            tell(error, cache)
            raise

    # What `inspect.iscoroutinefunction` looks at.
    __code__, __defaults__, __kwdefaults__ = __call__.__code__, None, None

    @only_calls
    async def invalidate(self, /, *args: P.args, **kwargs: P.kwargs) -> bool:
        """As `Memoized.invalidate`."""
        return await self._cache.delete(self._keys.of(args, kwargs))

    @only_calls
    async def cache_clear(self) -> int:
        """As `Memoized.cache_clear`."""
        return await self._cache.delete_prefix((self._name,))

    @overload
    def __get__(self, instance: None, owner: type[Any]) -> AsyncMemoized[P, R]: ...

    @overload
    def __get__(
        self: AsyncMemoized[Concatenate[S, Q], T], instance: S, owner: type[Any] | None = None
    ) -> AsyncMemoized[Q, T]: ...

    def __get__(self, instance: Any, owner: type[Any] | None = None) -> Any:
        return self if instance is None else _Bound(self, instance)


class _CoroutineMemoized(Memoized[P, R]):
    """A coroutine function whose results are kept in a `DiskCache`: only its calls are awaited."""

    __slots__ = ("_awaited",)

    def __init__(
        self, function: Callable[..., Any], name: str, keys: ByArguments | ByFunction, cache: Cache,
        terms: Terms,
    ) -> None:  # fmt: skip
        super().__init__(function, name, keys, cache, terms)
        from .. import AsyncDiskCache  # here there are coroutines, so asyncio is there

        beside = AsyncDiskCache._beside(cache)  # type: ignore[arg-type]
        self._awaited: AsyncMemoized[..., Any] = AsyncMemoized(function, name, keys, beside, terms)

    @only_calls
    async def __call__(self, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return await self._awaited(*args, **kwargs)

    __code__, __defaults__, __kwdefaults__ = __call__.__code__, None, None


class _Bound:
    """A decorated function bound to an object, as a method is. All else of it is the function's."""

    __slots__ = ("__func__", "__self__")

    def __init__(self, function: Any, instance: Any) -> None:
        self.__func__, self.__self__ = function, instance

    @only_calls
    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    def cache_key(self, /, *args: Any, **kwargs: Any) -> Key:
        key: Key = self.__func__.cache_key(self.__self__, *args, **kwargs)
        return key

    __cache_key__ = cache_key

    @only_calls
    def invalidate(self, /, *args: Any, **kwargs: Any) -> Any:
        return self.__func__.invalidate(self.__self__, *args, **kwargs)

    # Else it were that of this class. (Of the class itself it is no name, which nobody needs.)
    __module__ = property(lambda self: self.__func__.__module__)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(self.__func__.__wrapped__, self.__self__))

    @property
    def __doc__(self) -> Any:  # type: ignore[override]
        return self.__func__.__doc__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__func__, name)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Bound):
            return NotImplemented
        return self.__func__ is other.__func__ and self.__self__ is other.__self__

    def __hash__(self) -> int:
        return hash((id(self.__self__), id(self.__func__)))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.__self__, self.__func__.__name__)

    def __repr__(self) -> str:
        return f"<bound {self.__func__!r} of {self.__self__!r}>"


class _MemoizedClassMethod:
    """What ``memoize`` above ``classmethod`` makes: bound to the class it is asked of."""

    __slots__ = ("__func__",)

    def __init__(self, function: Any) -> None:
        self.__func__ = function

    def __get__(self, instance: Any, owner: type[Any] | None = None) -> _Bound:
        return _Bound(self.__func__, type(instance) if owner is None else owner)


def _miss(key: Key, default: Any) -> Any:
    return default


# -- decorating -----------------------------------------------------------------------------------


class _Decorator:
    """The options of a ``memoize``, and what it makes of a function."""

    def __init__(
        self, *, name: str | None = None, expire: float | None = None, tag: Key = None, meta: Any = None,
        stale: float | None = None, refresh_early: float | None = None, wait: float | None = None,
        key: Callable[..., Key] | None = None, ignore: Iterable[str | int] = (), typed: bool = False,
        version: Key = None, condition: Callable[[Any], bool] | None = None,
    ) -> None:  # fmt: skip
        _check_name(name, version)
        _check_function("key", key)
        _check_function("condition", condition)
        if isinstance(ignore, (str, int)):
            ignore = (ignore,)
        if not isinstance(ignore, Iterable):
            raise TypeError(f"ignore takes names and positions of parameters, not {ignore!r}")
        self._ignore = tuple(ignore)
        if key is not None and (typed or self._ignore):
            raise ValueError("key= alone says what a key is made of: leave out typed= and ignore=")
        expiry(expire, None)
        if tag is not None:
            encode_tag(tag)
        if meta is not None:
            encode_meta(meta)
        self._name, self._key, self._typed, self._version = name, key, typed, version
        self._terms = Terms(expire, tag, meta, stale, refresh_early, wait, condition)

    def _make(self, kind: Callable[..., Any], cache: Any, function: Any) -> Any:
        """`function`, decorated: an object of `kind`."""
        if isinstance(function, classmethod):
            return _MemoizedClassMethod(self._make(kind, cache, function.__func__))
        if isinstance(function, staticmethod):
            return staticmethod(self._make(kind, cache, function.__func__))
        self._check(function)
        name = self._name or function_name(function)
        keys: ByArguments | ByFunction
        if self._key is not None:
            keys = ByFunction(function, self._key, name, self._version)
        else:
            keys = ByArguments(function, name, self._version, self._typed, self._ignore)
        return kind(function, name, keys, cache, self._terms)

    def _check(self, function: Any) -> None:
        if isinstance(function, str):
            _refuse(f"memoize takes its options by keyword: name={function!r}")
        if not callable(function):
            _refuse(f"memoize decorates functions, not {type(function).__qualname__}")
        if isinstance(function, type):
            _refuse(f"memoize decorates functions, and {function.__qualname__} is a class: try its methods")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            _refuse(f"{described(function)}() is a generator, which can't be kept: have it return a list")
        if self._name is None and self._key is None and (why := why_ambiguous(function)) is not None:
            _refuse(
                f"the name of {described(function)} does not tell it apart from other functions ({why}):"
                " give memoize a name= that does, or key="
            )


def _check_name(name: str | None, version: Key) -> None:
    if name is not None and (type(name) is not str or not name):
        raise TypeError(f"name must be a str that is not empty, not {name!r}")
    for what, value in (("name", name), ("version", version)):
        try:
            length = len(encode_key(value))
        except SerializationError as error:
            raise SerializationError(f"{what}: {error}") from error
        if length > MOST_NAME_BYTES:
            raise ValueError(f"{what} takes {length} bytes, {MOST_NAME_BYTES} are allowed")


def _check_function(what: str, function: Any) -> None:
    if function is not None and (not callable(function) or is_async(function)):
        raise TypeError(f"{what} must be a function that is no coroutine function, not {function!r}")


def _refuse(why: str) -> NoReturn:
    raise TypeError(why)


class Memoizing(_Decorator):
    """``DiskCache.memoize(...)``, to be called with a function."""

    def __init__(self, cache: Cache, **options: Any) -> None:
        super().__init__(**options)
        self._cache = cache

    def __call__(self, function: Callable[P, T], /) -> Memoized[P, T]:
        target = function.__func__ if isinstance(function, (classmethod, staticmethod)) else function
        kind = _CoroutineMemoized if is_async(target) else Memoized
        decorated: Memoized[P, T] = self._make(kind, self._cache, function)
        return decorated


class AsyncMemoizing(_Decorator):
    """``AsyncDiskCache.memoize(...)``, to be called with a coroutine function, or one for threads."""

    def __init__(self, cache: AsyncCache, **options: Any) -> None:
        super().__init__(**options)
        self._cache = cache

    @overload
    def __call__(self, function: Callable[P, Awaitable[T]], /) -> AsyncMemoized[P, T]: ...

    @overload
    def __call__(self, function: Callable[P, T], /) -> AsyncMemoized[P, T]: ...

    def __call__(self, function: Callable[..., Any], /) -> Any:
        return self._make(AsyncMemoized, self._cache, function)
