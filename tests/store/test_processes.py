"""Several processes on one cache: what is exact, what never mixes, what a fork may do at any moment."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from available import on_one_core
from faulty import seeded
from helpers import disk_bytes, noise

from yatagarasu_cache import ClosedError, DiskCache, EntryGone
from yatagarasu_cache.store import format as f

pytestmark = pytest.mark.usefixtures("apart", "quiet")  # each handle stands for a process

WORKERS = 4
SMALL: dict[str, Any] = {"size_limit": 1 << 20, "segment_size": 8192}
PATIENCE = 40.0  # seconds after which processes that don't end are a failure


class Crew:
    """Forked processes that all run `work(number)`; what it returns comes back."""

    def __init__(self, work: Callable[[int], Any], count: int = WORKERS) -> None:
        self._children: list[tuple[int, int]] = []
        start_read, start_write = os.pipe()
        for number in range(count):
            read, write = os.pipe()
            pid = os.fork()
            if not pid:
                status = 1
                try:
                    os.close(start_write)
                    os.close(read)
                    os.read(start_read, 1)  # ends when the parent closes it: all begin at once
                    answer = pickle.dumps((True, work(number)))
                    status = 0
                except BaseException:
                    answer = pickle.dumps((False, traceback.format_exc()))
                finally:
                    try:
                        _send(write, answer)
                    finally:
                        os._exit(status)
            os.close(write)
            self._children.append((pid, read))
        os.close(start_read)
        os.close(start_write)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        """Nobody outlives the test."""
        for pid, read in self._children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(read)
        self._children.clear()

    def results(self) -> list[Any]:
        """Wait for all. An error of one is an error here; so is one that hangs."""
        late: list[int] = []

        def strike() -> None:
            for pid, _ in self._children:
                late.append(pid)
                os.kill(pid, signal.SIGKILL)

        timer = threading.Timer(PATIENCE, strike)
        timer.start()
        answers = []
        for pid, read in self._children:
            data = b""
            while part := os.read(read, 1 << 16):
                data += part
            os.close(read)
            answers.append((pid, data))
        for pid, _ in answers:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        timer.cancel()
        timer.join()
        for pid, _ in answers:
            os.waitpid(pid, 0)
        self._children.clear()
        assert not late, "processes hung"
        done = [pickle.loads(data) for _, data in answers]
        for good, value in done:
            assert good, value
        return [value for _, value in done]


def _send(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def crew(work: Callable[[int], Any], count: int = WORKERS) -> list[Any]:
    return Crew(work, count).results()


def value_of(key: object, writer: object, turn: int, size: int) -> bytes:
    """A value that tells whose it is, from its first to its last byte."""
    label = f"{key}|{writer}|{turn}|{size}|".encode()
    return label + noise(size, seed=turn) + label[::-1]


def verify(key: object, value: bytes) -> tuple[str, int]:
    """(writer, turn) of a value, which must be whole and of this key."""
    named, writer, turn, size, _ = value.split(b"|", 4)
    assert named.decode() == str(key), f"{key!r} has the value of {named!r}"
    assert value == value_of(key, writer.decode(), int(turn), int(size)), f"{key!r} has a mixed value"
    return writer.decode(), int(turn)


def sound(cache: DiskCache) -> None:
    problems = cache.check()
    assert problems == [], problems


@pytest.fixture
def opener(directory: Path, backend: str, core: str) -> Callable[..., DiskCache]:
    """Opens the cache under test, also in a child. `core` is chosen by the environment."""

    def opened(**options: Any) -> DiskCache:
        return DiskCache(directory, backend=backend, **{**SMALL, **options})

    opened().close()
    return opened


# -- the same keys at once ----------------------------------------------------------------------


@pytest.mark.parametrize("inherited", [False, True], ids=["opened", "inherited"])
@pytest.mark.parametrize("durability", ["none", "sync"])
def test_values_never_mix(opener: Callable[..., DiskCache], inherited: bool, durability: str) -> None:
    rng = seeded("mix")
    seed = rng.random()
    turns = 250 if durability == "none" else 40
    kept = [f"kept{i}" for i in range(10)]  # nobody deletes these: they are there at any moment
    keys = [f"k{i}" for i in range(15)] + kept
    options: dict[str, Any] = {"durability": durability, "eviction": "none"}
    with opener(**options) as cache:
        cache.set_many({key: value_of(key, "start", 0, 30) for key in kept})
    shared = opener(**options) if inherited else None

    def work(number: int) -> tuple[Counter[str], dict[str, int]]:
        mine = random.Random(f"{seed} {number}")
        cache = shared or opener(**options)
        latest: dict[tuple[str, str], int] = {}  # of each writer's values, turns never go back
        seen: Counter[str] = Counter()
        written: dict[str, int] = {}
        for turn in range(turns):
            key = mine.choice(keys)
            kind = mine.random()
            if kind < 0.45:
                cache.set(key, value_of(key, number, turn, mine.choice((0, 30, 500, 3000))))
                written[key] = turn
            elif kind < 0.55:
                some = mine.sample(keys, 5)
                cache.set_many({k: value_of(k, number, turn, 40) for k in some})
                written.update(dict.fromkeys(some, turn))
            elif kind < 0.6 and key not in kept:
                cache.delete(key)
            else:
                some = mine.sample(keys, 4)
                found = cache.get_many(some) if kind > 0.9 else {key: cache.get(key)}
                for name in some if kind > 0.9 else [key]:
                    value = found.get(name)
                    if value is None:
                        assert name not in kept, f"{name!r} was lost"
                        continue
                    writer, of = verify(name, value)
                    assert of >= latest.get((name, writer), -1), f"an older value of {name!r} came back"
                    latest[name, writer] = of
                    seen[writer] += 1
        if shared is None:
            cache.close()
        return seen, written

    results = crew(work)
    assert sum((seen for seen, _ in results), Counter()).total() > turns
    for turn in range(2):
        with shared if shared is not None and not turn else opener(**options) as cache:
            for key in keys:
                value = cache.get(key)
                assert value is not None or key not in kept, f"{key!r} was lost"
                if value is not None:  # it is the last that its writer gave this key
                    writer, of = verify(key, value)
                    if writer == "start":
                        assert not any(key in written for _, written in results)
                    else:
                        assert of == results[int(writer)][1][key]
            sound(cache)


@pytest.mark.parametrize("size", [60, 6000], ids=["small", "large"])
def test_value_and_meta_are_a_pair(opener: Callable[..., DiskCache], size: int) -> None:
    """While one process replaces both, an entry's value is that of its meta, or the entry is gone."""
    turns = 300  # at least: the writer goes on until everybody has seen a pair

    def write(cache: DiskCache) -> int:
        for turn in itertools.count():
            cache.set("pair", value_of("pair", 0, turn, size), meta={"turn": turn}, tag=turn)
            if turn >= turns and all(("seen", number) in cache for number in range(1, WORKERS)):
                cache.set("over", True)
                return turn
        raise AssertionError

    def work(number: int) -> int:
        pairs = 0
        with opener(eviction="none") as cache:
            if number == 0:
                return write(cache)
            while "over" not in cache:
                entry = cache.get_entry("pair")
                assert entry is not None
                with contextlib.suppress(EntryGone):
                    assert verify("pair", entry.value) == ("0", entry.meta["turn"])
                    pairs += 1
                    if pairs == 1:
                        cache.set(("seen", number), True)
                assert entry.tag == entry.meta["turn"]
        return pairs

    with opener(eviction="none") as cache:
        cache.set("pair", value_of("pair", 0, 0, size), meta={"turn": 0}, tag=0)
    last, *pairs = crew(work)
    assert last >= turns and all(pairs)
    with opener(eviction="none") as cache:
        entry = cache.get_entry("pair")
        assert entry is not None and entry.meta == {"turn": last} and entry.tag == last
        assert verify("pair", entry.value) == ("0", last)
        sound(cache)


