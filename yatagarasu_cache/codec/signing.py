"""Signatures: what was stored is believed only if who stored it knew the secret."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import blake2b
from struct import Struct

from ..backends.base import Buffer
from ..errors import ConfigurationError, SerializationError
from .basics import KIND_CUSTOM

__all__ = ["Signer"]

_SIGNATURE_BYTES = 32
_SIGNED = Struct("<BI")  # what is signed begins with: kind, length of the key; then the key, then the data


class Signer:
    """Signs data for a key (keyed blake2b), with a secret; what was signed with an old one is right as well.

    what: it is, for the message. person: of the hash, at most 16 bytes; what is signed for another purpose is
    not believed for this one.
    """

    __slots__ = ("_mac", "_old_macs", "_what")

    def __init__(
        self, secret: bytes, old_secrets: Sequence[bytes] = (), *, what: str = "stored value",
        person: bytes = b"yatagarasu 2",
    ) -> None:  # fmt: skip
        if not _is_secret(secret):
            raise ConfigurationError("secret must be bytes, at least one, or None for no signature")
        if not all(map(_is_secret, old_secrets)):  # bytes and str have parts, too
            raise ConfigurationError("old_secrets must be a list of bytes, of at least one each")
        self._mac, self._what = _keyed(secret, person), what
        self._old_macs = tuple(_keyed(old, person) for old in old_secrets)

    def signature(self, key: bytes, data: Buffer) -> bytes:
        return _sign(self._mac, key, data)

    def signed(self, key: bytes, data: Buffer) -> bytes:
        """The data behind their signature."""
        return b"".join((self.signature(key, data), data))

    def checked(self, key: bytes, signed: Buffer) -> memoryview:
        """The data behind the signature; `SerializationError` if that is wrong."""
        view = memoryview(signed)  # which is cut without a copy
        signature, data = view[:_SIGNATURE_BYTES], view[_SIGNATURE_BYTES:]
        for mac in (self._mac, *self._old_macs):
            if hmac.compare_digest(signature, _sign(mac, key, data)):
                return data
        raise SerializationError(
            f"the signature of a {self._what} is wrong, it was not loaded: the value is damaged,"
            " forged, of another key, or was signed with another secret or by an older release"
        )


def _is_secret(secret: object) -> bool:
    return isinstance(secret, bytes) and bool(secret)


def _keyed(secret: bytes, person: bytes) -> blake2b:
    """The keyed hash to begin each signature with."""
    key = blake2b(secret).digest()  # keys have at most 64 bytes, secrets any number
    return blake2b(digest_size=_SIGNATURE_BYTES, key=key, person=person)


def _sign(keyed: blake2b, key: bytes, data: Buffer) -> bytes:
    mac = keyed.copy()
    mac.update(_SIGNED.pack(KIND_CUSTOM, len(key)) + key)
    mac.update(data)
    return mac.digest()
