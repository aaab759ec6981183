"""Modules that few values need, loaded when the first of these comes."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from ..concurrency.locks import importing

__all__ = ["module"]


@cache
def module(name: str) -> Any:
    """The module of that name; ImportError if it is not installed. Forks wait until it is loaded."""
    with importing:
        return import_module(name)