def test_half_a_slot_is_no_version(opener: Callable[..., DiskCache], monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader may get a slot whose first words are of the old version, and the others of the new one."""
    with opener() as cache, opener(read_only=True) as reader:
        slots, pairs = [], set()
        for value in (b"one", b"two"):
            cache.set("k", value, meta=value.decode())
            (slot,) = map(cache._store.current.index.slot, cache._store.current.index.live_slots())
            slots.append(slot)
            names = cache._store.reading.read_names(slot)
            assert names is not None
            pairs.add((names.meta, value))
        store = reader._store
        torn = [f.Slot(*slots[0][:cut], *slots[1][cut:]) for cut in range(2, 9)]
        for first, second in itertools.product(torn, torn):
            monkeypatch.setattr(store.finding, "lookup", lambda low, high, slot=second: slot)
            names, found = store.reading.read_names(first), store.reading.fetch_version(first)
            if names is not None and found is not None:
                assert (names.meta, found.payload) in pairs


def test_incr_totals_are_exact(opener: Callable[..., DiskCache]) -> None:
    turns = 200

    def work(number: int) -> list[int]:
        with opener() as cache:
            for turn in range(turns):
                cache.incr("one")
                cache.incr(f"mod{turn % 3}", 2)
                cache.decr("down")
                if turn % 10 == 0:  # traffic beside it, with segments rolling and being cleaned
                    cache.set(f"{number}-{turn % 4}", noise(900, turn))
            return [cache.get("one")]

    results = crew(work)
    with opener() as cache:
        assert cache.get("one") == WORKERS * turns == max(r[0] for r in results)
        assert sum(cache.get(f"mod{i}") for i in range(3)) == 2 * WORKERS * turns
        assert cache.get("down") == -WORKERS * turns
        sound(cache)


def test_incr_hands_out_each_number_once(opener: Callable[..., DiskCache]) -> None:
    def work(number: int) -> list[int]:
        with opener() as cache:
            return [cache.incr("ticket") for _ in range(150)]

    tickets = [ticket for result in crew(work) for ticket in result]
    assert sorted(tickets) == list(range(1, WORKERS * 150 + 1))


def test_add_is_won_once(opener: Callable[..., DiskCache]) -> None:
    keys = [f"key{i}" for i in range(150)]
    sizes = (10, 3000)

    def work(number: int) -> list[str]:
        with opener() as cache:
            return [
                key
                for i, key in enumerate(keys)
                if cache.add(key, value_of(key, number, i, sizes[i % len(sizes)]))
            ]

    results = crew(work)
    assert Counter(key for won in results for key in won) == Counter(keys)
    with opener() as cache:
        for number, won in enumerate(results):
            for key in won:
                assert verify(key, cache[key])[0] == str(number)
        sound(cache)


def test_pop_is_got_once(opener: Callable[..., DiskCache]) -> None:
    keys = [f"key{i}" for i in range(150)]
    with opener() as cache:
        for i, key in enumerate(keys):
            cache.set(key, value_of(key, "start", i, (10, 3000)[i % 2]))

    def work(number: int) -> list[str]:
        got = []
        with opener() as cache:
            for key in keys:
                value = cache.pop(key)
                if value is not None:
                    verify(key, value)
                    got.append(key)
        return got

    results = crew(work)
    assert Counter(key for got in results for key in got) == Counter(keys)
    with opener() as cache:
        assert len(cache) == 0
        sound(cache)


def test_delete_is_counted_once(opener: Callable[..., DiskCache]) -> None:
    keys = [f"key{i}" for i in range(200)]
    with opener() as cache:
        cache.set_many(dict.fromkeys(keys, 1))

    def work(number: int) -> int:
        with opener() as cache:
            half = sum(cache.delete(key) for key in keys[::2])
            return half + cache.delete_many(keys[1::2])

    assert sum(crew(work)) == len(keys)
    with opener() as cache:
        assert list(cache) == []
        sound(cache)


def test_pushed_to_and_popped_from(opener: Callable[..., DiskCache]) -> None:
    """What some add others take away, at the same time: each exactly once."""
    count = 150

    def work(number: int) -> list[str]:
        got: list[str] = []
        with opener() as cache:
            if number < 2:
                for i in range(count):
                    assert cache.add(("item", number, i), f"{number}-{i}")
                return got
            deadline = time.monotonic() + PATIENCE / 2
            while cache.get("taken", 0) < 2 * count and time.monotonic() < deadline:
                for key in [k for k in cache if isinstance(k, tuple)]:
                    value = cache.pop(key)
                    if value is not None:
                        assert value == f"{key[1]}-{key[2]}"
                        got.append(value)
                        cache.incr("taken")
        return got

    results = crew(work)
    added = [f"{number}-{i}" for number in range(2) for i in range(count)]
    assert Counter(value for got in results for value in got) == Counter(added)
    with opener() as cache:
        assert list(cache) == ["taken"]
        sound(cache)


def test_tags_and_clear_beside_writers(opener: Callable[..., DiskCache]) -> None:
    """Removals in bulk meet writers: what was acknowledged after the last of them is there."""

    def work(number: int) -> None:
        with opener() as cache:
            for turn in range(60):
                if number == 0:
                    (cache.clear, lambda: cache.evict("tag"), lambda: cache.delete_prefix("p"))[turn % 3]()
                else:
                    for i in range(5):
                        cache.set(f"p{number}-{i}", value_of(f"p{number}-{i}", number, turn, 200), tag="tag")
                        found = cache.get(f"p{number}-{i}")
                        if found is not None:
                            assert verify(f"p{number}-{i}", found) == (str(number), turn)
            for i in range(5):
                if number:
                    cache.set(f"end{number}-{i}", turn)

    crew(work)
    with opener() as cache:
        sound(cache)
        cache.clear()
        assert len(cache) == 0 and list(cache) == []
        sound(cache)


# -- fork ---------------------------------------------------------------------------------------


def test_fork_in_mid_use(opener: Callable[..., DiskCache]) -> None:
    """With threads of the parent at work: a child can use the cache at once, and its end harms nobody."""
    cache = opener()
    stop = threading.Event()
    errors: list[BaseException] = []

    def busy(number: int) -> None:
        try:
            turn = 0
            while not stop.is_set():
                turn += 1
                key = f"t{number}-{turn % 20}"
                cache.set(key, value_of(key, number, turn, (50, 3000)[turn % 7 == 0]))
                assert verify(key, cache[key]) == (str(number), turn)
                cache.incr("threads")
                if turn % 50 == 0:
                    cache.delete(key)
        except BaseException as error:
            errors.append(error)

    def in_child(number: int) -> int:
        for turn in range(20):
            key = f"child-{turn}"
            cache.set(key, value_of(key, "child", turn, 100))
            cache.incr("children")
        for number in range(3):
            for turn in range(20):
                value = cache.get(f"t{number}-{turn}")
                if value is not None:
                    verify(f"t{number}-{turn}", value)
        return os.getpid()  # and ends by os._exit

    threads = [threading.Thread(target=busy, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(7):
            before = cache.get("threads", 0)
            assert crew(in_child, 1) != [os.getpid()]
            assert cache.get("children") == 20 * (turn + 1)
            deadline = time.monotonic() + PATIENCE
            while cache.get("threads", 0) <= before and not errors:
                assert time.monotonic() < deadline, "the parent's threads stand still"
                time.sleep(0.001)
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert not errors, errors
    assert not any(thread.is_alive() for thread in threads)
    for turn in range(20):
        verify(f"child-{turn}", cache[f"child-{turn}"])
    cache.close()
    with opener() as cache:
        sound(cache)


def test_a_handle_that_cannot_be_renewed_does_not_harm_others(tmp_path: Path, backend: str, core: str) -> None:
    """Its directory is gone: in the child it is closed, and the others have locks of their own."""
    lost, caches = (
        [DiskCache(tmp_path / f"{name}-{n}", backend=backend, **SMALL) for n in range(3)]
        for name in ("lost", "kept")
    )
    for cache in lost:
        cache.set("k", 0)
        shutil.rmtree(cache.directory)

    def work(number: int) -> list[int]:
        for cache in lost:
            with pytest.raises(ClosedError):
                cache.set("k", 1)
        with caches[0]._store.locks.index:  # nobody has the same one
            time.sleep(0.05)
        return [cache.incr("n") for cache in caches for _ in range(50)]

    crew(work)
    assert [cache.get("n") for cache in caches] == [50 * WORKERS] * 3
    for cache in caches:
        sound(cache)
        cache.close()


def test_fork_of_a_fork(opener: Callable[..., DiskCache]) -> None:
    with opener() as cache:
        cache.set("depth", 0)

        def deeper(number: int) -> int:
            depth = cache.incr("depth")
            cache.set(f"at{depth}", depth)
            if depth < 4:
                crew(deeper, 1)
            assert cache[f"at{depth}"] == depth
            return depth

        crew(deeper, 1)
        assert [cache[f"at{i}"] for i in range(1, 5)] == [1, 2, 3, 4]
        sound(cache)


def test_child_closes_what_it_inherited(opener: Callable[..., DiskCache]) -> None:
    with opener() as cache:
        cache.set("a", 1)

        def closing(number: int) -> bool:
            cache.set(f"child{number}", number)
            cache.close()
            cache.close()
            return True

        assert crew(closing) == [True] * WORKERS
        cache.set("b", 2)
        assert cache.get_many(["a", "b"]) == {"a": 1, "b": 2}
        assert [cache[f"child{i}"] for i in range(WORKERS)] == list(range(WORKERS))
        sound(cache)


def _pickled_work(arguments: tuple[DiskCache, int]) -> int:
    cache, number = arguments
    with cache:
        cache.set(f"by{number}", value_of(f"by{number}", number, 0, 100))
        total: int = cache.incr("total")
        assert cache["start"] == "here"
        return total


@on_one_core
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_pickled_to_workers(opener: Callable[..., DiskCache], method: str) -> None:
    with opener() as cache:
        cache.set("start", "here")
        with multiprocessing.get_context(method).Pool(2) as pool:
            totals = pool.map_async(_pickled_work, [(cache, number) for number in range(6)], 1).get(PATIENCE)
        assert sorted(totals) == list(range(1, 7))
        for number in range(6):
            assert verify(f"by{number}", cache[f"by{number}"])[0] == str(number)
        copy = pickle.loads(pickle.dumps(cache))
        assert copy.settings == cache.settings
        copy.close()
        sound(cache)


# -- what others see ----------------------------------------------------------------------------


def test_growth_is_seen_by_others(opener: Callable[..., DiskCache]) -> None:
    """Partitions are built anew, and the file grows, while others read and write."""
    count = 1500

    def work(number: int) -> int:
        cache = opener(size_limit=64 << 20, segment_size=1 << 20)
        for i in range(count):
            cache.set((number, i), i)
            for other in range(WORKERS):  # what was seen once does not vanish while a partition moves
                if i and cache.get((other, 0)) is None:
                    assert other != number
        missing = [i for i in range(count) if cache.get((number, i)) != i]
        assert not missing
        cache.close()
        return count

    with opener(size_limit=64 << 20, segment_size=1 << 20) as watcher:
        watcher.set("before", 1)
        size = watcher._store.current.index.words[f.W_INDEX_BYTES]
        assert crew(work) == [count] * WORKERS
        assert len(watcher) == WORKERS * count + 1
        assert all(watcher[(n, i)] == i for n in range(WORKERS) for i in range(count))
        assert watcher["before"] == 1
        assert watcher._store.current.index.words[f.W_INDEX_BYTES] > size
        sound(watcher)


def test_two_handles_in_one_process(opener: Callable[..., DiskCache]) -> None:
    with opener() as one, opener() as two:
        one["a"] = 1
        assert two["a"] == 1
        two["a"] = 2
        assert one["a"] == 2
        assert two.incr("a") == 3 and one.incr("a") == 4
        assert one.add("b", 1) and not two.add("b", 2)
        assert two.pop("b") == 1 and "b" not in one
        one.close()
        two["c"] = noise(3000)
        assert two["a"] == 4
        errors: list[BaseException] = []

        def both(handle: DiskCache) -> None:
            try:
                for _ in range(150):
                    handle.incr("sum")
                    handle.set("k", value_of("k", "x", 1, 2000))
                    verify("k", handle["k"])
            except BaseException as error:
                errors.append(error)

        with opener() as three:
            threads = [threading.Thread(target=both, args=(h,)) for h in (two, three, two, three)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE)
            assert not errors, errors
            assert two["sum"] == three["sum"] == 600
            sound(three)


@pytest.mark.parametrize("how", ["rebuilt", "superseded while in use", "bad descriptors"])
def test_index_replaced_under_others(opener: Callable[..., DiskCache], how: str) -> None:
    """One process makes the index anew; the others follow, and nothing that was acknowledged is lost."""
    rounds = 5
    options: dict[str, Any] = {"eviction": "none", "size_limit": 8 << 20, "segment_size": 16384}

    def work(number: int) -> int:
        cache = opener(**options)
        turn = 0
        while ("stop" not in cache or turn < 6) and turn < 100_000:
            turn += 1
            key = f"{number}-{turn % 30}"
            cache.set(key, value_of(key, number, turn, 60))
            found = cache.get(key)
            assert found is not None and verify(key, found) == (str(number), turn), (key, turn, found)
            old = f"{number}-{(turn + 1) % 30}"
            if turn > 30:
                assert verify(old, cache[old])[1] == turn - 29
            cache.incr("total")
        cache.close()
        return turn

    with Crew(work) as running, opener(**options) as cache:
        for _ in range(rounds):
            time.sleep(0.04)
            store = cache._store
            if how == "bad descriptors":  # as a flipped bit would make them: beyond the file
                with store.locks.index:
                    for part in range(0, f.PARTITIONS, 7):
                        store.current.index.words[f.W_PARTITIONS + part] |= 1 << 62
            elif how == "rebuilt":
                store.current.rebuild("for a test")
            else:
                with store.locks.index:
                    store.current.rebuild("for a test")
                    store.current.rebuild("and again")
            cache.incr("mine")
        cache.set("stop", True)
        turns = running.results()
        for number, last in enumerate(turns):
            for turn in range(max(1, last - 29), last + 1):
                key = f"{number}-{turn % 30}"
                assert verify(key, cache[key]) == (str(number), turn)
        assert cache["total"] == sum(turns)
        assert cache["mine"] == rounds
        sound(cache)


# -- room ---------------------------------------------------------------------------------------


@pytest.mark.in_turn
@pytest.mark.parametrize("sizes", [(700,), (20, 200, 3000)], ids=["even", "mixed"])
def test_disk_use_of_several_writers(
    opener: Callable[..., DiskCache], directory: Path, sizes: tuple[int, ...]
) -> None:
    """Above `size_limit` by at most one segment, all of them evicting at once."""
    limit = 4 << 20
    options: dict[str, Any] = {"size_limit": limit, "segment_size": None}
    with opener(**options) as cache:
        segment = cache._store.limits.segment_bytes

    turns = 3 * limit // WORKERS // (sum(sizes) // len(sizes) + 150)

    def work(number: int) -> tuple[int, int]:
        rng = random.Random(number)
        most = 0
        with opener(**options) as cache:
            for turn in range(turns):
                key = f"{number}-{turn}"
                cache.set(key, value_of(key, number, turn, rng.choice(sizes)))
                back = f"{rng.randrange(WORKERS)}-{rng.randrange(turn + 1)}"
                found = cache.get(back)
                if found is not None:
                    verify(back, found)
                most = max(most, cache.volume())
            return most, cache.stats().evictions

    measured: list[int] = []
    stop = threading.Event()

    def measure() -> None:
        while not stop.is_set():
            measured.append(disk_bytes(directory))
            time.sleep(0.002)

    with Crew(work) as running:
        watching = threading.Thread(target=measure)
        watching.start()
        try:
            results = running.results()
        finally:
            stop.set()
            watching.join()
    most = max(volume for volume, _ in results)
    over = (max(measured) - limit) / segment
    print(f"limit {limit}, volume up to {most}, on disk {over:.1f} segments above the limit")
    assert sum(evictions for _, evictions in results) > 0
    assert most <= limit + segment
    assert max(measured) <= limit + segment
    with opener(**options) as cache:
        assert cache.volume() <= limit
        sound(cache)
