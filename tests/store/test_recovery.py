"""Opening what an earlier process left: a clean end, a killed process, a machine that went down.

The index made anew shows what the lost one showed; leftovers go, but only when nobody else is
there, and never what is not ours. Chance and power cuts are in test_power.py, damage in
test_damage.py.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import itertools
import logging
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty import seeded
from helpers import Clock, noise, tree

from yatagarasu_cache import CacheIOError, DiskCache, FormatError, ReadOnlyError
from yatagarasu_cache.store import format as f
from yatagarasu_cache.store import recovery
from yatagarasu_cache.store.checkpointing import Checkpoints

pytestmark = pytest.mark.usefixtures("apart", "core", "quiet")  # each handle stands for a process

SMALL: dict[str, Any] = {"size_limit": 1 << 20, "segment_size": 8192, "eviction": "none"}
LARGE = 3000  # bytes: with such segments this has a file of its own
_boots = itertools.count(1)


@pytest.fixture
def reboot(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Start the machine anew, as far as the cache can tell."""

    def start() -> None:
        number = next(_boots)
        monkeypatch.setattr(recovery, "boot_id", lambda: number.to_bytes(16, "little"))

    start()
    return start


@pytest.fixture
def rebuilds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The directories whose index was made anew, one after the other."""
    made: list[Path] = []
    rebuild = recovery.Recovery.rebuild

    def counted(self: Any, old: Any) -> Any:
        made.append(Path(self._files.root))
        return rebuild(self, old)

    monkeypatch.setattr(recovery.Recovery, "rebuild", counted)
    return made


def abandon(cache: DiskCache) -> None:
    """Leave the cache as the end of the process would: nothing is closed in order."""
    store = cache._store
    if store.active.writer is not None:
        store.active.writer.abandon()
        store.active.writer = None
    if store.owner._fd >= 0:  # the mark stays, its lock goes
        os.close(store.owner._fd)
        store.owner._fd = -1
    store.life.closed = True
    store._release()


@dataclasses.dataclass(frozen=True)
class Shown:
    """Everything that can be seen of an entry, as far as it outlives a rebuild."""

    value: Any
    tag: Any
    meta: Any
    size: int
    created: float
    expires: float | None


def shown(cache: DiskCache) -> dict[Any, Shown]:
    return {
        entry.key: Shown(entry.value, entry.tag, entry.meta, entry.size, entry.created, entry.expires)
        for entry in cache.entries()
    }


def busy_life(cache: DiskCache, rng: random.Random, turns: int = 250) -> dict[str, bytes]:
    """Every kind of change, segments begun and cleaned; the values as they should be in the end."""
    values: dict[str, bytes] = {}
    for turn in range(turns):
        key = f"k{rng.randrange(40)}"
        value = f"{key} {turn}:".encode() + noise(rng.choice((0, 40, 500, 1500, LARGE)), turn)
        kind = rng.choice(("set", "set", "set", "many", "delete", "touch", "pop", "tag"))
        if kind == "set":
            cache.set(key, value, expire=rng.choice((None, 1e5, 1e6)), meta={"turn": turn})
            values[key] = value
        elif kind == "tag":
            cache.set(key, value, tag=("t", turn % 3))
            values[key] = value
        elif kind == "many":
            items = {f"{key}-{i}": value for i in range(rng.randrange(4))}
            cache.set_many(items, tag="many")
            values.update(items)
        elif kind in ("delete", "pop"):
            cache.delete(key) if kind == "delete" else cache.pop(key)
            values.pop(key, None)
        else:
            cache.touch(key, 1e4 + turn)
        if turn % 50 == 30:
            with cache._store.locks.appending:
                cache._store.active.seal()
            cache._store.cleaner.clean_emptiest()
        if turn in (turns // 3, turns // 2):
            cache._store.checkpoints.write_if()
        if turn == turns * 2 // 3:
            cache.evict(("t", 1))
            values = {key: value for key, value in values.items() if key in cache}
    return values


# -- the same as before -------------------------------------------------------------------------


@pytest.mark.in_turn
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "abandoned"])
@pytest.mark.parametrize("how", ["index lost", "index empty", "new boot", "asked for"])
def test_rebuild_shows_what_was_there(
    make: Callable[..., DiskCache], directory: Path, reboot: Callable[[], None], rebuilds: list[Path],
    how: str, closed: bool,
) -> None:  # fmt: skip
    rng = seeded(f"rebuild {how} {closed}")
    cache = make(**SMALL)
    values = busy_life(cache, rng)
    before, count, volume = shown(cache), len(cache), cache.stats().live_bytes
    assert {key: entry.value for key, entry in before.items()} == values
    if how == "asked for":
        cache._store.current.rebuild("a test")
    else:
        cache.close() if closed else abandon(cache)
        if how == "index lost":
            (directory / "index").unlink()
        elif how == "index empty":
            os.truncate(directory / "index", 0)
        else:
            reboot()
        cache = make(**SMALL)
    assert bool(rebuilds) == (how != "new boot" or not closed)
    assert shown(cache) == before
    assert len(cache) == count
    assert cache.check() == []
    assert abs(cache.stats().live_bytes - volume) < 20_000
    cache.set("one more", b"value")
    cache.delete(next(iter(before)))
    after = shown(cache)
    cache.close()
    (directory / "index").unlink()
    assert shown(make(**SMALL)) == after


def test_times_of_expiry_survive(
    make: Callable[..., DiskCache], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry whose time was changed by touch, moved by cleaning or covered by a checkpoint ends on time."""
    clock = Clock(monkeypatch)
    cache = make(**SMALL)
    for i in range(20):
        cache.set(f"k{i}", noise(600, i), expire=100)
    for i in range(0, 20, 2):
        cache.touch(f"k{i}", 1000)
    for i in range(0, 20, 4):
        cache.touch(f"k{i}")
    for step in ("seal", "clean", "checkpoint", "seal", "clean"):
        if step == "seal":
            with cache._store.locks.appending:
                cache._store.active.seal()
        elif step == "clean":
            for i in range(1, 20, 4):  # garbage to clean for
                cache.set(f"g{i}", noise(600, i))
                cache.delete(f"g{i}")
            cache._store.cleaner.clean_emptiest()
        else:
            cache._store.checkpoints.write_if()
    for wait, left in ((0, set(range(20))), (101, set(range(0, 20, 2))), (1000, set(range(0, 20, 4)))):
        clock.advance(wait)
        cache.close()
        (directory / "index").unlink()
        cache = make(**SMALL)
        assert {i for i in range(20) if cache.get(f"k{i}") is not None} == left


