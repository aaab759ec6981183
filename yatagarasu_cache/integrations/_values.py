"""What adapters do with values of any kind: what the codec keeps is kept so, the rest are signed pickles."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from ..codec import PickleSerializer
from ..codec.user_secret import user_secret
from ..log import log

__all__ = ["log", "signed_pickles"]


def signed_pickles(secret: bytes | None, old_secrets: Sequence[bytes] = ()) -> PickleSerializer:
    """The serializer of those secrets; None: with the user's own (docs/diskcache.md#pickles says where it is).
    For the same secrets it is the same, so that adapters which name them share a handle."""
    return _of(user_secret() if secret is None else secret, tuple(old_secrets))


@functools.lru_cache(maxsize=64)
def _of(secret: bytes, old_secrets: tuple[bytes, ...]) -> PickleSerializer:
    return PickleSerializer(secret, old_secrets=old_secrets, only_others=True)
