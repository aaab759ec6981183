"""Pickles, signed for their key or not."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from functools import partial
from typing import Any

from ..backends.base import Buffer
from ..errors import ConfigurationError
from ..store.item import Pieces
from .signing import Signer


class PickleSerializer:
    """Any object that pickles, at a price: who can write to the directory can run code in yours.

    With a `secret` each value is authenticated (keyed blake2b) before anything is unpickled, so
    that only those who know the secret can. `secrets.token_bytes(32)` makes a good one; keep it
    out of the cache directory. A cache signs the key along with the value: under another one the
    value is not loaded. What calls `dumps` and `loads` itself, a class derived from this one that
    has its own included, signs the value alone.

    `old_secrets`: what was signed with one of these is loaded too, so that a secret can be replaced.

    `only_others`: pickle only what the default serializer would refuse, and leave the rest to it: any handle
    reads that, and no object of it is made by running code. (A bytearray is pickled, to come back as one.)

    Raises `ConfigurationError` for a secret that is not bytes or is empty, for old secrets without a new one,
    and an unknown protocol.
    """

    __slots__ = ("_old_secrets", "_protocol", "_secret", "_signer", "name", "only_others")

    takes_memoryview = True

    def __init__(
        self, secret: bytes | None = None, protocol: int = 5, *, old_secrets: Sequence[bytes] = (),
        only_others: bool = False,
    ) -> None:  # fmt: skip
        if old_secrets and secret is None:
            raise ConfigurationError("old_secrets need a secret: without one nothing is checked")
        self._signer = None if secret is None else Signer(secret, old_secrets, what="stored pickle")
        if type(protocol) is not int or not 0 <= protocol <= pickle.HIGHEST_PROTOCOL:
            raise ConfigurationError(f"protocol must be an int from 0 to {pickle.HIGHEST_PROTOCOL}")
        if type(only_others) is not bool:
            raise ConfigurationError("only_others must be True or False")
        self.name = "pickle" if secret is None else "pickle-signed"
        self.only_others = only_others
        self._secret, self._old_secrets = secret, tuple(old_secrets)
        self._protocol = protocol

    def dumps(self, value: Any) -> bytes:
        """`value` pickled, behind its signature if there is a secret; raises what pickle raises."""
        return bytes(self._dumps(value, _NO_KEY))

    def loads(self, data: Buffer) -> Any:
        """The object in `data`; raises what pickle raises.

        `SerializationError` when `data` was not signed with this secret: nothing is unpickled then.
        """
        return self._loads(data, _NO_KEY)

    def _signs_alone(self) -> bool:
        """Whether values are signed, and no derived class has a hand in the bytes: then keys can be, too."""
        own = PickleSerializer.dumps, PickleSerializer.loads
        return self._signer is not None and own == tuple(
            getattr(method, "__func__", None) for method in (self.dumps, self.loads)
        )

    def _dumps(self, value: Any, key: bytes) -> bytes | Pieces:
        """`dumps`, signed for the encoded `key`."""
        data = pickle.dumps(value, self._protocol)
        return data if self._signer is None else Pieces((self._signer.signature(key, data), data))

    def _loads(self, data: Buffer, key: bytes) -> Any:
        """`loads` of what was signed for the encoded `key`."""
        return pickle.loads(data if self._signer is None else self._checked(data, key))

    def _checked(self, data: Buffer, key: bytes) -> memoryview:
        """The pickle behind the signature, if that is right."""
        assert self._signer is not None
        return self._signer.checked(key, data)

    def __reduce__(self) -> tuple[Any, ...]:  # hash objects do not pickle, and caches must
        options: dict[str, Any] = {"old_secrets": self._old_secrets, "only_others": self.only_others}
        return partial(PickleSerializer, **options), (self._secret, self._protocol)

    def __repr__(self) -> str:  # never shows the secret
        others = " only_others=True" if self.only_others else ""
        return f"<PickleSerializer {self.name!r} protocol={self._protocol}{others}>"


_NO_KEY = b""  # no key has this encoding