def test_order_of_eviction_survives_through_a_checkpoint(
    make: Callable[..., DiskCache], directory: Path
) -> None:
    options = {"size_limit": 1 << 20, "segment_size": 8192, "eviction": "lru"}
    cache = make(**options)
    for i in range(60):
        cache.set(i, noise(500, i))
    used = [7, 3, 41, 20]
    for i in used:
        cache.get(i)
    cache._store.checkpoints.write_if()
    cache.close()
    (directory / "index").unlink()
    cache = make(**options)
    evicted: list[int] = []
    for _ in range(60):
        before = set(cache)
        cache._store.evictor.evict(lambda: 1)
        evicted += before - set(cache)
    expected = [i for i in range(60) if i not in used] + used
    assert evicted == expected


def test_counters_and_additions_go_on(make: Callable[..., DiskCache], directory: Path) -> None:
    cache = make(**SMALL)
    for expected in range(1, 40):
        assert cache.incr("n") == expected
        if expected % 7 == 0:
            cache.close()
            (directory / "index").unlink()
            cache = make(**SMALL)
            assert cache.add("n", 0) is False
    assert cache.pop("n") == 39
    cache.close()
    (directory / "index").unlink()
    cache = make(**SMALL)
    assert cache.add("n", 5) is True
    assert cache.incr("n") == 6


def test_what_was_cleared_stays_away(make: Callable[..., DiskCache], directory: Path) -> None:
    cache = make(**SMALL)
    busy_life(cache, seeded("clear"), 100)
    cache.clear()
    cache.set("after", b"value")
    cache.close()
    (directory / "index").unlink()
    cache = make(**SMALL)
    assert list(cache) == ["after"]
    assert os.listdir(directory / "large") == []


def test_rebuilding_twice_changes_nothing(make: Callable[..., DiskCache], directory: Path) -> None:
    cache = make(**SMALL)
    busy_life(cache, seeded("twice"))
    seen = shown(cache)
    for _ in range(3):
        cache.close()
        (directory / "index").unlink()
        cache = make(**SMALL)
        assert shown(cache) == seen


# -- when the index is trusted ------------------------------------------------------------------


