"""The whole cache against a plain dict, and all backends against one another."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from available import BACKENDS, CORES, on_one_core
from helpers import Clock, disk_bytes, noise
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from yatagarasu_cache import CacheError, DiskCache, SerializationError, StorageFull, ValueTooLarge
from yatagarasu_cache.store import checkpointing, recovery
from yatagarasu_cache.store.format import AHEAD, Identity

pytestmark = pytest.mark.usefixtures("apart")  # each handle stands for a process

TAGS = [None, "red", ("blue", 1)]
LENGTHS = st.one_of(st.integers(0, 1500), st.integers(1000, 3000), st.integers(0, 40_000))


class Known:
    """What the model knows of an entry."""

    def __init__(self, value: Any, created: int, expires: int, tag: Any, meta: Any, turn: int) -> None:
        self.value, self.created, self.expires, self.tag, self.meta = value, created, expires, tag, meta
        self.written = turn
        self.use(turn)

    def is_over(self, now: int) -> bool:
        """Expired, or made by a clock that was ahead: nobody knows how long that should live."""
        return bool(self.expires) and (self.expires <= now or self.created > now + AHEAD)

    def use(self, turn: int) -> None:
        """`used`: the eviction order may take it for used as long ago as this, `latest`: or as late."""
        self.used = self.latest = turn


class CacheMachine(RuleBasedStateMachine):
    """One cache directory, `handles` open caches on it, and a dict that says what they should hold.

    Of the dict only what is not expired must be there, less what eviction took: and that is nothing
    that was used later than anything that is still there.
    """

    handles = 1
    keys = Bundle("keys")

    # -- life -----------------------------------------------------------------------------

    @initialize(
        limit=st.sampled_from([256 << 10, 400 << 10]),
        segment=st.sampled_from([4 << 10, 8 << 10]),
        backend=st.sampled_from(BACKENDS),
        durability=st.sampled_from(["none", "none", "sync"]),
        filled=st.integers(0, 3),
    )
    def begin(self, limit: int, segment: int, backend: str, durability: str, filled: int) -> None:
        self.patch = pytest.MonkeyPatch()
        self.clock = Clock(self.patch, start=1_700_000_000 * 10**9)
        self.directory = tempfile.mkdtemp(prefix="model-")
        self.options = {
            "size_limit": limit, "segment_size": segment, "durability": durability, "max_stream_size": limit
        }  # fmt: skip
        self.limit, self.segment = limit, segment
        self.model: dict[Any, Known] = {}
        self.turn = itertools.count(1)
        self.hits = self.misses = self.evicted = 0
        self.caches: list[DiskCache] = []
        self.open_all(backend)
        for turn in range(filled):
            self.set_many(turn, turn, 150, None, at_once=turn % 2 == 0)

    def open_all(self, backend: str) -> None:
        path = os.path.join(self.directory, "cache")
        self.caches = [DiskCache(path, backend=backend, **self.options) for _ in range(self.handles)]

    def close_all(self) -> None:
        for cache in self.caches:
            cache.close()

    def teardown(self) -> None:
        if not hasattr(self, "patch"):
            return
        try:
            self.read_everything()
            self.close_all()
            cache = DiskCache(os.path.join(self.directory, "cache"), **self.options)
            assert cache.check() == []
            cache.close()
        finally:
            self.close_all()
            self.patch.undo()
            shutil.rmtree(self.directory)

    def read_everything(self) -> None:
        for key, known in self.live().items():
            assert self.caches[0].get(key, "missing") == known.value
        self.settle()

    def cache(self, at: int) -> DiskCache:
        return self.caches[at % self.handles]

    # -- the model ------------------------------------------------------------------------

    def live(self) -> dict[Any, Known]:
        """What is not expired."""
        now = self.clock.now
        return {key: known for key, known in self.model.items() if not known.is_over(now)}

    def expected(self, key: Any) -> Known | None:
        known = self.model.get(key)
        return known if known is not None and not known.is_over(self.clock.now) else None

    def use(self, known: Known) -> None:
        known.use(next(self.turn))

    def asked(self, found: bool) -> None:
        self.hits += found
        self.misses += not found

    def store(self, key: Any, value: Any, expire: float | None, tag: Any = None, meta: Any = None) -> None:
        expires = 0 if expire is None else self.clock.now + int(expire * 1e9)
        self.model[key] = Known(value, self.clock.now, expires, tag, meta, next(self.turn))

    def settle(self) -> None:
        """Take out of the model what was evicted, after seeing that it was the right ones."""
        cache = self.caches[0]
        live = self.live()
        kept = {key for key in live if key in cache}
        gone = live.keys() - kept
        if gone:
            newest_gone = max(live[key].used for key in gone)
            oldest_kept = min((live[key].latest for key in kept), default=newest_gone + 1)
            assert newest_gone <= oldest_kept, "something that was used later was evicted earlier"
            assert cache.volume() > self.limit // 2, "evicted although there was room"
        for key in gone:
            del self.model[key]
        evictions = sum(cache.stats().process["evictions"] for cache in self.caches)
        assert evictions - self.evicted >= len(gone), "entries were lost that nobody evicted"
        self.evicted = evictions

    # -- rules ----------------------------------------------------------------------------

    @rule(
        target=keys,
        key=st.one_of(
            st.integers(0, 30), st.sampled_from(["a", "b", "ab", "abc", ""]),
            st.tuples(st.sampled_from("xy"), st.integers(0, 9)),
        ),
    )  # fmt: skip
    def name(self, key: Any) -> Any:
        return key

    @rule(
        at=st.integers(0, 1), key=keys, length=LENGTHS, seed=st.integers(0, 99), tag=st.sampled_from(TAGS),
        expire=st.sampled_from([None, None, 5, 60]), meta=st.sampled_from([None, {"etag": "x"}]),
        stream=st.booleans(),
    )  # fmt: skip
    def set(
        self, at: int, key: Any, length: int, seed: int, tag: Any, expire: Any, meta: Any, stream: bool
    ) -> None:
        value = noise(length, seed)
        given: Any = (value[n : n + 500] for n in range(0, length, 500)) if stream else value
        assert self.cache(at).set(key, given, expire=expire, tag=tag, meta=meta) is True
        self.store(key, value, expire, tag, meta)

    @rule(
        at=st.integers(0, 1),
        value=st.sampled_from([None, True, 7, -(2**70), "text", 1.5, [1, (2, {3})]]),
        key=keys,
    )
    def set_plain(self, at: int, key: Any, value: Any) -> None:
        self.cache(at)[key] = value
        self.store(key, value, None)

    @rule(
        at=st.integers(0, 1),
        seed=st.integers(0, 999),
        count=st.one_of(st.integers(1, 10), st.integers(50, 200)),
        tag=st.sampled_from(TAGS),
        at_once=st.booleans(),
    )
    def set_many(self, at: int, seed: int, count: int, tag: Any, at_once: bool) -> None:
        random_ = random.Random(seed)
        pairs = []
        for n in range(count):
            length = random_.choice((20, 200, 900, 1500, 2500))
            pairs.append((("many", random_.randrange(400)), noise(length, seed * 1000 + n)))
        if at_once:
            assert self.cache(at).set_many(pairs, tag=tag) == count
        for key, value in pairs:
            if not at_once:
                self.cache(at).set(key, value, tag=tag)
            self.store(key, value, None, tag)

    @rule(at=st.integers(0, 1), key=keys, length=LENGTHS, expire=st.sampled_from([None, 5]))
    def add(self, at: int, key: Any, length: int, expire: Any) -> None:
        absent = self.expected(key) is None
        assert self.cache(at).add(key, noise(length), expire=expire) is absent
        if absent:
            self.store(key, noise(length), expire)

    @rule(at=st.integers(0, 1), key=keys, delta=st.integers(-5, 5))
    def incr(self, at: int, key: Any, delta: int) -> None:
        known = self.expected(key)
        if known is not None and type(known.value) is not int:
            with pytest.raises(TypeError):
                self.cache(at).incr(key, delta)
            self.use(known)
            return
        value = (known.value if known else 0) + delta
        assert self.cache(at).incr(key, delta) == value
        if known:
            known.value, known.written, known.created = value, next(self.turn), self.clock.now
            self.use(known)
        else:
            self.store(key, value, None)

    @rule(at=st.integers(0, 1), key=keys, expire=st.sampled_from([None, 5, 60]))
    def touch(self, at: int, key: Any, expire: Any) -> None:
        known = self.expected(key)
        assert self.cache(at).touch(key, expire) is (known is not None)
        if known:
            known.expires = 0 if expire is None else self.clock.now + expire * 10**9
            self.use(known)

    @rule(at=st.integers(0, 1), key=keys)
    def get(self, at: int, key: Any) -> None:
        known = self.expected(key)
        assert self.cache(at).get(key, "missing") == (known.value if known else "missing")
        self.asked(known is not None)
        if known:
            self.use(known)

    @rule(at=st.integers(0, 1), start=st.integers(0, 300), step=st.integers(1, 5))
    def get_many(self, at: int, start: int, step: int) -> None:
        keys = [("many", n) for n in range(start, start + 20 * step, step)]
        found = self.cache(at).get_many(keys)
        expected = {key: known for key in keys if (known := self.expected(key)) is not None}
        assert found == {key: known.value for key, known in expected.items()}
        self.hits += len(expected)
        self.misses += len(keys) - len(expected)
        # Large ones are read last: among entries asked for at once the order is not promised.
        turn = next(self.turn)
        for known in expected.values():
            known.use(turn)

    @rule(at=st.integers(0, 1), key=keys, load=st.booleans())
    def get_entry(self, at: int, key: Any, load: bool) -> None:
        known = self.expected(key)
        entry = self.cache(at).get_entry(key)
        self.asked(known is not None)
        assert (entry is None) is (known is None)
        if known and entry:
            self.use(known)
            assert (entry.key, entry.tag, entry.meta) == (key, known.tag, known.meta)
            assert entry.expires == (known.expires / 1e9 if known.expires else None)
            if load:
                assert entry.value == known.value

    @rule(at=st.integers(0, 1), key=keys)
    def open(self, at: int, key: Any) -> None:
        known = self.expected(key)
        if known is not None and isinstance(known.value, bytes):
            with self.cache(at).open(key) as file:
                assert file.read() == known.value
            self.use(known)
            self.asked(True)

    @rule(at=st.integers(0, 1), key=keys)
    def pop(self, at: int, key: Any) -> None:
        known = self.expected(key)
        assert self.cache(at).pop(key, "missing") == (known.value if known else "missing")
        self.asked(known is not None)
        if known:
            del self.model[key]

    @rule(at=st.integers(0, 1), key=keys)
    def delete(self, at: int, key: Any) -> None:
        assert self.cache(at).delete(key) is (self.expected(key) is not None)
        self.model.pop(key, None)

    @rule(at=st.integers(0, 1), start=st.integers(0, 300), count=st.integers(0, 200))
    def delete_many(self, at: int, start: int, count: int) -> None:
        keys = [("many", n) for n in range(start, start + count)]
        assert self.cache(at).delete_many(keys) == sum(self.expected(key) is not None for key in keys)
        for key in keys:
            self.model.pop(key, None)

    def remove(self, count: int, chosen: Callable[[Any, Known], bool]) -> None:
        live = self.live()
        gone = [key for key, known in live.items() if chosen(key, known)]
        assert count == len(gone)
        for key in gone:
            del self.model[key]

    @rule(at=st.integers(0, 1), tag=st.sampled_from(TAGS[1:]))
    def evict(self, at: int, tag: Any) -> None:
        self.remove(self.cache(at).evict(tag), lambda key, known: known.tag == tag)

    @rule(at=st.integers(0, 1), prefix=st.sampled_from(["a", "ab", "", ("x",), ("y", 3), ("many",), ()]))
    def delete_prefix(self, at: int, prefix: Any) -> None:
        def begins(key: Any, known: Known) -> bool:
            if isinstance(prefix, tuple):
                return isinstance(key, tuple) and key[: len(prefix)] == prefix
            return isinstance(key, str) and key.startswith(prefix)

        self.remove(self.cache(at).delete_prefix(prefix), begins)

    @rule(at=st.integers(0, 1))
    def clear(self, at: int) -> None:
        assert self.cache(at).clear() >= len(self.live())
        self.model.clear()

    @rule(at=st.integers(0, 1))
    def expire(self, at: int) -> None:
        live = self.live()
        assert self.cache(at).expire() <= len(self.model) - len(live)
        assert self.cache(at).expire() == 0
        self.model = live
        assert len(self.cache(at)) == len(live)

    @rule(at=st.integers(0, 1))
    def cull(self, at: int) -> None:
        before = self.cache(at).stats().process
        culled = self.cache(at).cull()
        after = self.cache(at).stats().process
        assert culled == sum(after[name] - before[name] for name in ("evictions", "expirations"))

    @rule(at=st.integers(0, 1))
    def flush(self, at: int) -> None:
        self.cache(at).flush()

    @rule(at=st.integers(0, 1))
    def walk(self, at: int) -> None:
        keys = list(self.cache(at))
        assert len(keys) == len({*keys})
        assert {*keys} == self.live().keys()
        assert {entry.key for entry in self.cache(at).entries(tag="red")} == {
            key for key, known in self.live().items() if known.tag == "red"
        }

    @rule(seconds=st.sampled_from([0.001, 1, 5, 59, 60]))
    def pass_time(self, seconds: float) -> None:
        self.move_clock(seconds)

    @rule(seconds=st.sampled_from([1, 30, 10_000]))
    def set_clock_back(self, seconds: float) -> None:
        self.move_clock(-seconds)

    def move_clock(self, seconds: float) -> None:
        """What had expired, or was made in the future, may be back, if nobody removed it."""
        live = self.live()
        self.clock.advance(seconds)
        for key in self.live().keys() - live.keys():
            if key not in self.caches[0]:
                del self.model[key]

    @rule(backend=st.sampled_from(BACKENDS))
    def reopen(self, backend: str) -> None:
        self.close_all()
        self.open_all(backend)
        self.evicted = 0
        self.settle()

    @rule(backend=st.sampled_from(BACKENDS))
    def rebuild(self, backend: str) -> None:
        """The index is lost, with the counters, and when entries were used as far as no checkpoint tells."""
        self.close_all()
        os.unlink(os.path.join(self.directory, "cache", "index"))
        expired = self.model.keys() - self.live().keys()
        self.open_all(backend)
        self.evicted = self.hits = self.misses = 0
        for known in self.model.values():
            known.used = known.written
        self.settle()
        assert len(self.live()) <= len(self.caches[0]) <= len(self.live()) + len(expired)

    # -- invariants -----------------------------------------------------------------------

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        if not hasattr(self, "patch"):
            return
        self.settle()
        for cache in self.caches:
            assert len(self.live()) <= len(cache) <= len(self.model)
            assert all(key in cache for key in self.live())

    @invariant()
    def stays_within_its_limit(self) -> None:
        if hasattr(self, "patch"):
            assert disk_bytes(self.directory) <= self.limit + self.segment
            assert self.caches[0].volume() <= self.limit + self.segment

    @invariant()
    def counts_every_get(self) -> None:
        if hasattr(self, "patch"):
            for cache in self.caches:
                cache.stats()
            stats = self.caches[0].stats()
            assert (stats.hits, stats.misses, stats.corrupt) == (self.hits, self.misses, 0)

    @invariant()
    def is_in_order(self) -> None:
        if hasattr(self, "patch"):
            assert self.caches[-1].check() == []


class TwoHandlesMachine(CacheMachine):
    handles = 2


handles = pytest.mark.parametrize("machine", [CacheMachine, TwoHandlesMachine], ids=["one handle", "two handles"])


def run(machine: type[CacheMachine], examples: int, steps: int) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=steps))


@pytest.mark.in_turn
@handles
def test_like_a_dict(core: str, machine: type[CacheMachine]) -> None:
    run(machine, 15, 40)


@pytest.mark.slow
@pytest.mark.timeout(400)
@on_one_core
@handles
def test_like_a_dict_for_long(core: str, machine: type[CacheMachine]) -> None:
    """Longer runs rather than more: what a cache remembers of long ago is what can go wrong."""
    run(machine, 8, 100)


# -- one backend against another ----------------------------------------------------------------

# Ways to run the same sequence. At each reopening the next backend and core of the tuple come in turn.
WAYS: dict[str, list[tuple[str, str]]] = {
    **{f"{backend}-{core}": [(backend, core)] for backend in BACKENDS for core in CORES},
    "in turn": [(backend, core) for backend in BACKENDS for core in CORES],
}


class AtOnce:
    """In place of `threading`: a checkpoint is written when it is due, and not at some moment after."""

    RLock = threading.RLock
    current_thread = threading.current_thread

    class Thread:
        ident = 0

        def __init__(self, *, target: Callable[[], None], name: str, daemon: bool) -> None:
            self.start = target

        def is_alive(self) -> bool:
            return False

        def join(self) -> None:
            pass


class Script:
    """A random sequence of operations, the same for the same seed; `run` gives all that can be seen."""

    def __init__(self, seed: int, steps: int) -> None:
        self.random = random.Random(seed)
        self.steps = [self.step() for _ in range(steps)]

    def key(self) -> Any:
        kind = self.random.randrange(3)
        number = int(self.random.paretovariate(0.3)) % 250
        return (number, f"k{number}", ("t", number))[kind]

    def value(self) -> Any:
        kind = self.random.randrange(12)
        if kind == 0:
            return self.random.choice([None, 5, "text", [1, 2], object(), 1.5])
        lengths = (0, 100, 1000, 2047, 2048, 9000, 700_000)
        weights = (2, 6, 9, 9, 3, 3, 0.6)
        return noise(self.random.choices(lengths, weights)[0], self.random.randrange(1000))

    def step(self) -> tuple[str, tuple[Any, ...]]:
        random_ = self.random
        name = random_.choices(
            ["set", "stream", "get", "get_many", "set_many", "add", "incr", "touch", "pop", "delete",
             "delete_many", "evict", "prefix", "expire", "cull", "open", "entry", "time", "reopen", "clear"],
            [30, 3, 30, 5, 5, 5, 5, 3, 2, 3, 1, 0.2, 0.2, 1, 0.2, 2, 3, 5, 1, 0.05],
        )[0]  # fmt: skip
        arguments: dict[str, Callable[[], tuple[Any, ...]]] = {
            "set": lambda: (
                self.key(), self.value(), random_.choice([None, None, None, 0.5, 20, -1]),
                random_.choice([None, "red", "blue"]),
            ),
            "stream": lambda: (self.key(), random_.randrange(6000), random_.randrange(99)),
            "get_many": lambda: ([self.key() for _ in range(20)],),
            "set_many": lambda: ({self.key(): self.value() for _ in range(20)},),
            "add": lambda: (self.key(), self.value()),
            "touch": lambda: (self.key(), random_.choice([None, 0.5, 20])),
            "delete_many": lambda: ([self.key() for _ in range(10)],),
            "evict": lambda: (random_.choice(["red", "blue"]),),
            "prefix": lambda: (random_.choice(["k1", "k", ("t",)]),),
            "time": lambda: (random_.choice([0.1, 1, 19, -1]),),
        }  # fmt: skip
        no_arguments = ("expire", "cull", "reopen", "clear")
        return name, arguments.get(name, lambda: () if name in no_arguments else (self.key(),))()

    def run(self, way: list[tuple[str, str]], directory: Path, **options: Any) -> list[Any]:
        """What each step gave, or what it raised; then what is there, and in which order it goes."""
        with pytest.MonkeyPatch.context() as patch:
            clock = Clock(patch, start=1_700_000_000 * 10**9)
            # The same hash seed, so that also the index grows at the same moments.
            patch.setattr(recovery, "_new_identity", lambda: Identity(b"i" * 16, 12345))
            patch.setattr(checkpointing, "threading", AtOnce)
            turns = itertools.cycle(way)

            def reopen() -> DiskCache:
                backend, core = next(turns)
                patch.setenv("YATAGARASU_CORE", core)
                return DiskCache(directory, backend=backend, **options)

            cache = reopen()
            trace: list[Any] = []
            for name, arguments in self.steps:
                if name == "reopen":
                    cache.close()
                    cache = reopen()
                    continue
                if name == "time":
                    clock.advance(*arguments)
                    continue
                trace.append((name, self.outcome(cache, name, arguments), *self.state(cache)))
            trace.append(sorted(cache, key=repr))
            trace.append(self.order(cache))
            trace.append(cache.check())
            cache.close()
        return trace

    def outcome(self, cache: DiskCache, name: str, arguments: tuple[Any, ...]) -> Any:
        calls: dict[str, Callable[..., Any]] = {
            "set": lambda key, value, expire, tag: cache.set(key, value, expire=expire, tag=tag),
            "stream": lambda key, length, seed: cache.set(
                key, iter([noise(length, seed)[:99], noise(length, seed)])
            ),
            "prefix": cache.delete_prefix,
            "get_many": lambda keys: self.get_many(cache, keys),
            "open": lambda key: self.read(cache, key),
            "entry": lambda key: self.entry(cache, key),
        }
        try:
            return calls.get(name, getattr(cache, name, None))(*arguments)
        except (CacheError, KeyError, TypeError, ValueError) as error:
            return type(error)

    @staticmethod
    def get_many(cache: DiskCache, keys: list[Any]) -> dict[Any, Any]:
        """In which order a batch uses its entries is not promised: here in that of the keys."""
        found = cache.get_many(keys)
        assert {key: cache.get(key) for key in found} == found
        return found

    @staticmethod
    def read(cache: DiskCache, key: Any) -> bytes:
        with cache.open(key) as file:
            return file.read()

    @staticmethod
    def entry(cache: DiskCache, key: Any) -> Any:
        entry = cache.get_entry(key)
        return entry and (entry.tag, entry.size, entry.created, entry.expires, entry.accessed, entry.value)

    @staticmethod
    def state(cache: DiskCache) -> tuple[Any, ...]:
        stats = cache.stats()
        return (
            stats.hits, stats.misses, stats.sets, stats.deletes, stats.evictions, stats.expirations,
            stats.corrupt, stats.entries, stats.live_bytes,
        )  # fmt: skip

    @staticmethod
    def order(cache: DiskCache) -> list[Any]:
        """The keys in the order in which they are evicted."""
        order = []
        before = set(cache)
        for n in range(300):
            try:
                cache.set(("filler", n), bytes(1500))
            except CacheError as error:
                order.append(type(error))
                break
            gone = {key for key in before if key not in cache}
            if gone:
                order.append(sorted(gone, key=repr))
            before -= gone
            if not before:
                break
        return order


@pytest.mark.parametrize(
    ("seed", "steps", "eviction"),
    [
        *((0, 400, eviction) for eviction in ("lru", "fifo", "lfu", "none")),
        *(pytest.param(1, 900, eviction, marks=pytest.mark.slow) for eviction in ("lru", "none")),
    ],
)
def test_the_same_on_every_backend(tmp_path: Path, seed: int, steps: int, eviction: str) -> None:
    """Results, exceptions, hits and misses, counters, and what is evicted when."""
    script = Script(seed, steps)
    options = {"size_limit": 272 << 10, "segment_size": 8 << 10, "max_value_size": 150_000}
    traces = {
        name: script.run(way, tmp_path / name, eviction=eviction, **options) for name, way in WAYS.items()
    }
    first, *others = traces
    raised = {outcome for _, outcome, *_ in traces[first][:-3] if isinstance(outcome, type)}
    assert raised >= {KeyError, TypeError, ValueError, ValueTooLarge, SerializationError}
    assert (StorageFull in raised) is (eviction == "none")
    order = traces[first][-2]
    assert order == [StorageFull] if eviction == "none" else len(order) > 10
    for other in others:
        for number, (one, two) in enumerate(zip(traces[first], traces[other], strict=True)):
            assert one == two, f"{first} and {other} differ from step {number} on"


@pytest.mark.parametrize("way", WAYS)
def test_twice_the_same(tmp_path: Path, way: str) -> None:
    """With one backend alone the comparison still means something: nothing depends on chance."""
    script = Script(99, 300)
    options: dict[str, Any] = {"size_limit": 320 << 10, "segment_size": 8 << 10}
    assert script.run(WAYS[way], tmp_path / "one", **options) == script.run(
        WAYS[way], tmp_path / "two", **options
    )


@pytest.mark.parametrize("writer", BACKENDS)
@pytest.mark.parametrize("reader", BACKENDS)
def test_written_on_one_read_on_the_other(tmp_path: Path, core: str, writer: str, reader: str) -> None:
    options: dict[str, Any] = {"size_limit": 4 << 20, "segment_size": 16 << 10}
    pairs = {n: noise(n * 53 % 9000, n) for n in range(200)}
    for turn in ("as it is", "without its index"):
        with DiskCache(tmp_path / turn, backend=writer, **options) as cache:
            cache.set_many(pairs, tag="t", meta={"m": 1})
            cache.delete_many(range(0, 200, 10))
            cache.set(5, "new", expire=1000)
        if turn != "as it is":
            (tmp_path / turn / "index").unlink()
        with DiskCache(tmp_path / turn, backend=reader, **options) as cache:
            expected = {key: value for key, value in pairs.items() if key % 10} | {5: "new"}
            assert cache.get_many(range(200)) == expected
            assert {entry.key for entry in cache.entries(tag="t")} == expected.keys() - {5}
            assert cache.check() == []
            cache.set("more", noise(100_000))
        with DiskCache(tmp_path / turn, backend=writer, **options) as cache:
            assert cache["more"] == noise(100_000)
