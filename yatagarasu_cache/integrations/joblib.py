"""The store backend of joblib's `Memory`:

    from yatagarasu_cache.integrations import joblib as yatagarasu
    yatagarasu.register()
    memory = Memory("/var/cache/results", backend="yatagarasu", backend_options={"size_limit": 10 << 30})
"""

from __future__ import annotations

import datetime
import io
import json
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast

from joblib import register_store_backend
from joblib._store_backends import CacheItemInfo, CacheWarning, StoreBackendBase, StoreBackendMixin
from joblib.numpy_pickle import dump as dump_pickle
from joblib.numpy_pickle import load as load_pickle

from ..cache import DiskCache
from ..codec import encode_key
from ..codec.arrays import is_array
from ..codec.signing import Signer
from ..codec.user_secret import user_secret
from ..errors import CacheError, SerializationError
from ._handles import Use, settings_among

__all__ = ["YatagarasuStoreBackend", "register"]

_NAME = "yatagarasu"
_OF_JOBLIB = ("compress", "mmap_mode", "secret")
_OF_RESULTS = ("size_limit", "eviction", "segment_size", "max_value_size", "large_value_size")
_CODE_BYTES = 1 << 28  # for the code of functions, which is not evicted
_MAPPED = ("r", "c", "r+", "w+")


def register() -> None:
    """Make ``Memory(backend="yatagarasu")`` known to joblib, in this process."""
    register_store_backend(_NAME, YatagarasuStoreBackend)