def test_a_clean_end_needs_no_rebuild(
    make: Callable[..., DiskCache], reboot: Callable[[], None], rebuilds: list[Path]
) -> None:
    for turn in range(3):
        cache = make(**SMALL)
        assert cache.get("turn") == (turn - 1 if turn else None)
        cache.set("turn", turn)
        cache.close()
        reboot()
    assert rebuilds == []


def test_an_unclean_end_needs_one_after_a_reboot_only(
    make: Callable[..., DiskCache], reboot: Callable[[], None], rebuilds: list[Path]
) -> None:
    cache = make(**SMALL)
    cache.set("k", b"v")
    abandon(cache)
    cache = make(**SMALL)
    assert cache.get("k") == b"v"
    assert rebuilds == []
    abandon(cache)
    reboot()
    cache = make(**SMALL)
    assert cache.get("k") == b"v"
    assert len(rebuilds) == 1
    abandon(cache)
    assert make(**SMALL).get("k") == b"v"
    assert len(rebuilds) == 1


def test_one_of_two_handles_is_no_end(
    make: Callable[..., DiskCache], reboot: Callable[[], None], rebuilds: list[Path]
) -> None:
    """Clean is a cache whose last handle was closed."""
    one, two = make(**SMALL), make(**SMALL)
    one.set("k", b"v")
    one.close()
    two.set("k", b"w")
    abandon(two)
    reboot()
    assert make(**SMALL).get("k") == b"w"
    assert len(rebuilds) == 1


def test_reading_only_does_not_mend(
    make: Callable[..., DiskCache], directory: Path, reboot: Callable[[], None]
) -> None:
    cache = make(**SMALL)
    cache.set("k", b"v")
    abandon(cache)
    reboot()
    before = tree(directory)
    with pytest.raises(ReadOnlyError, match="without read_only"):
        make(read_only=True, **SMALL)
    assert tree(directory) == before
    make(**SMALL).close()
    assert make(read_only=True, **SMALL).get("k") == b"v"


def test_the_system_has_no_boot_id(
    make: Callable[..., DiskCache], monkeypatch: pytest.MonkeyPatch, rebuilds: list[Path]
) -> None:
    """Then who comes alone behind an unclean end makes the index anew; who comes beside others does not."""
    monkeypatch.setattr(recovery, "boot_id", lambda: bytes(16))
    one = make(**SMALL)
    one.set("k", b"v")
    two = make(**SMALL)
    assert two.get("k") == b"v"
    assert rebuilds == []
    abandon(one)
    abandon(two)
    assert make(**SMALL).get("k") == b"v"
    assert len(rebuilds) == 1


# -- leftovers ----------------------------------------------------------------------------------


def leave_things_behind(directory: Path) -> dict[str, Path]:
    """What a process leaves that is killed at the wrong moments."""
    with DiskCache(directory, backend="threads", **SMALL) as cache:
        cache.set("kept", noise(LARGE))
        identity = cache._store.current.index.identity
    things = {
        "temporary": directory / "tmp" / "00000000deadbeef-1.tmp",
        "orphan": directory / "large" / f.large_name(2, 1, 1),
        "mark": directory / "writers" / "00000000deadbeef.lock",
        "segment": directory / "segments" / f.segment_name(200),
        "torn segment": directory / "segments" / f.segment_name(201),
        "empty segment": directory / "segments" / f.segment_name(202),
    }
    for path in things.values():
        path.write_bytes(b"")
    things["orphan"].write_bytes(noise(LARGE))
    things["segment"].write_bytes(f.pack_segment_header(200, identity, 1, 0))
    things["torn segment"].write_bytes(bytes(4096))
    cache = DiskCache(directory, backend="threads", **SMALL)
    abandon(cache)
    return things


def test_leftovers_go_when_nobody_else_is_there(directory: Path, make: Callable[..., DiskCache]) -> None:
    things = leave_things_behind(directory)
    for path in things.values():
        if not path.exists():  # the opening in between was alone too
            path.write_bytes(b"")
    cache = make(**SMALL)
    assert not [name for name, path in things.items() if path.exists()]
    assert cache.get("kept") == noise(LARGE)
    assert cache.check() == []
    assert cache.stats().disk_bytes < 100_000


