"""What the adapters for frameworks cost, beside the frameworks' own backends. By itself:

    python -m perf.report.doors [--quick]

No targets: a table of who takes how long. Redis is compared where a server answers at REDIS_URL.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from perf.bed import scratch
from perf.timing import interleave, per_call, ratio

CALLS = 1000
VALUE = {"title": "x" * 200, "items": list(range(100))}  # what views keep


def lines(what: str, runs: Mapping[str, Callable[[], float]], rounds: int) -> Iterator[str]:
    """A line for each peer: ours is the first."""
    taken = interleave(runs, rounds=rounds)
    (ours, mine), *others = taken.items()
    for name, theirs in others:
        a, b = statistics.median(mine) * 1e6, statistics.median(theirs) * 1e6
        yield f"| {what} | {ours} {a:.1f} us | {name} {b:.1f} us | {ratio(mine, theirs):.2f} |"


def django(path: str, rounds: int) -> Iterator[str]:
    from django.conf import settings

    backends = {
        "here": {"BACKEND": "yatagarasu_cache.integrations.django.YatagarasuCache", "LOCATION": f"{path}/ours"},
        "file-based": {"BACKEND": "django.core.cache.backends.filebased.FileBasedCache", "LOCATION": f"{path}/files",
                       "OPTIONS": {"MAX_ENTRIES": 10 * CALLS}},
        "LocMem": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache", "OPTIONS": {"MAX_ENTRIES": 10 * CALLS}},
    }  # fmt: skip
    if os.environ.get("REDIS_URL"):
        backends["Redis"] = {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": os.environ["REDIS_URL"]}
    settings.configure(SECRET_KEY="secret", CACHES={"default": backends["here"], **backends})
    from django.core.cache import caches

    keys = [f"key-{i}" for i in range(CALLS)]
    for what, call in (("set", lambda cache, key: cache.set(key, VALUE)), ("get", lambda cache, key: cache.get(key))):
        runs = {name: partial(per_call, partial(call, caches[name]), keys) for name in backends}
        yield from lines(f"Django `{what}`", runs, rounds)


def flask(path: str, rounds: int) -> Iterator[str]:
    from flask import Flask
    from flask_caching import Cache

    kinds: dict[str, dict[str, Any]] = {
        "here": {"CACHE_TYPE": "yatagarasu_cache.integrations.cachelib.YatagarasuCache",
                 "CACHE_OPTIONS": {"directory": f"{path}/ours", "secret": b"x"}},
        "FileSystemCache": {"CACHE_TYPE": "FileSystemCache", "CACHE_DIR": f"{path}/files", "CACHE_THRESHOLD": 10 * CALLS},
        "SimpleCache": {"CACHE_TYPE": "SimpleCache", "CACHE_THRESHOLD": 10 * CALLS},
    }  # fmt: skip
    caches = {name: Cache(Flask(name), config=config) for name, config in kinds.items()}
    keys = [f"key-{i}" for i in range(CALLS)]
    for what, call in (("set", lambda cache, key: cache.set(key, VALUE)), ("get", lambda cache, key: cache.get(key))):
        runs = {}
        for name, cache in caches.items():
            backend = next(iter(cache.app.extensions["cache"].values()))
            runs[name] = partial(per_call, partial(call, backend), keys)
        yield from lines(f"Flask-Caching `{what}`", runs, rounds)


def joblib(path: str, rounds: int) -> Iterator[str]:
    import numpy as np
    from joblib import Memory

    from yatagarasu_cache.integrations.joblib import register

    register()
    for size in (1000, 1_000_000):
        for mode in (None, "r"):
            kinds = {"here": {"backend": "yatagarasu", "backend_options": {"secret": b"x"}}, "joblib's": {}}
            runs = {}
            for name, options in kinds.items():
                memory = Memory(f"{path}/{name[:4]}-{size}-{mode}", verbose=0, mmap_mode=mode, **options)
                function = memory.cache(lambda i, size=size: np.full(size, i, dtype=np.float64), ignore=[])
                numbers = list(range(20))
                for i in numbers:
                    function(i)
                runs[name] = partial(per_call, lambda i, function=function: function(i)[-1], numbers)
            yield from lines(f"joblib hit, array of {size * 8:,} bytes, mmap_mode={mode}", runs, rounds)


def fsspec(path: str, rounds: int) -> Iterator[str]:
    import fsspec as library

    size, step = 64 << 20, 1 << 20
    with open(f"{path}/file", "wb") as file:
        file.write(os.urandom(size))
    starts = [(i * 7919 * 4096) % (size - step) for i in range(64)]
    kinds = {"here": "yatagarasu", "blockcache": "blockcache", "filecache": "filecache"}
    runs = {}
    for name, protocol in kinds.items():
        fs = library.filesystem(protocol, target_protocol="file", cache_storage=f"{path}/{name}")
        file = fs.open(f"{path}/file", "rb")

        def read(start: int, file: Any = file) -> None:
            file.seek(start)
            assert len(file.read(1 << 16)) == 1 << 16

        runs[name] = partial(per_call, read, starts)
    yield from lines("fsspec, 64 KiB of a file that is kept", runs, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds instead of nine")
    rounds = 3 if parser.parse_args().quick else 9
    print("| what | here | other | times as fast |\n|---|---|---|---|")
    for measure in (django, flask, joblib, fsspec):
        with scratch() as path:
            for line in measure(path, rounds):
                print(line, flush=True)


if __name__ == "__main__":
    main()
