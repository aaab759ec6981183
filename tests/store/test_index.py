"""The index alone, against a plain dict: growth, two processes' views of it, its journal, damage."""

from __future__ import annotations

import mmap
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import Clock
from hypothesis import given, settings
from hypothesis import strategies as st

from yatagarasu_cache.backends.threads import ThreadsBackend
from yatagarasu_cache.errors import ClosedError
from yatagarasu_cache.store import format as f
from yatagarasu_cache.store import index as index_module
from yatagarasu_cache.store.format import PARTITION_MASK, PARTITIONS, SLOT_BYTES, SLOT_WORDS, Identity, Slot
from yatagarasu_cache.store.index import Index, IndexDamaged

IDENTITY = Identity(b"sixteen bytes id", 12345)
TABLE = 16  # capacity of the segment table
SEGMENTS = range(1, 9)
BACKEND = ThreadsBackend()
Entries = dict[tuple[int, int], Slot]


def create(path: Path, kind: type[Index] = Index) -> Index:
    index = kind.create(BACKEND, str(path), IDENTITY, TABLE, 0o600)
    for segment in SEGMENTS:
        assert index.next_segment_id() == segment
        index.add_segment(segment, f.SEALED, 1 << 20, 0, segment)
    return index


def view(path: Path, kind: type[Index] = Index, writable: bool = True) -> Index:
    """The same file as another process sees it."""
    return kind(BACKEND, str(path), os.open(path, os.O_RDWR if writable else os.O_RDONLY), writable)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index"


@pytest.fixture
def index(path: Path) -> Iterator[Index]:
    made = create(path)
    yield made
    made.close()


def some_slot(chosen: random.Random, digest: tuple[int, int]) -> Slot:
    place = f.pack_place(chosen.choice(SEGMENTS), 64 + 16 * chosen.randrange(1 << 20))
    lengths = f.pack_lengths(
        chosen.randrange(1 << 20), chosen.choice((0, 3, f.FLAG_LARGE)), 64 + 16 * chosen.randrange(9)
    )
    return Slot(*digest, place, lengths, chosen.getrandbits(64), chosen.getrandbits(60),
                chosen.choice((0, chosen.getrandbits(60))), chosen.getrandbits(60))  # fmt: skip


def some_digest(chosen: random.Random, parts: int = PARTITIONS, starts: int = 1 << 62) -> tuple[int, int]:
    """Few `starts`: long probes."""
    return chosen.randrange(starts) << 2 | 2, chosen.getrandbits(58) << 6 | chosen.randrange(parts)


def entries(index: Index) -> Entries:
    found = [index.slot(at) for at in index.live_slots()]
    by_digest = {slot[:2]: slot for slot in found}
    assert len(by_digest) == len(found), "a digest stands in two slots"
    return by_digest


def extents(index: Index) -> list[tuple[int, int]]:
    descriptors = index.words[f.W_PARTITIONS : f.W_PARTITIONS + PARTITIONS].tolist()
    return sorted((d >> f.DESCRIPTOR_BITS, d & f.CAPACITY_MASK) for d in descriptors if d)


def check(index: Index, model: Entries) -> None:
    """The index holds what the model does, and all its counts are right."""
    assert entries(index) == model
    assert index.count() == len(model)
    for digest, slot in model.items():
        at = index.find(*digest)
        assert at and index.slot(at) == slot
    live = dict.fromkeys(SEGMENTS, 0)
    for slot in model.values():
        live[slot.segment] += f.record_bytes(slot.lengths)
    assert {s: index.words[index.live_word(s)] for s in SEGMENTS} == live
    assert index.words[f.W_LIVE_BYTES] == sum(live.values())
    reached = index.first_slot
    for first, capacity in extents(index):
        assert first >= reached, "two partitions overlap"
        reached = first + capacity
    assert reached * SLOT_BYTES <= os.fstat(index.fd).st_size
    for part in range(PARTITIONS):
        lows = index.column(index.partition_slots(part), 0)
        used = len(lows) - lows.count(f.EMPTY)
        assert index.words[f.W_COUNTS + part] == (used - lows.count(f.REMOVED)) << 32 | used
        assert not lows or lows.count(f.EMPTY), "a probe would never end"
    index.validate()