def test_leftovers_stay_while_others_are_alive(directory: Path, make: Callable[..., DiskCache]) -> None:
    """They may be theirs, just being made."""
    first = make(**SMALL)
    first.set("kept", noise(LARGE))
    identity = first._store.current.index.identity
    recent = first._store.current.index.stamp()
    things = [
        directory / "tmp" / "00000000deadbeef-1.tmp",
        directory / "large" / f.large_name(2, 1, recent),
        directory / "segments" / f.segment_name(200),
    ]
    for path in things:
        path.write_bytes(f.pack_segment_header(200, identity, 1, 0))
    second = make(**SMALL)
    second.set("k", b"v")
    second.check()
    second.close()
    third = make(**SMALL)
    assert [path for path in things if not path.exists()] == []
    assert {p.name for p in (directory / "writers").iterdir()} >= {f"{first._store.owner.token:016x}.lock"}
    third.close()
    abandon(first)
    make(**SMALL).close()
    assert [path for path in things if path.exists()] == []


def test_a_dead_writers_segment_is_taken_over(directory: Path, make: Callable[..., DiskCache]) -> None:
    """Its bytes count as they are, and others clean and drop it; its mark goes when somebody comes alone."""
    dead, alive = make(**SMALL), make(**SMALL)
    for i in range(20):
        dead.set(i, noise(300, i))
    dead._store.cleaner._begin_cleaning()
    mark = directory / "writers" / f"{dead._store.owner.token:016x}.lock"
    abandon(dead)
    assert mark.exists()
    active = [s for s in alive._store.current.index.segments() if alive._store.current.index.state(s) == f.ACTIVE]
    assert active
    assert alive._store.reaper.reap() > 0
    index = alive._store.current.index
    assert not [s for s in index.segments() if index.words[index.entry(s) + f.T_OWNER]]
    assert [alive.get(i) for i in range(20)] == [noise(300, i) for i in range(20)]
    assert alive.check() == []
    alive.clear()
    alive.set("k", b"v")
    writer = alive._store.active.writer
    assert writer is not None  # it may go on with the one that was left
    left = {f.parse_segment_name(path.name) for path in (directory / "segments").iterdir()}
    assert left & set(active) <= {writer.segment}
    abandon(alive)
    make(**SMALL)
    assert not mark.exists()


def test_a_mark_that_is_locked_is_alive(directory: Path, make: Callable[..., DiskCache]) -> None:
    cache = make(**SMALL)
    cache.set("k", b"v")
    mark = directory / "writers" / "00000000deadbeef.lock"
    with mark.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert 0xDEADBEEF in cache._store.owner.alive_tokens()
        assert mark.exists()
    assert 0xDEADBEEF not in cache._store.owner.alive_tokens()
    assert cache._store.owner.token in cache._store.owner.alive_tokens()


FOREIGN = [
    "notes.txt",
    "a.tmp",
    "x.lock",
    "12.seg",
    "README",
    ".hidden",
    "0000000g.seg",
    "0123456789abcdef-zz.tmp",
]


@pytest.mark.parametrize("unclean", [True, False])
def test_what_is_not_ours_is_left_alone(
    directory: Path, make: Callable[..., DiskCache], reboot: Callable[[], None], unclean: bool
) -> None:
    cache = make(**SMALL)
    cache.set("k", noise(LARGE))
    foreign = [
        directory / part / name for part in ("", "segments", "large", "tmp", "writers") for name in FOREIGN
    ]
    foreign += [directory / "large" / "folder" / "file", directory / "segments" / "folder" / "file"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"precious")
    abandon(cache) if unclean else cache.close()
    if unclean:
        reboot()
    cache = make(**SMALL)
    cache.check(fix=True)
    cache.clear()
    cache.set("k", b"v")
    cache._store.current.rebuild("a test")
    cache.close()
    (directory / "index").unlink()
    assert make(**SMALL).get("k") == b"v"
    assert [path for path in foreign if path.read_bytes() != b"precious"] == []


def test_a_segment_of_another_cache_is_left_alone(tmp_path: Path, make: Callable[..., DiskCache]) -> None:
    """Nothing is read from it; it is said to be there, and not touched."""
    with make(tmp_path / "theirs", **SMALL) as theirs:
        theirs.set("k", b"theirs")
    with make(tmp_path / "ours", **SMALL) as ours:
        ours.set("k", b"ours")
        ours.set("l", b"ours")
    copied = tmp_path / "ours" / "segments" / f.segment_name(0x99)
    shutil.copyfile(next((tmp_path / "theirs" / "segments").iterdir()), copied)
    before = copied.read_bytes()
    for _ in range(2):
        with make(tmp_path / "ours", **SMALL) as ours:
            assert ours.get("k") == ours.get("l") == b"ours"
            assert [problem.kind for problem in ours.check(fix=True)] == ["stray"]
            for i in range(30):
                ours.set(i, noise(900))
        (tmp_path / "ours" / "index").unlink()
    assert copied.read_bytes() == before


