"""The guide's `pages.py`, which has to be importable, and besides `/gets`: a request that looks up so
many of the stock, and as many keys that nobody stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pages

GETS = 50


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    if environ["PATH_INFO"] != "/gets":
        answer: Iterable[bytes] = pages.app(environ, start_response)
        return answer
    found = sum(pages.cache.get(("old", number)) is not None for number in range(GETS))
    found += sum(pages.cache.get(("nobody", number)) is not None for number in range(GETS))
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(found).encode()]