class YatagarasuStoreBackend(StoreBackendBase, StoreBackendMixin):
    """Results of functions in a `DiskCache`, and the code of the functions in another one beside it.

    location: the directory. backend_options: the settings of `DiskCache`, for results: `size_limit` is what
    they take at most, and those that were not used for longest go first; the code of functions is not
    evicted, since without it joblib takes all results for outdated. ``compress``: as joblib's, of what is no
    array. ``secret``: with which pickles are signed; None: the user's own.

    An array is stored as it is. With ``mmap_mode="r"`` it is loaded as a read-only view of the stored bytes
    (`DiskCache.view`); with other modes as a copy, since what is stored never changes.
    """

    def configure(
        self, location: str, verbose: int = 1, backend_options: Mapping[str, Any] | None = None
    ) -> None:
        """What joblib calls with the arguments of `Memory`."""
        options = dict(backend_options or {})
        self.location, self.verbose, self._options = os.fspath(location), verbose, options
        self.compress, self.mmap_mode = options.get("compress", False), options.get("mmap_mode")
        if self.mmap_mode not in (None, *_MAPPED):
            raise ValueError(f"mmap_mode must be {', '.join(_MAPPED)} or None, not {self.mmap_mode!r}")
        if self.compress and self.mmap_mode is not None:
            warnings.warn("what is compressed cannot be mapped: mmap_mode is ignored", stacklevel=2)
            self.mmap_mode = None
        secret = options.get("secret")
        self._signer = Signer(user_secret() if secret is None else secret, person=b"joblib")
        settings = settings_among(options, "joblib", _OF_JOBLIB)
        self._results = Use(os.path.join(self.location, "results"), {"on_unreadable": "miss", **settings})
        own = {name: settings[name] for name in settings if name not in _OF_RESULTS}
        limits = {"size_limit": _CODE_BYTES, "eviction": "none", "on_unreadable": "miss"}
        self._functions = Use(os.path.join(self.location, "functions"), {**own, **limits})

    def __reduce__(self) -> tuple[Any, ...]:
        return _configured, (type(self), self.location, self.verbose, self._options)

    @property
    def cache(self) -> DiskCache:
        """That of the results. Keys are ("result", function, arguments) and ("metadata", ...)."""
        return self._results.cache

    # -- results ------------------------------------------------------------------------------

    def load_item(
        self, call_id: Sequence[str], verbose: int = 1, timestamp: float | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        """A result. KeyError if there is none, or none that can be read."""
        key = _key("result", call_id)
        if verbose > 1:
            self._tell(call_id, verbose, timestamp, metadata)
        if self.mmap_mode is not None:
            try:
                return self._viewed(self.cache.view(key))
            except TypeError:  # it is no array
                pass
        found = self.cache[key]
        if type(found) is not bytes:
            return found
        try:
            return load_pickle(io.BytesIO(self._signer.checked(encode_key(key), found)))
        except SerializationError as error:
            raise KeyError(str(error)) from error

    def _viewed(self, view: Any) -> Any:
        if isinstance(view, memoryview):
            raise TypeError("a pickle")
        return view if self.mmap_mode == "r" else view.copy()

    def _tell(
        self, call_id: Sequence[str], verbose: int, timestamp: float | None,
        metadata: Mapping[str, Any] | None,
    ) -> None:  # fmt: skip
        ago = "" if timestamp is None else f"{time.time() - timestamp:.1f}s"
        given = (metadata or {}).get("input_args", {})
        arguments = ", ".join(f"{name}={value}" for name, value in given.items())
        place = f" from {os.path.join(self.location, *call_id)}" if verbose >= 10 else "..."
        print(f"[Memory]{ago: <16}: Loading {os.path.basename(call_id[0])}({arguments}){place}")

    def dump_item(self, call_id: Sequence[str], item: Any, verbose: int = 1) -> None:
        """Store a result; a `CacheWarning` if that is impossible."""
        key = _key("result", call_id)
        if verbose > 10:
            print(f"Persisting in {os.path.join(self.location, *call_id)}")
        try:
            if not is_array(type(item)) or self.compress or not self._kept_as_array(key, item):
                self.cache[key] = self._pickled(key, item)
        except Exception as error:  # whatever pickling raises
            what = f"Unable to cache to disk: {type(error).__name__}: {error}."
            warnings.warn(what, CacheWarning, stacklevel=2)

    def _kept_as_array(self, key: Any, array: Any) -> bool:
        try:
            self.cache[key] = array
            return True
        except SerializationError:  # of objects, say
            return False

    def _pickled(self, key: Any, item: Any) -> bytes:
        file = io.BytesIO()
        dump_pickle(item, file, compress=self.compress)
        return self._signer.signed(encode_key(key), file.getbuffer())

    def contains_item(self, call_id: Sequence[str]) -> bool:
        return _key("result", call_id) in self.cache

    def clear_item(self, call_id: Sequence[str]) -> None:
        self.cache.delete_many([_key("result", call_id), _key("metadata", call_id)])

    def get_metadata(self, call_id: Sequence[str]) -> Any:
        """Of a result; an empty dict if there is none."""
        try:
            return json.loads(self.cache.get(_key("metadata", call_id), "{}"))
        except (CacheError, ValueError, TypeError):
            return {}

    def store_metadata(self, call_id: Sequence[str], metadata: Mapping[str, Any]) -> None:
        try:
            self.cache[_key("metadata", call_id)] = json.dumps(metadata)
        except (CacheError, ValueError, TypeError) as error:
            warnings.warn(f"Unable to cache to disk: {error}.", CacheWarning, stacklevel=2)

    # -- functions ----------------------------------------------------------------------------

    def store_cached_func_code(self, call_id: Sequence[str], func_code: str | None = None) -> None:
        if func_code is not None:
            self._functions.cache[tuple(call_id)] = func_code

    def get_cached_func_code(self, call_id: Sequence[str]) -> str:
        """FileNotFoundError if there is none."""
        code = self._functions.cache.get(tuple(call_id))
        if type(code) is not str:
            raise FileNotFoundError(f"no code is stored of {'/'.join(call_id)}")
        return code

    def contains_path(self, call_id: Sequence[str]) -> bool:
        return tuple(call_id) in self._functions.cache

    def clear_path(self, call_id: Sequence[str]) -> None:
        """Remove a function: its code, and all its results."""
        self._functions.cache.delete(tuple(call_id))
        for what in ("result", "metadata"):
            self.cache.delete_prefix((what, *call_id))

    # -- all of it ----------------------------------------------------------------------------

    def clear(self) -> None:
        self.cache.clear()
        self._functions.cache.clear()

    def get_items(self) -> list[CacheItemInfo]:
        """(path, bytes, time of the last use) of each result, for ``Memory.reduce_size``."""
        return [
            CacheItemInfo(
                os.path.join(self.location, *cast("tuple[str, ...]", entry.key)[1:]), entry.size,
                datetime.datetime.fromtimestamp(entry.accessed or entry.created),
            )
            for entry in self.cache.entries(prefix=("result",))
        ]  # fmt: skip

    def clear_location(self, location: str) -> None:
        """Remove what `get_items` calls so, or everything."""
        if location == self.location:
            return self.clear()
        function, _, arguments = os.path.relpath(location, self.location).rpartition(os.sep)
        self.clear_item([function, arguments])

    def create_location(self, location: str) -> None:
        """Nothing: a cache has no directories."""

    def _open_item(self, f: Any, mode: str) -> NoReturn:
        raise io.UnsupportedOperation("results are entries of a cache, no files: use load_item and dump_item")

    def _item_exists(self, location: str) -> bool:
        function, _, arguments = os.path.relpath(location, self.location).rpartition(os.sep)
        return self.contains_item([function, arguments])

    def _move_item(self, src: str, dst: str) -> NoReturn:
        self._open_item(src, "rb")


def _key(what: str, call_id: Sequence[str]) -> tuple[str, ...]:
    return what, *call_id


def _configured(
    kind: type[YatagarasuStoreBackend], location: str, verbose: int, options: Mapping[str, Any]
) -> YatagarasuStoreBackend:
    """In another process, which may make a `Memory` of its own, too."""
    register()
    backend = kind()
    backend.configure(location, verbose, options)
    return backend