# -- directories --------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [{"index"}, {"segments", "lock"}, {"index", "segments", "large", "lock"}])
def test_ours_without_its_tag(directory: Path, make: Callable[..., DiskCache], left: set[str]) -> None:
    """An index, or segments beside a lock file, prove as well whose directory it is."""
    with make(**SMALL) as cache:
        cache.set("k", b"v")
    for path in directory.iterdir():
        if path.name not in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    cache = make(**SMALL)
    assert cache.get("k") == (b"v" if "segments" in left else None)
    cache.set("k", b"w")
    assert cache.get("k") == b"w"


@pytest.mark.parametrize(
    "content", [b"", f.TAG_TEXT[:50], f.TAG_TEXT[:64] + bytes(20), bytes(len(f.TAG_TEXT))]
)
def test_begun_and_not_finished(directory: Path, make: Callable[..., DiskCache], content: bytes) -> None:
    """The power failed when nothing but the tag was made, or half of it."""
    directory.mkdir()
    (directory / f.TAG_NAME).write_bytes(content)
    make(**SMALL).set("k", b"v")
    assert (directory / f.TAG_NAME).read_bytes() == f.TAG_TEXT


@pytest.mark.parametrize(
    "content", [b"Signature: 8a477f597d28d172789f06886806bc55\n# of another program", b"other"]
)
def test_the_tag_of_another_program(directory: Path, make: Callable[..., DiskCache], content: bytes) -> None:
    directory.mkdir()
    (directory / f.TAG_NAME).write_bytes(content)
    with pytest.raises(FormatError, match="not a cache"):
        make(**SMALL)
    assert (directory / f.TAG_NAME).read_bytes() == content
    assert len(list(directory.iterdir())) == 1


def test_missing_directories_inside_are_made(directory: Path, make: Callable[..., DiskCache]) -> None:
    with make(**SMALL) as cache:
        cache.set("small", b"v")
        cache.set("large", noise(LARGE))
    for name in ("large", "tmp", "writers"):
        shutil.rmtree(directory / name)
    cache = make(**SMALL)
    assert cache.get("small") == b"v"
    assert cache.get("large") is None
    cache.set("large", noise(LARGE))
    assert cache.get("large") == noise(LARGE)


# -- numbers of segments ------------------------------------------------------------------------


def test_a_number_is_not_used_twice(directory: Path, make: Callable[..., DiskCache]) -> None:
    """Numbers of files that are there, or that the checkpoint speaks of, are not given out again."""
    with make(**SMALL) as cache:
        for i in range(30):
            cache.set(i, noise(900, i))
        cache._store.checkpoints.write_if()
        highest = max(cache._store.current.index.segments())
    for path in sorted((directory / "segments").iterdir())[-2:]:
        path.unlink()
    (directory / "segments" / f.segment_name(highest + 5)).write_bytes(b"no segment at all" * 99)
    (directory / "index").unlink()
    cache = make(**SMALL)
    cache.set("k", b"v")
    writer = cache._store.active.writer
    assert writer is not None
    assert writer.segment > highest + 5


def test_segments_that_share_an_entry_of_the_table(directory: Path, make: Callable[..., DiskCache]) -> None:
    """Numbers that a larger table held apart, or the removal of one was undone by a power cut."""
    with make(**SMALL) as cache:
        cache.set("first", b"1")
        with cache._store.locks.appending:
            cache._store.active.seal()
        cache._store.current.index.words[f.W_NEXT_SEGMENT] += cache._store.current.index.table_capacity - 1
        one = max(cache._store.current.index.segments())
        cache._store.current.index.words[f.W_FLOOR] = 0
        capacity = cache._store.current.index.table_capacity
        kept = (directory / "segments" / f.segment_name(one)).read_bytes()
        cache.delete("first")
        with cache._store.locks.appending:
            cache._store.active.seal()
        cache._store.dead.drop_all()
        cache._store.current.index.words[f.W_NEXT_SEGMENT] = one + capacity
        cache.set("second", b"2")
        writer = cache._store.active.writer
        assert writer is not None
        assert writer.segment == one + capacity
    (directory / "segments" / f.segment_name(one)).write_bytes(kept)
    (directory / "index").unlink()
    cache = make(**SMALL)
    assert cache.get("second") == b"2"
    assert cache.get("first") in (None, b"1")  # its removal was not promised to last
    assert cache.check() == []


