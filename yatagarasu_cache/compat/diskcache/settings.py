"""The settings of diskcache that are kept with a cache: in a file of its directory, which nobody believes
unchecked."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from typing import Any

from ...concurrency.interruption import ours
from .constants import DEFAULT_SETTINGS, EVICTION_OF_STORE

__all__ = ["load", "save", "settings_for", "sound"]

_NAME = "diskcache.json"
_LONGEST = 1 << 20
_SCALARS = (str, int, float, bool, type(None))


def load(directory: str) -> dict[str, Any]:
    """Those that are there: names, and values that are scalars. None if there is no such file, or no sound
    one."""
    try:
        fd = os.open(os.path.join(directory, _NAME), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            found = json.loads(file.read(_LONGEST))
    except ours(OSError, ValueError, RecursionError):
        return {}
    return sound(found) if isinstance(found, dict) else {}


def sound(found: dict[str, Any]) -> dict[str, Any]:
    """Those of some settings that may be ones."""
    return {name: value for name, value in found.items() if _is_sound(name, value)}


def settings_for(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of diskcache's that lead to those given of a `DiskCache` (see `limits_of`)."""
    found = {}
    if "eviction" in given:
        found["eviction_policy"] = next(
            name for name, eviction in EVICTION_OF_STORE.items() if eviction == given["eviction"]
        )
    if "size_limit" in given:
        limit = given["size_limit"]
        # Of a small store nothing would be left: then its size counts less than that something is kept.
        found["size_limit"] = max((limit - (1 << 24)) * 4 // 5, limit // 2)
    return found


def _is_sound(name: str, value: Any) -> bool:
    """Whether it may be a setting: what is private to an object, and a secret, never are."""
    if name.startswith("_") or name == "disk_secret":
        return False
    default = DEFAULT_SETTINGS.get(name)
    if isinstance(default, int):
        return isinstance(value, (int, float)) and value >= 0 and (name == "size_limit" or value % 1 == 0)
    return isinstance(value, _SCALARS if default is None else str)


def save(directory: str, settings: dict[str, Any], mode: int) -> None:
    """Replace them, at one moment."""
    path = os.path.join(directory, _NAME)
    aside = f"{path}.{secrets.token_hex(8)}"
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(fd, "w") as file:
            json.dump(settings, file)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