def change(index: Index, model: Entries, chosen: random.Random, **digests: int) -> None:
    """One random change of both."""
    what = chosen.random()
    digest = chosen.choice(list(model)) if model and chosen.random() < 0.6 else some_digest(chosen, **digests)
    at = index.find(*digest)
    assert bool(at) == (digest in model)
    if what < 0.55 or not at:
        slot = some_slot(chosen, digest)
        index.put(slot, at)
        model[digest] = slot
    elif what < 0.85:
        index.remove(at)
        del model[digest]
    else:
        place = f.pack_place(chosen.choice(SEGMENTS), 16 * chosen.randrange(1 << 20))
        index.move(at, place)
        model[digest] = model[digest]._replace(place=place)


# -- against a dict -----------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 3, PARTITIONS])
@pytest.mark.parametrize("starts", [1, 5, 1 << 62])
def test_like_a_dict(index: Index, parts: int, starts: int) -> None:
    seed = 1000 * parts + starts % 997
    print("seed", seed)
    chosen, model = random.Random(seed), {}
    starts = starts * 200 if starts < 100 and parts == 1 else starts
    for i in range(4000):
        if starts == 1 and len(model) > 400:  # every probe passes all the others
            break
        change(index, model, chosen, parts=parts, starts=starts)
        if i % 500 == 0:
            check(index, model)
    check(index, model)
    for _ in range(50):
        digest = some_digest(chosen)
        assert bool(index.find(*digest)) == (digest in model)
    index.reset()
    check(index, {})


@given(
    st.integers(0, 2**32),
    st.integers(0, 300),
    st.sampled_from([1, 2, 64]),
    st.sampled_from([1, 3, 40, 1 << 60]),
)
@settings(max_examples=60)
def test_extents_never_overlap(tmp_path_factory: Any, seed: int, steps: int, parts: int, starts: int) -> None:
    path = tmp_path_factory.mktemp("index") / "index"
    index = create(path)
    try:
        chosen, model = random.Random(seed), {}
        for _ in range(steps):
            change(index, model, chosen, parts=parts, starts=starts)
        check(index, model)
    finally:
        index.close()


def test_removing_the_last_of_a_run_leaves_it_empty(index: Index) -> None:
    chosen = random.Random(1)
    digests = [(10 << 2 | 2, high << 6) for high in range(1, 4)]  # three in a row
    for digest in digests:
        index.put(some_slot(chosen, digest), 0)
    places = [index.find(*digest) for digest in digests]
    index.remove(places[1])  # another follows: probes have to pass
    assert index.words[places[1]] == f.REMOVED
    index.remove(places[2])
    assert index.words[places[2]] == f.EMPTY
    assert index.find(*digests[0]) == places[0]
    assert not index.find(*digests[1]) and not index.find(*digests[2])
    again = some_slot(chosen, digests[1])
    index.put(again, 0)
    assert index.find(*digests[1]) == places[1]  # a tombstone's slot is used again
    check(index, {slot[:2]: slot for slot in (index.slot(places[0]), again)})


def test_puts_and_removals_for_ever_do_not_grow_the_file(index: Index) -> None:
    chosen, model = random.Random(2), {}
    sizes = []
    for _ in range(20):
        for _ in range(1500):
            digest = some_digest(chosen)
            model[digest] = some_slot(chosen, digest)
            index.put(model[digest], 0)
        for digest in chosen.sample(list(model), len(model) - 500):
            index.remove(index.find(*digest))
            del model[digest]
        sizes.append(os.fstat(index.fd).st_size)
    check(index, model)
    assert sizes[-1] <= 1.5 * sizes[4], sizes


