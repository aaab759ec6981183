"""Pickles, signed for their key or not."""

from __future__ import annotations

import hmac
import pickle
from collections.abc import Sequence
from functools import partial
from hashlib import blake2b
from struct import Struct
from typing import Any

from ..backends.base import Buffer
from ..errors import ConfigurationError, SerializationError
from ..store.item import Pieces
from .basics import KIND_CUSTOM


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

    __slots__ = ("_mac", "_old_macs", "_old_secrets", "_protocol", "_secret", "name", "only_others")

    takes_memoryview = True

    def __init__(
        self, secret: bytes | None = None, protocol: int = 5, *, old_secrets: Sequence[bytes] = (),
        only_others: bool = False,
    ) -> None:  # fmt: skip
        if secret is not None and not _is_secret(secret):
            raise ConfigurationError("secret must be bytes, at least one, or None for no signature")
        if not all(map(_is_secret, old_secrets)):  # bytes and str have parts, too
            raise ConfigurationError("old_secrets must be a list of bytes, of at least one each")
        if old_secrets and secret is None:
            raise ConfigurationError("old_secrets need a secret: without one nothing is checked")
        if type(protocol) is not int or not 0 <= protocol <= pickle.HIGHEST_PROTOCOL:
            raise ConfigurationError(f"protocol must be an int from 0 to {pickle.HIGHEST_PROTOCOL}")
        if type(only_others) is not bool:
            raise ConfigurationError("only_others must be True or False")
        self.name = "pickle" if secret is None else "pickle-signed"
        self.only_others = only_others
        self._secret, self._old_secrets = secret, tuple(old_secrets)
        self._protocol = protocol
        self._mac = None if secret is None else _keyed(secret)
        self._old_macs = tuple(map(_keyed, self._old_secrets))

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
        return self._mac is not None and own == tuple(
            getattr(method, "__func__", None) for method in (self.dumps, self.loads)
        )

    def _dumps(self, value: Any, key: bytes) -> bytes | Pieces:
        """`dumps`, signed for the encoded `key`."""
        data = pickle.dumps(value, self._protocol)
        return data if self._mac is None else Pieces((_sign(self._mac, key, data), data))

    def _loads(self, data: Buffer, key: bytes) -> Any:
        """`loads` of what was signed for the encoded `key`."""
        return pickle.loads(data if self._mac is None else self._checked(data, key))

    def _checked(self, data: Buffer, key: bytes) -> memoryview:
        """The pickle behind the signature, if that is right."""
        view = memoryview(data)  # which is cut without a copy
        signature, pickled = view[:_SIGNATURE_BYTES], view[_SIGNATURE_BYTES:]
        for mac in (self._mac, *self._old_macs):
            if mac is not None and hmac.compare_digest(signature, _sign(mac, key, pickled)):
                break
        else:
            raise SerializationError(
                "the signature of a stored pickle is wrong, it was not loaded: the value is damaged,"
                " forged, of another key, or was signed with another secret or by an older release"
            )
        return pickled

    def __reduce__(self) -> tuple[Any, ...]:  # hash objects do not pickle, and caches must
        options: dict[str, Any] = {"old_secrets": self._old_secrets, "only_others": self.only_others}
        return partial(PickleSerializer, **options), (self._secret, self._protocol)

    def __repr__(self) -> str:  # never shows the secret
        others = " only_others=True" if self.only_others else ""
        return f"<PickleSerializer {self.name!r} protocol={self._protocol}{others}>"


_SIGNATURE_BYTES = 32
_SIGNED = Struct("<BI")  # what is signed begins with: kind, length of the key; then the key, then the pickle
_NO_KEY = b""  # no key has this encoding


def _is_secret(secret: object) -> bool:
    return isinstance(secret, bytes) and bool(secret)


def _keyed(secret: bytes) -> blake2b:
    """The keyed hash to begin each signature with."""
    key = blake2b(secret).digest()  # keys have at most 64 bytes, secrets any number
    return blake2b(digest_size=_SIGNATURE_BYTES, key=key, person=b"yatagarasu 2")  # of what is signed so


def _sign(keyed: blake2b, key: bytes, data: Buffer) -> bytes:
    mac = keyed.copy()
    mac.update(_SIGNED.pack(KIND_CUSTOM, len(key)) + key)
    mac.update(data)
    return mac.digest()
