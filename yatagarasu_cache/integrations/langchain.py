"""The cache of LangChain for what models answer:

    from langchain_core.globals import set_llm_cache
    set_llm_cache(YatagarasuCache("/var/cache/answers", default_expire=7 * 24 * 3600))
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from langchain_core.caches import RETURN_VAL_TYPE, BaseCache
from langchain_core.load.dump import dumps
from langchain_core.load.load import loads
from langchain_core.outputs import Generation

from ..cache import DiskCache
from ..codec import encode_key
from ..codec.signing import Signer
from ..codec.user_secret import user_secret
from ..errors import SerializationError
from ._handles import Use
from ._values import log

__all__ = ["YatagarasuCache"]


class YatagarasuCache(BaseCache):
    """A `BaseCache` on a `DiskCache`, for coroutines too, shared by threads and processes.

    directory: of the cache. secret: with which answers are signed, since LangChain makes objects of what it
    loads; None: the user's own. settings: those of `DiskCache`; `default_expire`: how long they are good.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, secret: bytes | None = None, **settings: Any
    ) -> None:
        self._signer = Signer(user_secret() if secret is None else secret, person=b"langchain")
        self._use = Use(directory, {"on_unreadable": "miss", **settings})

    @property
    def cache(self) -> DiskCache:
        """The cache itself. The tag of an entry is the digest of its `llm_string`, which `clear` takes."""
        return self._use.cache

    def close(self) -> None:
        """End this use of the cache. Others of the same directory go on."""
        self._use.close()

    def lookup(self, prompt: str, llm_string: str) -> RETURN_VAL_TYPE | None:
        """The answer, or None."""
        key = _key(prompt, llm_string)
        return self._loaded(key, self.cache.get(key))

    def update(self, prompt: str, llm_string: str, return_val: RETURN_VAL_TYPE) -> None:
        """Store an answer."""
        key = _key(prompt, llm_string)
        self.cache.set(key, self._dumped(key, return_val), tag=_tag(llm_string))

    def clear(self, *, llm_string: str | None = None, **kwargs: Any) -> None:
        """Remove all answers, or those of one model."""
        if llm_string is None:
            self.cache.clear()
        else:
            self.cache.evict(_tag(llm_string))

    async def alookup(self, prompt: str, llm_string: str) -> RETURN_VAL_TYPE | None:
        """`lookup`, without making the loop wait."""
        key = _key(prompt, llm_string)
        return self._loaded(key, await self._use.aio.get(key))

    async def aupdate(self, prompt: str, llm_string: str, return_val: RETURN_VAL_TYPE) -> None:
        """`update`, likewise."""
        key = _key(prompt, llm_string)
        await self._use.aio.set(key, self._dumped(key, return_val), tag=_tag(llm_string))

    async def aclear(self, *, llm_string: str | None = None, **kwargs: Any) -> None:
        """`clear`, likewise."""
        if llm_string is None:
            await self._use.aio.clear()
        else:
            await self._use.aio.evict(_tag(llm_string))

    def _dumped(self, key: Any, answer: Sequence[Generation]) -> bytes:
        if not all(isinstance(one, Generation) for one in answer):
            raise ValueError("return_val must be a list of Generation")
        return self._signer.signed(encode_key(key), dumps(list(answer)).encode())

    def _loaded(self, key: Any, stored: Any) -> RETURN_VAL_TYPE | None:
        """What cannot be loaded, as by another release of LangChain, is a miss."""
        if type(stored) is not bytes:
            return None
        try:
            text = bytes(self._signer.checked(encode_key(key), stored)).decode()
            answer = loads(text, allowed_objects="core")
        except SerializationError as error:
            log.warning("langchain: taken for a miss: %s", error)
            return None
        except Exception as error:  # whatever its constructors raise
            log.warning("langchain: taken for a miss: %s: %s", type(error).__name__, error)
            return None
        return answer if isinstance(answer, list) else None


def _key(prompt: str, llm_string: str) -> tuple[str, bytes, bytes]:
    """Prompts may be longer than keys."""
    return "langchain", sha256(llm_string.encode()).digest(), sha256(prompt.encode()).digest()


def _tag(llm_string: str) -> bytes:
    return sha256(llm_string.encode()).digest()