def test_size_per_entry(index: Index) -> None:
    assert os.fstat(index.fd).st_size < 8192  # an empty one is small
    chosen = random.Random(3)
    for count in (100_000,):
        for _ in range(count):
            index.put(some_slot(chosen, some_digest(chosen)), 0)
        size = os.fstat(index.fd).st_size
        assert size <= 260 * count
        assert index.words[f.W_INDEX_BYTES] == size
        assert index.count() == count


def test_active_segments_are_counted(index: Index) -> None:
    index.add_segment(12, f.ACTIVE, 100, 7, 1)
    index.add_segment(13, f.ACTIVE, 100, 7, 1)
    assert index.words[f.W_ACTIVE] == 2
    index.set_state(12, f.SEALED)
    index.set_state(12, f.SEALED)
    assert index.words[f.W_ACTIVE] == 1 and index.state(12) == f.SEALED
    index.set_state(12, f.ACTIVE)
    index.drop_segment(13)
    assert index.words[f.W_ACTIVE] == 1
    index.words[f.W_ACTIVE] = 9
    index.words[f.W_BUSY] = f.BUSY_COUNTING  # a process died at it
    assert index.repair() and index.words[f.W_ACTIVE] == 1


def test_settled_is_what_follows_without_a_gap(index: Index) -> None:
    tail = index.add_segment(12, f.ACTIVE, 1 << 20, 7, 1) + f.T_TAIL
    index.words[tail] = 64
    for offset, size, settled in ((64, 80, 144), (160, 16, 144), (144, 16, 160), (160, 16, 176), (64, 80, 176)):
        index.settle(f.pack_place(12, offset), size)
        assert index.words[tail] == settled
    index.set_state(12, f.SEALED)
    index.settle(f.pack_place(12, 176), 16)
    assert index.words[tail] == 176


def test_segments(index: Index) -> None:
    assert index.segments() == list(SEGMENTS)
    assert index.state(3) == f.SEALED and index.state(3 + TABLE) == 0 and index.state(12) == 0
    total = index.words[f.W_SEGMENT_BYTES]
    assert total == len(SEGMENTS) << 20
    index.resize_segment(3, 1000)
    index.drop_segment(4)
    assert index.words[f.W_SEGMENT_BYTES] == total - (2 << 20) + f.FILE_BLOCK
    assert index.words[f.W_SLACK] == f.FILE_BLOCK - 1000
    assert index.state(4) == 0
    ids = []
    while (segment := index.next_segment_id()) is not None:
        index.add_segment(segment, f.ACTIVE, 10, 1, 1)
        ids.append(segment)
    assert len(ids) == TABLE - 7  # every free entry is used
    assert len({s % TABLE for s in index.segments()}) == TABLE
    assert not set(ids) & set(SEGMENTS)  # no id comes twice, not even the dropped one's
    index.validate()


# -- two views of one file ----------------------------------------------------------------------