# -- the clock ----------------------------------------------------------------------------------


def test_the_clock_word_lost_a_race(
    make: Callable[..., DiskCache], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the clock is set back stamps only count on, and two processes that count at once may put the
    word back. What was set and removed then counts all the same, also for a rebuild."""
    clock = Clock(monkeypatch)
    cache = make(**SMALL)
    words = cache._store.current.index.words
    cache.set("a", b"old")
    cache.set("b", b"old")
    cache.set("large", noise(LARGE))
    clock.advance(-3600)
    for i in range(50):
        cache.set(f"k{i}", i)
    for turn in range(20):
        words[f.W_CLOCK] -= 40
        cache.set("a", turn)
        assert cache.get("a") == turn
        words[f.W_CLOCK] -= 40
        assert cache.delete("b")
        assert cache.get("b") is None
        words[f.W_CLOCK] -= 40
        cache.set("b", turn)
        assert cache.get("b") == turn
        words[f.W_CLOCK] -= 40
        assert cache.incr("n") == turn + 1
        words[f.W_CLOCK] -= 40
        cache.set_many([("c", turn), ("d", turn), ("c", -turn)])
        assert cache.get("c") == -turn
        words[f.W_CLOCK] -= 40
        cache.set("large", noise(LARGE, turn))
        assert cache.touch("d", 1e6)
        if turn == 10:
            cache._store.checkpoints.write_if()
    cache.delete("d")
    seen = shown(cache)
    assert {key: seen[key].value for key in ("a", "b", "c", "n")} == {"a": 19, "b": 19, "c": -19, "n": 20}
    cache.close()
    (directory / "index").unlink()
    assert shown(make(**SMALL)) == seen


def test_checkpoints_are_written_one_at_a_time(
    make: Callable[..., DiskCache], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two handles that begin at once the second waits: what the later one covers is in no log."""
    one, two = make(**SMALL), make(**SMALL)
    one.set("a", b"1")
    one.set("gone", b"1")
    write, floors = Checkpoints._write_file, []
    second = threading.Thread(target=two._store.checkpoints.write)

    def slow(store: Any, index: Any, path: str, floor: int, sealed: Any) -> None:
        floors.append(floor)
        if len(floors) == 1:
            second.start()
            second.join(0.2)
            assert second.is_alive() and len(floors) == 1
            two.set("b", b"2")
            two.delete("gone")
        write(store, index, path, floor, sealed)

    monkeypatch.setattr(Checkpoints, "_write_file", slow)
    one._store.checkpoints.write()
    second.join()
    assert sorted(floors) == floors and len(floors) == 2
    two.set("c", b"3")
    one.close()
    two.close()
    (directory / "index").unlink()
    cache = make(**SMALL)
    assert cache._store.current.index.words[f.W_FLOOR] == floors[1]
    assert [cache.get(key) for key in ("a", "b", "c", "gone")] == [b"1", b"2", b"3", None]


def test_a_segment_that_a_checkpoint_will_list_is_not_continued(
    make: Callable[..., DiskCache], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be taken for complete, and what came later would be lost."""
    with make(**SMALL) as cache:
        cache.set("a", b"1")
    one = make(**SMALL)
    write = Checkpoints._write_file
    others: list[DiskCache] = []

    def slow(*arguments: Any) -> None:
        others.append(make(**SMALL))
        others[-1].set("b", b"2")
        write(*arguments)
        others[-1].set("c", b"3")

    monkeypatch.setattr(Checkpoints, "_write_file", slow)
    one._store.checkpoints.write()
    for cache in (one, *others):
        cache.close()
    (directory / "index").unlink()
    cache = make(**SMALL)
    assert [cache.get(key) for key in "abc"] == [b"1", b"2", b"3"]


def logs(cache: DiskCache) -> list[int]:
    return cache._store.current.index.logs()


def test_logs_go_when_a_checkpoint_covers_them(make: Callable[..., DiskCache], directory: Path) -> None:
    cache = make(**SMALL)
    for i in range(20):
        cache.set(i, noise(100, i))
    cache.delete(1)
    cache.touch(2, 1000)
    (first,) = logs(cache)
    cache._store.checkpoints.write()
    (second,) = logs(cache)  # that tells of the checkpoint
    assert second != first
    assert not (directory / "segments" / f.segment_name(first)).exists()
    cache.delete(3)
    expires = cache.get_entry(2).expires  # type: ignore[union-attr]
    cache.close()
    (directory / "index").unlink()
    cache = make(**SMALL)
    assert set(cache) == set(range(20)) - {1, 3}
    assert cache.get_entry(2).expires == expires  # type: ignore[union-attr]
    cache.delete(4)
    assert len(logs(cache)) == 2
    cache._store.checkpoints.write()
    assert len(logs(cache)) == 1
    assert cache.check() == []


def test_without_the_checkpoint_that_a_log_tells_of_nothing_older_counts(
    make: Callable[..., DiskCache], directory: Path
) -> None:
    """What the checkpoint covered went with its log: "gone" would come back."""
    cache = make(**SMALL)
    cache.set("gone", b"old")
    cache.set("kept", b"old")
    cache.delete("gone")
    cache._store.checkpoints.write()
    cache.set("new", b"new")
    cache.close()
    for name in ("index", "checkpoint"):
        (directory / name).unlink()
    cache = make(**SMALL)
    assert {key: cache.get(key) for key in ("gone", "kept", "new")} == {"gone": None, "kept": None, "new": b"new"}


@pytest.mark.parametrize("torn", [1, 40, 79, 80, 95, 96])
def test_a_change_whose_author_died_is_overwritten(
    make: Callable[..., DiskCache], directory: Path, torn: int
) -> None:
    """It was appended in part, or whole, but not counted: nobody was told that it was made."""
    cache = make(**SMALL)
    for key in "abcd":
        cache.set(key, b"v")
    cache.delete("a")
    (log,) = logs(cache)
    index = cache._store.current.index
    tail = index.words[index.entry(log) + f.T_TAIL]
    change = f.pack_change(index.identity.seed, f.pack_place(log, tail), f.REMOVE, f.pack_digest(5, 6), index.stamp())
    with (directory / "segments" / f.segment_name(log)).open("r+b") as file:
        file.seek(tail)
        file.write(change[:torn])
    assert cache.check() == []
    cache.delete("b")
    assert index.words[index.entry(log) + f.T_TAIL] == tail + len(change)
    assert cache.check() == []
    cache.close()
    (directory / "index").unlink()
    assert sorted(make(**SMALL)) == ["c", "d"]


def test_a_log_that_is_missing_is_replaced(make: Callable[..., DiskCache], directory: Path) -> None:
    cache = make(**SMALL)
    for key in "abcd":
        cache.set(key, b"v")
    cache.delete("a")
    (lost,) = logs(cache)
    cache.close()
    (directory / "segments" / f.segment_name(lost)).unlink()
    cache = make(**SMALL)
    cache.delete("b")  # logged elsewhere
    assert lost in logs(cache) and len(logs(cache)) == 2
    assert [problem.where for problem in cache.check(fix=True)] == [f.segment_name(lost)]
    assert cache.check() == []
    cache.close()
    (directory / "index").unlink()
    cache = make(**SMALL)
    assert sorted(cache) == ["c", "d"]  # the checkpoint that check() wrote keeps what the log said


def test_a_damaged_log_is_found_and_mended(make: Callable[..., DiskCache], directory: Path) -> None:
    cache = make(**SMALL)
    for i in range(20):
        cache.set(i, noise(100, i))
    for i in range(10):
        cache.delete(i)
    (log,) = logs(cache)
    path = directory / "segments" / f.segment_name(log)
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)
    problems = cache.check()
    assert [(p.kind, p.where) for p in problems] == [("segment", f.segment_name(log))]
    assert cache.check(fix=True)[0].fixed
    assert cache.check() == []
    cache.close()
    (directory / "index").unlink()
    assert sorted(make(**SMALL)) == list(range(10, 20))


def test_an_index_much_too_large_is_made_anew(make: Callable[..., DiskCache], directory: Path) -> None:
    """In place of one that another handle uses as well."""
    cache, other = make(size_limit=4 << 20), make(size_limit=4 << 20)
    cache.set_many(dict.fromkeys(range(6000), b""))
    before = cache.stats().index_bytes
    cache.delete_many(range(100, 6000))
    assert cache._store.room._shrink_index()
    assert not cache._store.room._shrink_index()
    assert cache.stats().index_bytes < before / 5
    assert (directory / "index").stat().st_size == cache.stats().index_bytes
    for handle in (other, cache):
        assert sorted(handle) == list(range(100))
        handle.set(7, "new")
        assert other.get(7) == cache.get(7) == "new"
        assert handle.check() == []


# -- what is said of it -------------------------------------------------------------------------


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_lost_index_is_told_once(
    make: Callable[..., DiskCache], directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = make(**SMALL)
    cache.set_many({i: b"%d" % i for i in range(50)})
    cache.close()
    (directory / f.INDEX_NAME).unlink()
    caplog.set_level(logging.INFO, logger="yatagarasu_cache")
    caplog.clear()
    for _ in range(2):  # the second time there is nothing to tell
        cache = make(**SMALL)
        assert cache.get_many(range(50)) == {i: b"%d" % i for i in range(50)}
        cache.close()
    (line,) = warnings_of(caplog)
    assert line == f"{directory}: the index is missing: recovering it from the segments"


@pytest.mark.parametrize("size", [200, 5000], ids=["small", "large"])
def test_corrupt_values_are_told_once(
    make: Callable[..., DiskCache], directory: Path, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    """A handle that meets many does not fill the log: stats().corrupt counts them."""
    cache = make(**SMALL)
    values = {i: b"value %d of it " % i + noise(size, i) for i in range(3)}
    cache.set_many(values)
    for path in [*(directory / f.SEGMENTS_NAME).iterdir(), *(directory / f.LARGE_NAME).iterdir()]:
        data = path.read_bytes()
        for i in (0, 1):
            data = data.replace(b"value %d of it" % i, b"other %d of it" % i)
        with path.open("r+b") as file:
            file.write(data)
    caplog.set_level(logging.INFO, logger="yatagarasu_cache")
    caplog.clear()
    for _ in range(2):
        assert cache.get(0) is None and cache.get(1) is None and cache.get(2) == values[2]
    assert cache.stats().corrupt == 2
    (line,) = warnings_of(caplog)
    assert line == f"{directory}: an entry failed its checksum and was dropped (see stats().corrupt)"
    assert cache.check() == []


@pytest.mark.parametrize("failing", ["fdatasync", "fsync"])
def test_a_clear_that_failed_has_cleared_nothing(
    directory: Path, make: Callable[..., DiskCache], monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Nor does it when the index is made anew, which goes by what the log of changes says."""
    cache = make(backend="threads")
    for i in range(20):
        cache.set(i, b"v")
    cache.set("large", b"L" * 2_000_000)
    cache.flush()
    cache.set("new", b"n" * 2_000_000)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        if failing == "fdatasync":  # or else that is tried in its place
            patch.setattr(os, "fsync", fail)
        with pytest.raises(CacheIOError, match="the log of the system says more"):
            cache.clear()
    assert len(cache) == 22 and cache.delete(3)
    cache.close()
    os.unlink(directory / "index")
    again = make(backend="threads")
    assert len(again) == 21 and again.get(3) is None and again.get("new") == b"n" * 2_000_000
    assert again.clear() == 21
    again.close()
    os.unlink(directory / "index")
    assert len(make()) == 0


def test_what_others_appended_during_a_flush_is_synced_by_the_next(
    directory: Path, make: Callable[..., DiskCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sealed segment that somebody goes on with, and seals once more, is not what was synced."""
    flushing = make(backend="threads")
    with DiskCache(directory, backend="threads") as other:
        for i in range(40):
            other.set(i, b"x" * 1500)  # with a footer
    path, real, synced = directory / "segments" / "00000001.seg", os.fdatasync, []

    def sync(fd: int) -> None:
        real(fd)
        synced.append(os.fstat(fd).st_ino)
        if synced == [path.stat().st_ino]:
            with DiskCache(directory, backend="threads") as other:
                other.set("k" * 900, b"v")  # which takes the room of the footer: there is none any more

    monkeypatch.setattr(os, "fdatasync", sync)
    flushing.flush()
    del synced[1:]
    synced.append(0)
    flushing.flush()
    assert path.stat().st_ino in synced[2:]
    assert flushing.check() == []
