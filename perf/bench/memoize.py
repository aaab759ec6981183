"""Calls of memoized functions that are hits, beside a bare `get` of the same key, and other libraries' hits.

python -m perf.bench.memoize [--quick]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import diskcache

from perf.timing import interleave, per_call
from yatagarasu_cache import DiskCache

Measured = dict[str, Callable[[Any], object]]


class Model:
    __cache_key__ = "model"

    def predict(self, x: int) -> int:
        return x


def area(width: int, height: int = 2, *, unit: str = "m") -> int:
    return width * height


def one(x: Any) -> Any:
    return x


def measured(cache: DiskCache, other: Any) -> Measured:
    """What is timed, each called with one argument that does not matter."""
    memoized, sized, predict = cache.memoize()(one), cache.memoize()(area), cache.memoize()(Model.predict)
    model, theirs, in_memory = Model(), other.memoize()(one), functools.lru_cache(one)
    method = predict.__get__(model)
    calls: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
        "f(1)": (memoized, (1,), {}),
        "f('word')": (memoized, ("word",), {}),
        "f(2.5)": (memoized, (2.5,), {}),
        "f([1, 2])": (memoized, ([1, 2],), {}),
        "area(1)": (sized, (1,), {}),
        "area(height=2, width=1)": (sized, (), {"height": 2, "width": 1}),
        "model.predict(1)": (method, (1,), {}),
    }
    found: Measured = {}
    for name, (function, args, kwargs) in calls.items():
        function(*args, **kwargs)
        key = function.cache_key(*args, **kwargs)
        assert cache.get(key) is not None
        found[f"get of the key of {name}"] = lambda _, key=key: cache.get(key)
        found[name] = lambda _, call=functools.partial(function, *args, **kwargs): call()
    theirs(1), in_memory(1)
    found["diskcache.memoize: f(1)"] = lambda _: theirs(1)
    found["functools.lru_cache: f(1)"] = lambda _: in_memory(1)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    quick = parser.parse_args(arguments).quick
    calls, rounds = (200, 3) if quick else (2000, 31)
    with tempfile.TemporaryDirectory() as place, DiskCache(f"{place}/ours") as cache:
        with diskcache.Cache(f"{place}/theirs") as other:
            sides = measured(cache, other)
            runs = {name: functools.partial(per_call, call, range(calls)) for name, call in sides.items()}
            taken = interleave(runs, rounds)
    medians = {name: statistics.median(times) * 1e6 for name, times in taken.items()}
    for name, median in medians.items():
        bare = medians.get(f"get of the key of {name}")
        beside = "" if bare is None else f"   {median - bare:+.2f} us over the get"
        print(f"{name:45} {median:7.2f} us{beside}")
    print(f"diskcache.memoize takes {medians['diskcache.memoize: f(1)'] / medians['f(1)']:.1f} times as long")


if __name__ == "__main__":
    main()
