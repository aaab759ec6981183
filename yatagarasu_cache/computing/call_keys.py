"""From a call of a function to a key: ``(name, version, form, part, part, ...)``.

The name comes first, so that a prefix finds all that belongs to a function. The form says which parameters
the parts are those of: results are not taken for others when a parameter comes, goes or moves. Arguments are
bound to parameters as Python does it, and defaults are applied, so all ways to write a call have one key.
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter
from typing import Any

from ..codec import Key, encode_key
from ..errors import SerializationError
from .digests import LARGEST_IN_CLEAR, LONGEST_IN_CLEAR, Undigestible, argument_part
from .names import described

__all__ = ["ByArguments", "ByFunction"]

MOST_PARTS = 32
"""Arguments that have a part each; more of them are one digest, so that the key does not grow too long."""

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_STARS: dict[Any, str] = {Parameter.VAR_POSITIONAL: "*", Parameter.VAR_KEYWORD: "**"}


class ByFunction:
    """Keys that a function of the caller's makes, ``key(*args, **kwargs)``."""

    def __init__(
        self, function: Callable[..., Any], key: Callable[..., Key], name: str, version: Key
    ) -> None:
        self._name = described(function)
        self._key = key
        self._head = (name, version, "key")

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Key:
        """The key of a call. `SerializationError` if the function returns what is no key."""
        key = self._key(*args, **kwargs)
        if type(key) is not str and type(key) is not int:
            try:
                encode_key(key)
            except SerializationError as error:
                raise SerializationError(f"what key() returns for {self._name}(): {error}") from error
        return (*self._head, key)


class ByArguments:
    """Keys made of a call's arguments.

    What wraps another function, as decorators do, is taken to have that one's parameters. A call that does
    not fit them may still fit the wrapper (which adds an argument, say): then it is bound to that one's.
    """

    def __init__(
        self, function: Callable[..., Any], name: str, version: Key, typed: bool, ignore: Iterable[str | int],
        *, as_wrapper: bool = False,
    ) -> None:  # fmt: skip
        self._name, self._typed = described(function), typed
        parameters = _parameters(function, follow_wrapped=not as_wrapper)
        if parameters is None:
            raise TypeError(f"memoize cannot tell the parameters of {self._name}: give it key=")
        self._as_wrapper: ByArguments | None = None
        is_wrapper = not as_wrapper and hasattr(function, "__wrapped__")
        if is_wrapper and (own := _parameters(function, follow_wrapped=False)) is not None:
            known = [one for one in ignore if _is_known(one, own)]
            self._as_wrapper = ByArguments(function, name, version, typed, known, as_wrapper=True)
        self._is_method = _is_method(function, parameters)
        self._first = parameters[0].name if parameters else None
        ignored = self._ignored(ignore, parameters)
        counted = [one for one in parameters if one.name not in ignored]
        self._ignored_keywords = ignored.difference(one.name for one in parameters)
        form = ", ".join(_STARS.get(one.kind, "") + one.name for one in counted)
        self._head = (name, version, f"{'typed ' if typed else ''}({form})")
        self._names = [one.name for one in counted]
        makers: dict[Any, Any] = {Parameter.VAR_POSITIONAL: self._more, Parameter.VAR_KEYWORD: self._others}
        self._groups = {at: makers[one.kind] for at, one in enumerate(counted) if one.kind in makers}
        self._bind = _binder(function, parameters, counted)

    def _ignored(self, ignore: Iterable[str | int], parameters: list[Parameter]) -> set[str]:
        """The names of what is ignored: parameters, and keywords of a function that takes any."""
        names = [one.name for one in parameters]
        positional = [one.name for one in parameters if one.kind in _POSITIONAL]
        takes_any = any(one.kind is Parameter.VAR_KEYWORD for one in parameters)
        ignored = set()
        for one in ignore:
            if type(one) is int:
                if not 0 <= one < len(positional):
                    raise ValueError(
                        f"ignore: {self._name}() has {len(positional)} parameters that are given by"
                        f" position, and none at position {one} (the first has position 0)"
                    )
                ignored.add(positional[one])
            elif type(one) is str:
                if one.lstrip("*") not in names and not takes_any:
                    raise ValueError(
                        f"ignore: {self._name}() has no parameter {one!r};"
                        f" it has {', '.join(names) or 'none'}"
                    )
                ignored.add(one.lstrip("*"))
            else:
                raise TypeError(f"ignore takes names and positions of parameters, not {one!r}")
        return ignored

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Key:
        """The key of a call.

        Raises TypeError for arguments that the function does not take, and `SerializationError` (which is one
        too) for an argument that has no stable digest.
        """
        try:
            values: tuple[Any, ...] = self._bind(*args, **kwargs)
        except TypeError:
            if self._as_wrapper is None:
                raise
            return self._as_wrapper.of(args, kwargs)
        for value in values:  # as `argument_part` does, without calls: most arguments are their own parts
            kind = type(value)
            if kind is str or kind is bytes:
                if len(value) > LONGEST_IN_CLEAR:
                    break
            elif kind is int:
                if not -LARGEST_IN_CLEAR < value < LARGEST_IN_CLEAR:
                    break
            elif value is not None:
                break
        else:
            if len(values) <= MOST_PARTS:
                return self._head + values
        return self._head + self._parts(values)

    def _parts(self, values: tuple[Any, ...]) -> tuple[Key, ...]:
        typed, groups = self._typed, self._groups
        parts: list[Key] = []
        try:
            for value in values:
                if groups and (group := groups.get(len(parts))) is not None:
                    parts.append(group(value))
                else:
                    parts.append(argument_part(value, typed))
        except Undigestible as error:
            raise SerializationError(self._why_not(self._names[len(parts)], value, error)) from error
        return _grouped(parts)

    def _more(self, given: tuple[Any, ...]) -> tuple[Key, ...]:
        """The part of ``*args``."""
        return _grouped([argument_part(value, self._typed) for value in given])

    def _others(self, given: Mapping[str, Any]) -> tuple[Key, ...]:
        """The part of ``**kwargs``: names, and behind each its value."""
        parts: list[Key] = []
        for name in sorted(given.keys() - self._ignored_keywords):
            try:
                parts += [argument_part(name, True), argument_part(given[name], self._typed)]
            except Undigestible as error:
                raise SerializationError(self._why_not(name, given[name], error)) from error
        return _grouped(parts)

    def _why_not(self, name: str, value: Any, error: Undigestible) -> str:
        kind = type(value).__qualname__
        if self._is_method and name == self._first:
            return (
                f"{self._name}() is a method, and {name}, of type {kind}, can't be part of its key ({error}):"
                " give the class a __cache_key__, an attribute or a method, that tells its objects apart; or"
                f" leave it out, with ignore=({name!r},), if the results don't depend on it"
            )
        return (
            f"the argument {name!r} of {self._name}(), of type {kind}, can't be part of a key ({error}):"
            f" leave it out, with ignore=({name!r},); or give memoize a function key=, or the class a"
            " __cache_key__"
        )


