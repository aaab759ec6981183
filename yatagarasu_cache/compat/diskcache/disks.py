"""`Disk`: what becomes of keys and values. A class derived from it may have a say in that, as in
diskcache."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import pickletools
import zlib
from typing import Any

from .constants import MODE_BINARY, MODE_PICKLE, MODE_RAW, MODE_TEXT, UNKNOWN
from .readers import named

__all__ = ["RAW", "Disk", "JSONDisk"]

Stored = tuple[int, int, "str | None", Any]  # (size, mode, filename, value): filename is None always
RAW: tuple[type, ...] = (bytes, str, int, float)


class Disk:
    """How keys and values are kept, unless a derived class overrides it.

    A cache with this very class keeps what the codec of the store keeps in that form, and pickles anything
    else, signed. One with a derived class calls these methods: `put` and `store` on the way in, `get` and
    `fetch` on the way out, whose pickles are bytes to them; the cache signs whatever they return, and checks
    that before it calls them again.

    secret: signs pickles, in the place of the user's own key (see `secret.user_secret`).
    """

    def __init__(
        self, directory: str | bytes | os.PathLike[str], min_file_size: int = 0,
        pickle_protocol: int = pickle.HIGHEST_PROTOCOL, *, secret: bytes | None = None,
    ) -> None:  # fmt: skip
        self._directory = os.fsdecode(directory)
        self.min_file_size = min_file_size
        self.pickle_protocol = pickle_protocol
        self._secret = secret

    def hash(self, key: Any) -> int:
        """A number that stands for a key, the same in every process."""
        data = repr(self.put(key)).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")

    def put(self, key: Any) -> tuple[Any, bool]:
        """(what is stored for a key, whether that is the key itself)."""
        if type(key) in RAW and (type(key) is not int or key.bit_length() < 64):
            return key, True
        return pickletools.optimize(pickle.dumps(key, protocol=self.pickle_protocol)), False

    def get(self, key: Any, raw: bool) -> Any:
        """The key of which `put` has made that."""
        return key if raw else pickle.loads(key)

    def store(self, value: Any, read: bool, key: Any = UNKNOWN) -> Stored:
        """(size, mode, None, what is stored for a value). `read`: the value is a binary file."""
        if read and type(value) not in RAW:  # these are no files, whatever is said of them
            return 0, MODE_BINARY, None, value
        if type(value) is str and len(value) >= self.min_file_size > 0:
            return len(value), MODE_TEXT, None, value
        if type(value) is bytes and len(value) >= self.min_file_size > 0:
            return len(value), MODE_BINARY, None, value
        if type(value) in RAW:
            return 0, MODE_RAW, None, value
        return 0, MODE_PICKLE, None, pickle.dumps(value, protocol=self.pickle_protocol)

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        """The value of which `store` has made that; for `read` a binary file, if it was one."""
        if mode == MODE_BINARY and not read and hasattr(value, "read"):
            return value.read()
        if mode == MODE_BINARY and read and isinstance(value, bytes):
            return named(io.BytesIO(value))
        if mode == MODE_PICKLE:
            return pickle.loads(value.read() if hasattr(value, "read") else value)
        return value

    def filename(self, key: Any = UNKNOWN, value: Any = UNKNOWN) -> tuple[str, str]:
        """There are no files of single values here."""
        raise NotImplementedError(
            "values have no files of their own here: return the bytes, or an open file, from store()"
        )

    def remove(self, file_path: str) -> None:
        """There are no files of single values here, so there is nothing to remove."""


class JSONDisk(Disk):
    """Keys and values as compressed JSON."""

    def __init__(
        self, directory: str | bytes | os.PathLike[str], compress_level: int = 1, **kwargs: Any
    ) -> None:
        self.compress_level = compress_level
        super().__init__(directory, **kwargs)

    def _packed(self, value: Any) -> bytes:
        return zlib.compress(json.dumps(value).encode("utf-8"), self.compress_level)

    def put(self, key: Any) -> tuple[Any, bool]:
        return super().put(self._packed(key))

    def get(self, key: Any, raw: bool) -> Any:
        return json.loads(zlib.decompress(super().get(key, raw)).decode("utf-8"))

    def store(self, value: Any, read: bool, key: Any = UNKNOWN) -> Stored:
        return super().store(value if read else self._packed(value), read, key=key)

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        data = super().fetch(mode, filename, value, read)
        return data if read else json.loads(zlib.decompress(data).decode("utf-8"))
