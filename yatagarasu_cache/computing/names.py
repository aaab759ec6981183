"""What functions and classes are called, so that no two of them share a name, in whatever process they are.

That is module and qualified name, where a module has the name that `codec.naming` gives it. A function of a
module that has none (a notebook, a prompt, ``python -c``) is told apart by its code.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from hashlib import blake2b
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from ..codec.naming import place_of, session_of, stored_class_name

__all__ = ["class_name", "described", "function_name", "why_ambiguous"]

_LAMBDA = "<lambda>"
_Callable = Any  # a function, or whatever else can be called


def function_name(function: _Callable) -> str:
    """The name of a function, ``module:qualified.name``. See `why_ambiguous` for what it is worth."""
    qualified = getattr(function, "__qualname__", None) or type(function).__qualname__
    original = inspect.unwrap(function)
    namespace = getattr(original, "__globals__", {})
    module = getattr(function, "__module__", None) or type(function).__module__
    place = place_of(module, namespace)
    code = getattr(original, "__code__", None)
    if code is not None and (place is None or qualified.endswith(_LAMBDA)):
        qualified += f"#{_code_digest(code)}"
    return f"{place or session_of(namespace)}:{qualified}"


class_name: Callable[[type], str] = functools.lru_cache(maxsize=256)(stored_class_name)
"""The name of a class, ``module:qualified.name``."""


def described(function: _Callable) -> str:
    """A function as messages name it."""
    name = getattr(function, "__qualname__", None)
    return str(name) if name else f"an object of type {type(function).__qualname__}"


def why_ambiguous(function: _Callable) -> str | None:
    """Why the name of a function does not tell it apart from others; None if it does."""
    inspect.unwrap(function)  # ValueError for what wraps itself
    while True:
        why = _why_ambiguous(function)
        if why is not None or not hasattr(function, "__wrapped__"):
            return why
        function = function.__wrapped__


def _why_ambiguous(function: _Callable) -> str | None:
    if isinstance(function, functools.partial):
        return "the arguments of a functools.partial object are no part of its name"
    if isinstance(function, MethodType) or hasattr(function, "__func__"):  # or bound as methods are
        return "it is bound to an object, which is no part of its name"
    if isinstance(function, BuiltinFunctionType):
        owner = function.__self__
        return None if owner is None or isinstance(owner, ModuleType) else "it is bound to an object"
    if isinstance(function, FunctionType):
        return _why_python_function_is(function)
    if not getattr(function, "__qualname__", None) or not getattr(function, "__module__", None):
        return f"objects of type {type(function).__qualname__} have no name"
    return None


def _why_python_function_is(function: FunctionType) -> str | None:
    if function.__name__ == _LAMBDA:
        return "all lambdas have the same name"
    if function.__module__ in (None, "builtins"):  # from exec() with a bare dict
        return "it belongs to no module"
    # A method that uses super() closes over its class, one that calls itself over itself. And a decorator's
    # wrapper, which is called like what it wraps, over that.
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None and any(_content(cell) is wrapped for cell in function.__closure__ or ()):
        return None
    variables = [
        name for name in function.__code__.co_freevars if name not in ("__class__", function.__name__)
    ]
    return f"it closes over {', '.join(variables)}" if variables else None


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty yet
        return None


def _code_digest(code: CodeType) -> str:
    """Of what the code does, not of where it stands: of one release of Python, the same in every process."""
    return blake2b(_code_text(code).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _code_text(value: Any) -> str:
    """Code, or a constant in it, as text that does not depend on the order of a set."""
    if isinstance(value, CodeType):
        numbers = value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_flags
        names = value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars
        constants = ",".join(map(_code_text, value.co_consts))
        return f"code({numbers!r},{value.co_code!r},{names!r},[{constants}])"
    if isinstance(value, frozenset):
        return f"set({','.join(sorted(map(_code_text, value)))})"
    if isinstance(value, tuple):
        return f"({','.join(map(_code_text, value))})"
    return f"{type(value).__name__}:{value!r}"
