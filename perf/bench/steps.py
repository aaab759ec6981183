"""Where the time of one `get` and one `set` of 4 KiB goes, step by step.

The steps are those of the Python code, which is the specification of the compiled one; the
compiled one is looked at from outside, by what more work costs more.

    python -m perf.bench.steps [--json FILE]
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from xxhash import xxh3_64_intdigest

from perf.bed import KIB, value_of
from perf.suite import Bed, Case, Options, main
from yatagarasu_cache import DiskCache
from yatagarasu_cache.codec import encode_key
from yatagarasu_cache.store import format as f

ENTRIES = 2000
CORE_VARIABLE = "YATAGARASU_CORE"


@contextmanager
def core(name: str) -> Iterator[None]:
    before = os.environ.get(CORE_VARIABLE)
    os.environ[CORE_VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[CORE_VARIABLE]
        else:
            os.environ[CORE_VARIABLE] = before


def opened(directory: str, name: str) -> DiskCache:
    with core(name):
        cache = DiskCache(f"{directory}/steps-{name}", backend="threads")
    value = value_of(4 * KIB)
    cache.set_many((f"key-{i}", value) for i in range(ENTRIES))
    cache.set_many((f"tiny-{i}", b"x") for i in range(ENTRIES))
    for i in range(ENTRIES):
        cache.get(f"key-{i}")
    return cache


Step = Callable[[int], object]


def steps_of_get(cache: DiskCache) -> dict[str, Step]:
    store, index, seed = cache._store, cache._store.current.index, cache._store.current.seed
    backend = store.backend
    keys = [f"key-{i}" for i in range(ENTRIES)]
    encoded = [encode_key(key) for key in keys]
    digests = [f.key_digest(data, seed) for data in encoded]
    slots = [store.finding.lookup(*digest) for digest in digests]
    reads = [(store.files.segments.get(s.segment), s.value_length, s.offset + s.head_bytes) for s in slots if s]
    value = value_of(4 * KIB)
    at = [index.find(*digest) for digest in digests]
    words, touched = index.words, store.limits.policy.touched

    def touch(i: int) -> None:
        words[at[i] + f.S_ACCESS] = touched(words[at[i] + f.S_ACCESS], index.stamp())

    return {
        "encode the key": lambda i: encode_key(keys[i]),
        "digest it (xxh3-128)": lambda i: f.key_digest(encoded[i], seed),
        "find the slot": lambda i: index.find(*digests[i]),
        "unpack the slot": lambda i: f.SLOT.unpack_from(index.map, at[i] * 8),
        "read 4 KiB (`Backend.read_once`)": lambda i: backend.read_once(*reads[i]),
        "verify 4 KiB (xxh3-64)": lambda i: xxh3_64_intdigest(value, i),
        "note the use": touch,
    }


def steps_of_set(cache: DiskCache) -> dict[str, Step]:
    store, index, seed = cache._store, cache._store.current.index, cache._store.current.seed
    value = value_of(4 * KIB)
    encoded = [encode_key(f"key-{i}") for i in range(ENTRIES)]
    slots = [store.finding.lookup(*f.key_digest(data, seed)) for data in encoded]
    places = [(slot, index.find(slot.low, slot.high)) for slot in slots if slot]
    head = f.pack_record(seed, 1 << 32, f.PUT, 0, encoded[0], b"", b"", len(value), 1, 0, 1, 1)
    fd = os.open(f"{cache.directory}.append", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    end = iter(range(0, 1 << 50, len(head) + len(value)))

    store.locks.index.__enter__()  # for good: nobody else uses this cache

    def change(i: int) -> None:
        index.put(*places[i])

    def lock(i: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX)
        fcntl.flock(fd, fcntl.LOCK_UN)

    return {
        "encode and digest the key": lambda i: f.key_digest(encode_key(f"key-{i}"), seed),
        "encode the value": lambda i: cache._desk.encode(value),
        "checksum of 4 KiB": lambda i: f.value_sum(value, i, 0),
        "pack the record": lambda i: f.pack_record(
            seed, 1 << 32, f.PUT, 0, encoded[i], b"", b"", len(value), index.stamp(), 0, 1, 1
        ),
        "append it (`pwritev`)": lambda i: os.pwritev(fd, [head, value], next(end)),
        "lock and unlock (`flock`)": lock,
        "change the index": change,
    }


def wholes(cache: DiskCache) -> dict[str, Step]:
    value = value_of(4 * KIB)
    return {
        "get, no such key": lambda i: cache.get(f"none-{i}"),
        "get of 1 byte": lambda i: cache.get(f"tiny-{i}"),
        "get of 4 KiB": lambda i: cache.get(f"key-{i}"),
        "set of 1 byte": lambda i: cache.set(f"tiny-{i}", b"x"),
        "set of 4 KiB": lambda i: cache.set(f"key-{i}", value),
    }


def layers(cache: DiskCache) -> dict[str, Step]:
    """A read by the system's call, and the same through the contract that backends have."""
    store, seed = cache._store, cache._store.current.seed
    slots = [store.finding.lookup(*f.key_digest(encode_key(f"key-{i}"), seed)) for i in range(ENTRIES)]
    reads = [(store.files.segments.get(s.segment), s.value_length, s.offset + s.head_bytes) for s in slots if s]
    backend = store.backend
    return {
        "`os.pread` of 4 KiB": lambda i: os.pread(*reads[i]),
        "`Backend.read` of 4 KiB": lambda i: backend.read(*reads[i]),
    }


def time_step(step: Step, loops: int) -> float:
    numbers = [i % ENTRIES for i in range(loops)]
    start = time.perf_counter()
    for i in numbers:
        step(i)
    return time.perf_counter() - start


def time_nothing(loops: int) -> float:
    return time_step(lambda i: None, loops)


def cases(bed: Bed, options: Options) -> Iterator[Case]:
    yield Case("the loop itself", "python", 2000, partial(time_step, lambda i: None))
    cache = opened(bed.directory, "python")
    for label, steps in (("get", steps_of_get(cache)), ("set", steps_of_set(cache))):
        for what, step in steps.items():
            yield Case(f"{label}: {what}", "python", 2000, partial(time_step, step))
    for what, step in layers(cache).items():
        yield Case(what, "python", 2000, partial(time_step, step))
    sides = {"python": wholes(cache), "as built": wholes(opened(bed.directory, "auto"))}
    for what in wholes(cache):
        for side, whole in sides.items():
            yield Case(what, side, 2000, partial(time_step, whole[what]))


if __name__ == "__main__":
    main(cases, "perf.bench.steps")