def test_one_grows_the_other_follows(path: Path, index: Index) -> None:
    chosen, model = random.Random(4), {}
    other, reader = view(path), view(path, writable=False)
    size = len(other.map)
    mapped = []
    other.on_map = lambda: mapped.append(len(other.map))
    for i in range(3000):
        writer, looker = (index, other) if i % 600 < 300 else (other, index)
        change(writer, model, chosen)
        digest = chosen.choice(list(model)) if model else some_digest(chosen)
        for seen in (looker, reader):
            at = seen.find(*digest)
            assert bool(at) == (digest in model)
            if at:
                assert seen.slot(at) == model[digest]
    assert len(other.map) > size and mapped
    for seen in (index, other, reader):
        check(seen, model)
        seen.reach(os.fstat(seen.fd).st_size // 8)
    with pytest.raises(IndexDamaged, match="beyond its end"):
        reader.reach(len(reader.words) + 1)  # nothing was added
    with pytest.raises(TypeError):
        reader.words[f.W_CLOCK] = 1
    other.close()
    reader.close()


def test_threads_that_meet_growth_at_once(path: Path, index: Index) -> None:
    """Whoever comes second finds that the file was mapped already: that is no damage."""
    other = view(path)
    words = len(other.words)
    chosen, model = random.Random(9), {}
    while len(index.words) == words:
        change(index, model, chosen)
    here = threading.Barrier(2)
    mapped = other._map

    def map_late() -> None:
        here.wait(10)  # both have seen that the mapping is too short
        mapped()

    other._map = map_late  # type: ignore[method-assign]
    errors: list[BaseException] = []

    def look() -> None:
        try:
            other.reach(words + 1)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    other._map = mapped  # type: ignore[method-assign]
    other.reach(words + 1)
    assert {digest for digest in model if not other.find(*digest)} == set()
    other.close()


def test_a_superseded_index_says_so(path: Path, index: Index) -> None:
    chosen, model = random.Random(5), {}
    for _ in range(100):
        change(index, model, chosen)
    other = view(path)
    assert not other.superseded
    index.supersede()
    assert other.superseded
    for digest in model:
        with pytest.raises(IndexDamaged, match="superseded"):
            other.find(*digest)
    other.close()


def test_a_closed_index_says_so(path: Path) -> None:
    index = create(path)
    words = index.words
    index.close()
    index.close()
    for use in (lambda: index.find(2, 3), index.count, index.stamp, lambda: index.slot(0), index.sync):
        with pytest.raises(ClosedError):
            use()
    assert words[f.W_NEXT_SEGMENT] == 9  # a reader that still has the mapping may go on


# -- the journal --------------------------------------------------------------------------------


class Killed(Exception):
    """The process ended here."""


class Steps:
    """Counts stores to the mapping, and ends the process before the one that it is told."""

    def __init__(self) -> None:
        self.left = 1 << 60
        self.made = 0

    def step(self) -> None:
        if self.left <= 0:
            raise Killed
        self.left -= 1
        self.made += 1


STEPS = Steps()


class Words:
    """`Index.words`, one step a store."""

    def __init__(self, words: memoryview) -> None:
        self.words = words

    def __getitem__(self, at: Any) -> Any:
        return self.words[at]

    def __setitem__(self, at: int, value: int) -> None:
        STEPS.step()
        self.words[at] = value

    def __len__(self) -> int:
        return len(self.words)


class Map(mmap.mmap):
    """The mapping; a longer store takes two steps, and is half done between them."""

    def __setitem__(self, at: Any, value: Any) -> None:
        if isinstance(at, slice):
            STEPS.step()
            half = len(value) // 16 * 8
            super().__setitem__(slice(at.start, at.start + half), value[:half])
        STEPS.step()
        super().__setitem__(at, value)


class Packer:
    """A struct that stores word by word."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.size = inner, inner.size
        self.unpack_from, self.pack = inner.unpack_from, inner.pack

    def pack_into(self, target: Any, offset: int, *values: Any) -> None:
        data = self.inner.pack(*values)
        with memoryview(target) as bytes_:
            for at in range(0, len(data), 8):
                STEPS.step()
                bytes_[offset + at : offset + at + 8] = data[at : at + 8]


class Stepped(Index):
    """An index whose every store to the mapping is a step."""

    @property
    def words(self) -> Any:
        try:
            return self.__dict__["stepped_words"]
        except KeyError:
            raise AttributeError("words") from None

    @words.setter
    def words(self, value: memoryview) -> None:
        self.__dict__["stepped_words"] = Words(value)

    @words.deleter
    def words(self) -> None:
        del self.__dict__["stepped_words"]


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    STEPS.left = 1 << 60
    stand_in = SimpleNamespace(mmap=Map, ACCESS_WRITE=mmap.ACCESS_WRITE, ACCESS_READ=mmap.ACCESS_READ)
    monkeypatch.setattr(index_module, "mmap", stand_in)
    monkeypatch.setattr(index_module, "SLOT_TAIL", Packer(f.SLOT_TAIL))
    monkeypatch.setattr(f, "JOURNAL", Packer(f.JOURNAL))


def filled(path: Path, kind: type[Index], count: int) -> tuple[Index, Entries]:
    """One partition, `count` entries, some tombstones."""
    chosen, model = random.Random(6), {}
    index = create(path, kind)
    for _ in range(count + 2):
        digest = some_digest(chosen, 1, 6)
        model[digest] = some_slot(chosen, digest)
        index.put(model[digest], index.find(*digest))
    for digest in list(model)[:2]:
        index.remove(index.find(*digest))
        del model[digest]
    return index, model


NEW = (7 << 2 | 2, 99 << 6)
Change = Callable[[Index, Entries], Entries]


def put_new(index: Index, model: Entries) -> Entries:
    slot = some_slot(random.Random(7), NEW)
    index.put(slot, index.find(*NEW))
    return {**model, NEW: slot}


def put_over(index: Index, model: Entries) -> Entries:
    digest = list(model)[-1]
    slot = some_slot(random.Random(8), digest)
    index.put(slot, index.find(*digest))
    return {**model, digest: slot}


def remove(index: Index, model: Entries) -> Entries:
    digest = list(model)[0]
    index.remove(index.find(*digest))
    return {d: s for d, s in model.items() if d != digest}


def move(index: Index, model: Entries) -> Entries:
    digest = list(model)[1]
    place = f.pack_place(8 if model[digest].segment != 8 else 7, 160)
    index.move(index.find(*digest), place)
    return {**model, digest: model[digest]._replace(place=place)}


def grow(index: Index, model: Entries) -> Entries:
    index._grow(0)
    return model


def build_beside(index: Index, model: Entries) -> Entries:
    """Another partition's first entry: its extent is a new one."""
    digest = NEW[0], NEW[1] | 5
    slot = some_slot(random.Random(9), digest)
    index.put(slot, 0)
    return {**model, digest: slot}


def fields(entries: Entries, digest: tuple[int, int]) -> tuple[int, ...] | None:
    """What readers go by: place, lengths and checksum of the value."""
    return entries[digest][2:5] if digest in entries else None


def believed(index: Index, digest: tuple[int, int]) -> tuple[int, ...] | None:
    """The same of a reader, who takes no lock: None for a miss."""
    at = index.find(*digest)
    return index.slot(at)[2:5] if at else None


@pytest.mark.parametrize("count", [4, 40])
@pytest.mark.parametrize("work", [put_new, put_over, remove, move, grow, build_beside])
@pytest.mark.usefixtures("stepped")
def test_a_process_killed_at_any_store(tmp_path: Path, work: Change, count: int) -> None:
    """All of the change or nothing, and what readers have seen of it stays."""
    index, before = filled(tmp_path / "whole", Index, count)
    after = work(index, before)
    index.close()
    killed = completed = 0
    while True:
        path = tmp_path / f"index{killed}"
        index, before = filled(path, Stepped, count)
        check(index, before)
        STEPS.left = killed
        try:
            work(index, before)
            break
        except Killed:
            killed += 1
        finally:
            STEPS.left = 1 << 60
        index.close()
        # Another process finds it so.
        other = view(path)
        busy = other.words[f.W_BUSY]
        seen = [digest for digest in {**before, **after} if believed(other, digest) != fields(before, digest)]
        assert other.repair() == bool(busy)
        assert not other.repair()
        done = entries(other) == after and before != after
        completed += bool(busy and done)
        check(other, after if done else before)
        assert done or not seen
        # It goes on from there.
        if not done:
            check(other, work(other, before))
        other.close()
        path.unlink()
    check(index, after)
    index.close()
    assert killed > 12 and (completed > 2 or before == after), (killed, completed)


@pytest.mark.usefixtures("stepped")
def test_a_process_killed_while_it_clears_or_counts_segments(tmp_path: Path) -> None:
    works: list[Callable[[Index], object]] = [
        lambda i: i.reset(),
        lambda i: i.drop_segment(8),
        lambda i: i.resize_segment(3, 77),
        lambda i: i.add_segment(i.next_segment_id() or 0, f.ACTIVE, 1 << 30, 5, 5),
    ]
    for number, work in enumerate(works):
        killed = 0
        while True:
            path = tmp_path / f"index{number}-{killed}"
            index, before = filled(path, Stepped, 12)
            for digest in [d for d, slot in before.items() if slot.segment == 8]:
                index.remove(index.find(*digest))
                del before[digest]
            STEPS.left = killed
            try:
                work(index)
                break
            except Killed:
                killed += 1
            finally:
                STEPS.left = 1 << 60
            index.close()
            other = view(path)
            other.repair()
            left = entries(other)
            assert left == before or number == 0 and left == {}
            assert (
                sum(f.file_bytes(other.words[e + f.T_SIZE]) for e in other.table_entries())
                == other.words[f.W_SEGMENT_BYTES]
            )
            if 8 in other.segments():
                check(other, left)
            work(other)
            other.validate()
            other.close()
        assert killed >= 3
        assert index.segments() == [list(SEGMENTS), [*range(1, 8)], list(SEGMENTS), [*SEGMENTS, 9]][number]
        index.close()


@pytest.mark.parametrize("work", [put_new, put_over, remove, move, grow])
@pytest.mark.usefixtures("stepped")
def test_a_process_killed_while_it_repairs(tmp_path: Path, work: Change) -> None:
    # The last store of each change ends it: killed just before, all is done, and is done once more.
    index, model = filled(tmp_path / "first", Stepped, 12)
    STEPS.made = 0
    after = work(index, model)
    stores = STEPS.made
    index.close()
    for left in range(stores - 1, stores - 4, -1):
        killed = 0
        while True:
            path = tmp_path / f"index{left}-{killed}"
            index, before = filled(path, Stepped, 12)
            STEPS.left = left
            with pytest.raises(Killed):
                work(index, before)
            STEPS.left = 1 << 60
            index.close()
            other = view(path, Stepped)
            assert other.words[f.W_BUSY]
            STEPS.left = killed
            try:
                assert other.repair()
                break
            except Killed:
                killed += 1
            finally:
                STEPS.left = 1 << 60
            assert other.repair()
            check(other, after)
            other.close()
        check(other, after)
        other.close()
        assert killed >= 4


def test_a_journal_that_makes_no_sense_is_damage(path: Path, index: Index) -> None:
    chosen, model = random.Random(10), {}
    for _ in range(50):
        change(index, model, chosen)
    at = index.find(*next(iter(model)))
    live = index.live_word(1)
    good = [0, at, live, 0, live, 0]
    bad = [(0, 64), (0, 1 << 63), (1, 0), (1, at + 1), (1, 1 << 62), (1, f.W_BUSY)]
    for field, value in [*bad, (2, f.W_CLOCK), (2, 1 << 40), (4, 0), (4, f.MASK64)]:
        words = list(good)
        words[field] = value
        before = bytes(index.map)
        index.words[f.W_BUSY] = f.BUSY_CHANGING
        for i, word in enumerate(words):
            index.words[f.W_BUSY + 1 + i] = word
        with pytest.raises(IndexDamaged):
            index.repair()
        index.map[:] = before
    check(index, model)


# -- stamps -------------------------------------------------------------------------------------


def test_stamps_rise_also_when_the_clock_does_not(
    path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, 10**18)
    other = view(path)
    chosen = random.Random(11)
    last = 0
    for i in range(2000):
        clock.advance(chosen.choice((0, 0, 1e-9, 1, -1, -(10**6), 10**3)))
        stamp = (index if i % 2 else other).stamp()
        assert stamp > last and stamp >= clock.now
        last = stamp
    assert index.stamp_above(last + 10**12) > last + 10**12
    assert other.stamp() > last + 10**12
    index.words[f.W_EPOCH] = last + 10**15
    assert other.stamp_above(0) > last + 10**15
    assert index.stamp() > last + 10**15
    index.validate()
    other.close()


# -- damage -------------------------------------------------------------------------------------


def rich(path: Path) -> tuple[Index, Entries]:
    chosen, model = random.Random(12), {}
    index = create(path)
    for _ in range(1500):
        change(index, model, chosen)
    index.words[f.W_CLOCK] = 10**18
    index.validate()
    return index, model


DAMAGE: dict[str, Callable[[Index], tuple[int, int]]] = {
    "overlap": lambda i: (f.W_PARTITIONS + 3, i.words[f.W_PARTITIONS + 4]),
    "in the header": lambda i: (f.W_PARTITIONS + 3, 1 << f.DESCRIPTOR_BITS | 8),
    "beyond the end": lambda i: (f.W_PARTITIONS + 3, len(i.words) // SLOT_WORDS << f.DESCRIPTOR_BITS | 8),
    "too long": lambda i: (f.W_PARTITIONS + 63, i.words[f.W_PARTITIONS + 63] | f.CAPACITY_MASK),
    "no slots": lambda i: (f.W_PARTITIONS + 3, i.words[f.W_PARTITIONS + 3] & ~f.CAPACITY_MASK),
    "not there": lambda i: (f.W_PARTITIONS + 3, 0),
    "all ones": lambda i: (f.W_PARTITIONS + 3, f.MASK64),
    "more live than used": lambda i: (f.W_COUNTS + 3, (i.words[f.W_COUNTS + 3] & f.MASK32) + 1 << 32 | 5),
    "more used than there are": lambda i: (
        f.W_COUNTS + 3,
        (i.words[f.W_PARTITIONS + 3] & f.CAPACITY_MASK) + 1,
    ),
    "clock": lambda i: (f.W_CLOCK, f.MAX_STAMP),
    "clock all ones": lambda i: (f.W_CLOCK, f.MASK64),
    "epoch": lambda i: (f.W_EPOCH, i.words[f.W_CLOCK] + (1 << 41)),
    "floor": lambda i: (f.W_FLOOR, f.MASK64),
    "state 0": lambda i: (i.entry(3), 3),
    "state 6": lambda i: (i.entry(3), 6 << 32 | 3),
    "live bytes": lambda i: (i.live_word(3), f.MASK64),
    "all live bytes": lambda i: (f.W_LIVE_BYTES, f.MASK64 - 5),
    "size": lambda i: (i.entry(3) + f.T_SIZE, 1 << 60),
    "state all ones": lambda i: (i.entry(3), f.MASK64),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_validate_finds(path: Path, damage: str) -> None:
    index, _ = rich(path)
    word, value = DAMAGE[damage](index)
    assert index.words[word] != value
    index.words[word] = value
    with pytest.raises(IndexDamaged):
        index.validate()
    index.close()


def test_validate_allows_what_can_be(path: Path) -> None:
    index, model = rich(path)
    for word in (f.W_EPOCH, f.W_FLOOR):
        index.words[word] = index.words[f.W_CLOCK]
    for _ in range(500):
        change(index, model, random.Random(13))
        index.validate()
    index.close()


def test_every_bit_of_the_identity_counts(path: Path) -> None:
    create(path).close()
    good = path.read_bytes()
    for bit in range(8 * (f.IDENTITY.size + 8)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(IndexDamaged):
            Index(BACKEND, str(path), os.open(path, os.O_RDWR))


def test_every_length_of_the_file(path: Path) -> None:
    index, model = rich(path)
    index.close()
    good = path.read_bytes()
    for length in [
        *range(0, 400, 7),
        4095,
        4096,
        4097,
        5000,
        5119,
        5120,
        5121,
        *range(5200, len(good), 4001),
        len(good) - 1,
    ]:
        path.write_bytes(good[:length])
        with pytest.raises(IndexDamaged):
            index = Index(BACKEND, str(path), os.open(path, os.O_RDWR))
            index.validate()
            used = max(first + count for first, count in extents(index))
            if used * SLOT_BYTES <= length:  # only unused slots are missing
                raise IndexDamaged
    path.write_bytes(good + bytes(100))  # a file that is being made longer
    longer = view(path)
    check(longer, model)
    longer.close()


def use(index: Index, model: Entries, chosen: random.Random) -> None:
    """Everything that a cache does without knowing of the damage."""
    for step in (
        lambda: [index.find(*digest) and index.slot(index.find(*digest)) for digest in list(model)[:30]],
        index.count,
        lambda: [index.slot(at) for at in index.live_slots()],
        index.segments,
        index.next_segment_id,
        lambda: [index.state(s) for s in SEGMENTS],
        index.stamp,
        lambda: (index.used_bytes, index.live_bytes),
        lambda: [
            index.put(some_slot(chosen, d), index.find(*d)) for d in [some_digest(chosen) for _ in range(40)]
        ],
        lambda: [index.remove(at) for digest in list(model)[30:60] if (at := index.find(*digest))],
        lambda: [index.move(at, 3 << 32 | 5) for digest in list(model)[60:90] if (at := index.find(*digest))],
        index.repair,
        index.validate,
    ):
        try:
            step()
        except IndexDamaged:
            pass


@pytest.mark.parametrize("seed", range(40))
def test_damaged_slots_raise_nothing_else(path: Path, seed: int) -> None:
    print("seed", seed)
    index, model = rich(path)
    chosen = random.Random(seed)
    first, words = index.first_slot * SLOT_WORDS, index.words
    for _ in range(chosen.choice((1, 10, 1000))):
        at = chosen.randrange(first, len(words))
        words[at] = chosen.choice(
            (0, 1, f.MASK64, words[at] ^ 1 << chosen.randrange(64), chosen.getrandbits(64))
        )
    if seed % 4 == 0:  # no empty slot is left: probes have nowhere to end
        for part in range(PARTITIONS):
            for at in index.partition_slots(part):
                words[at] = words[at] or 77 << 2 | 2
    use(index, model, chosen)
    index.close()


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_header_that_validates_raises_nothing_else(path: Path, seed: int) -> None:
    """What is wrong with the header is found when the index is opened, or does no harm."""
    print("seed", seed)
    index, model = rich(path)
    chosen = random.Random(seed)
    words = index.words
    places = [
        *range(f.W_CLOCK, f.W_COUNTERS),
        *range(f.W_PARTITIONS, f.W_DELETED),
        *range(f.HEADER_BYTES // 8, index.first_slot * SLOT_WORDS),
    ]
    kept = 0
    while kept < 1 + seed % 3 * 5:
        at = chosen.choice(places)
        was = words[at]
        words[at] = chosen.choice((0, f.MASK64, was ^ 1 << chosen.randrange(64), chosen.getrandbits(64)))
        try:
            index.validate()
            kept += words[at] != was
        except IndexDamaged:
            words[at] = was
    use(index, model, chosen)
    index.close()


def test_a_reader_beside_a_writer_sees_old_or_new(path: Path, index: Index) -> None:
    """Every find during growth gives a slot of that digest."""
    chosen, model = random.Random(14), {}
    reader = view(path)
    fixed = [some_digest(chosen, 1) for _ in range(20)]
    for digest in fixed:
        index.put(some_slot(chosen, digest), 0)
    for i in range(2000):
        change(index, model, chosen, parts=1)
        at = reader.find(*fixed[i % 20])
        assert at and reader.slot(at)[:2] == fixed[i % 20]
    assert at < len(reader.words) and PARTITION_MASK & fixed[0][1] == 0
    reader.close()