def _parameters(function: Callable[..., Any], *, follow_wrapped: bool) -> list[Parameter] | None:
    """Those of a function, or of what it wraps; None if nobody knows them."""
    try:
        return list(inspect.signature(function, follow_wrapped=follow_wrapped).parameters.values())
    except ValueError:
        return None


def _is_known(ignored: str | int, parameters: list[Parameter]) -> bool:
    """Whether a function with these parameters has one that is to be ignored, or may be given it."""
    if type(ignored) is int:
        return 0 <= ignored < sum(one.kind in _POSITIONAL for one in parameters)
    names = [one.name for one in parameters if one.kind is not Parameter.VAR_KEYWORD]
    return ignored in names or any(one.kind is Parameter.VAR_KEYWORD for one in parameters)


def _grouped(parts: list[Key]) -> tuple[Key, ...]:
    """Parts as they are; if they are many, their number and digest as one: no argument's part is like it."""
    return tuple(parts) if len(parts) <= MOST_PARTS else ((len(parts), argument_part(parts, True)),)


def _binder(
    function: Callable[..., Any], parameters: list[Parameter], counted: list[Parameter]
) -> Callable[..., tuple[Any, ...]]:
    """A function that takes what `function` takes, and returns the arguments that count, defaults applied.

    It is written and compiled, as `collections.namedtuple` does it: nothing binds arguments faster than
    Python itself, or has other opinions of which calls are wrong.
    """
    if not all(one.name.isidentifier() and not keyword.iskeyword(one.name) for one in parameters):
        raise TypeError(f"memoize cannot write the parameters of {described(function)}: give it key=")
    listed = ", ".join(_written(parameters))
    source = f"lambda {listed}: ({''.join(f'{one.name}, ' for one in counted)})"
    binder: Any = eval(source, {"__builtins__": {}})
    defaults = {one.name: one.default for one in parameters if one.default is not Parameter.empty}
    positional = {one.name for one in parameters if one.kind in _POSITIONAL}
    binder.__defaults__ = tuple([default for name, default in defaults.items() if name in positional])
    binder.__kwdefaults__ = {name: default for name, default in defaults.items() if name not in positional}
    binder.__name__ = getattr(function, "__name__", "call")
    binder.__qualname__ = described(function)
    bind: Callable[..., tuple[Any, ...]] = binder
    return bind


def _written(parameters: list[Parameter]) -> Iterable[str]:
    """Parameters as they are written in a function, with None for their defaults."""
    starred, before = False, None
    for one in parameters:
        if before is Parameter.POSITIONAL_ONLY is not one.kind:
            yield "/"
        if one.kind is Parameter.KEYWORD_ONLY and not starred:
            yield "*"
        starred |= one.kind in (Parameter.KEYWORD_ONLY, Parameter.VAR_POSITIONAL)
        yield _STARS.get(one.kind, "") + one.name + ("" if one.default is Parameter.empty else "=None")
        before = one.kind
    if before is Parameter.POSITIONAL_ONLY:
        yield "/"


def _is_method(function: Callable[..., Any], parameters: list[Parameter]) -> bool:
    """Whether it was defined in the body of a class, with a first parameter for an object of that."""
    above = getattr(function, "__qualname__", "").rpartition(".")[0]
    return bool(above and not above.endswith("<locals>") and parameters and parameters[0].kind in _POSITIONAL)
