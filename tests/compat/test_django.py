"""`DjangoCache`, by a Django that is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment

pytest.importorskip("django")

PROGRAM = """
import io, sys, time
from django.conf import settings
settings.configure(CACHES={"default": {
    "BACKEND": "yatagarasu_cache.compat.diskcache.DjangoCache", "LOCATION": sys.argv[1], "TIMEOUT": 300, "SHARDS": 4,
    "DATABASE_TIMEOUT": 1.0, "KEY_PREFIX": "site", "OPTIONS": {"size_limit": 2**26},
}})
from django.core.cache import cache, caches
class Thing:
    def __eq__(self, other): return type(other) is Thing
assert cache.directory == sys.argv[1]
cache.set("k", {"a": [1]}, tag="t")
assert cache.get("k") == {"a": [1]} and "k" in cache and cache.has_key("k") and cache.get("none", 5) == 5
value, expires, tag = cache.get("k", expire_time=True, tag=True)
assert tag == "t" and 298 < expires - time.time() <= 300
assert not cache.add("k", 1) and cache.add("new", 1) and cache.get_or_set("default", lambda: 7) == 7
cache.set("object", Thing())
assert cache.get("object") == Thing()
cache.set("n", 1, timeout=None)
assert cache.incr("n") == 2 and cache.decr("n", 5) == -3 and cache.get("n", expire_time=True) == (-3, None)
try: cache.incr("missing")
except ValueError as error: assert "missing" in str(error)
else: raise AssertionError
for timeout in (0, -5):
    cache.set("gone", 1, timeout=timeout)
    assert cache.get("gone") is None
cache.set("versioned", 1, version=1), cache.set("versioned", 2, version=2)
assert (cache.get("versioned"), cache.get("versioned", version=2)) == (1, 2)
assert cache.incr_version("versioned") == 2 and cache.get("versioned", version=2) == 1
assert cache.set_many({"x": 1, "y": 2}) == [] and cache.get_many(["x", "y", "z"]) == {"x": 1, "y": 2}
cache.delete_many(["x"])
assert cache.touch("y", 50) and not cache.touch("x") and cache.pop("y") == 2 and not cache.delete("y")
cache.set("file", io.BytesIO(b"data"), read=True)
with cache.read("file") as reader: assert reader.read() == b"data"
calls = []
@cache.memoize(timeout=60, tag="m")
def work(x):
    calls.append(x)
    return x
assert work(1) == work(1) == 1 and calls == [1] and cache.get(work.__cache_key__(1)) == 1 and cache.evict("m") == 1
assert cache.deque("d").maxlen == float("inf") and cache.index("i") is cache.index("i") and cache.cache("c").directory
assert cache.expire() >= 0 and cache.cull() == 0 and cache.stats() and cache.evict("t") == 1
cache.close()
assert cache.get("n") == -3
cache.clear()
assert cache.get("n") is None and len(caches["default"]._cache) == 0
print("right")
"""


def test_a_program(tmp_path: Path) -> None:
    env = {**environment(), "XDG_DATA_HOME": str(tmp_path / "data")}
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)
    assert done.stdout == "right\n", done.stderr
