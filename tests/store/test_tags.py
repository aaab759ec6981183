"""Entries by their tags, through the cache: against a model, among processes, after deaths, rebuilds and damage."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from available import CORES
from helpers import Make, in_threads, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from test_processes import Crew
from xxhash import xxh3_64_intdigest

from yatagarasu_cache import CacheIOError, ClosedError, DiskCache, ReadOnlyError
from yatagarasu_cache.arguments import encode_tag
from yatagarasu_cache.codec import encode_key
from yatagarasu_cache.store import format as f
from yatagarasu_cache.store.index import Index

pytestmark = pytest.mark.usefixtures("core")

TAGS = (None, "t", "u", b"t", ("a", 1), 7)


def tagged(cache: DiskCache, tag: Any) -> set[Any]:
    keys = [entry.key for entry in cache.entries(tag=tag)]
    assert len(set(keys)) == len(keys)
    return set(keys)


def check(cache: DiskCache, model: dict[Any, Any]) -> None:
    """`model`: the tag of each key."""
    assert set(cache) == set(model)
    for tag in TAGS[1:]:
        assert tagged(cache, tag) == {key for key, its in model.items() if its == tag and type(its) is type(tag)}


def index_of(cache: DiskCache) -> Index:
    return cache._store.current.index


# -- what is found ---------------------------------------------------------------------------------


def test_every_way_to_store_a_tag(make: Make) -> None:
    cache = make(large_value_size=64 << 10, segment_size=1 << 20, size_limit=64 << 20)
    cache.set("bytes", b"v", tag="t")
    cache.set("text", "v", tag="t")
    cache.set("dict", {"a": 1}, tag="t", expire=1000, meta={"m": 1})
    cache.set("large", noise(200 << 10), tag="t")
    cache.set("stream", iter([b"a" * 1000] * 300), tag="t")
    cache.set("short stream", iter([b"a"]), tag="t")
    cache.add("added", b"v", tag="t")
    cache.set_many({f"many-{i}": b"v" for i in range(300)}, tag="t")
    cache.set("counter", 1, tag="t")
    assert cache.incr("counter") == 2  # which keeps the tag
    cache.set("k" * 5000, b"v", tag="t")
    cache.set("long", b"v", tag="t" * 5000)
    cache.set("none", b"v")
    cache.set("other", b"v", tag=b"t")
    expected = {"bytes", "text", "dict", "large", "stream", "short stream", "added", "counter", "k" * 5000}
    expected |= {f"many-{i}" for i in range(300)}
    assert tagged(cache, "t") == expected and tagged(cache, b"t") == {"other"}
    assert tagged(cache, "t" * 5000) == {"long"} and tagged(cache, "nobody's") == set()
    entry = next(entry for entry in cache.entries(tag="t") if entry.key == "dict")
    assert (entry.tag, entry.meta, entry.value) == ("t", {"m": 1}, {"a": 1})
    assert {entry.key for entry in cache.entries("many-1", tag="t")} == {k for k in expected if k[:6] == "many-1"}
    assert cache.check() == []
    assert cache.evict("t") == len(expected)
    assert set(cache) == {"long", "none", "other"} and cache.evict("t") == 0
    assert cache.check() == []


def test_the_tag_that_counts_is_the_latest(make: Make) -> None:
    cache = make()
    for tag in ("t", "u", None, "t", None, "u"):
        cache.set("k", b"v", tag=tag)
        assert tagged(cache, "t") == ({"k"} if tag == "t" else set())
        assert tagged(cache, "u") == ({"k"} if tag == "u" else set())
    assert cache.evict("t") == 0 and cache.evict("u") == 1
    cache.set("k", b"v", tag="t")
    cache.delete("k")
    cache.set("k", b"v")
    assert cache.evict("t") == 0 and "k" in cache
    cache.set("k", b"v", tag="t", expire=1000)
    cache.touch("k", 2000)
    cache.set("gone", b"v", tag="t", expire=0.001)
    time.sleep(0.002)
    assert tagged(cache, "t") == {"k"}  # and not what has expired
    assert cache.evict("t") == 1 and len(cache) == 0


def test_tags_of_one_hash_are_told_apart(make: Make) -> None:
    """Of some hundred thousand tags two have the same 32 bits."""
    cache = make()
    seed, known = cache._store.current.seed, {}
    for number in range(1 << 20):
        hash_ = f.tag_hash(encode_key(f"tag-{number}"), seed)
        if hash_ in known:
            break
        known[hash_] = number
    one, other = f"tag-{known[hash_]}", f"tag-{number}"
    for i in range(50):
        cache.set(f"one-{i}", b"v", tag=one)
        cache.set(f"other-{i}", b"v", tag=other)
    assert tagged(cache, one) == {f"one-{i}" for i in range(50)}
    assert cache.evict(other) == 50
    assert set(cache) == {f"one-{i}" for i in range(50)}
    assert cache.check() == []


def test_a_tag_without_a_hash_has_one(make: Make) -> None:
    assert f.tag_hash(b"", 5) == 0
    assert all(f.tag_hash(encode_key(i), 5) for i in range(1000))


def test_very_many_tags_and_one_on_everything(make: Make) -> None:
    cache = make(eviction="none")
    cache.set_many({f"own-{i}": b"v" for i in range(10)}, tag="few")
    for i in range(2000):
        cache.set(f"k{i}", b"v", tag=f"tag-{i}")
    assert tagged(cache, "tag-77") == {"k77"}
    cache.set_many({f"k{i}": b"w" for i in range(5000)}, tag="all")
    assert tagged(cache, "tag-77") == set() and tagged(cache, "all") == {f"k{i}" for i in range(5000)}
    assert cache.evict("few") == 10
    assert cache.evict("all") == 5000 and len(cache) == 0
    assert cache.check() == []


def test_what_was_replaced_takes_no_room(make: Make) -> None:
    """Cells are collected: many changes of few entries do not make the index longer."""
    cache = make()
    for i in range(100):
        cache.set(f"k{i}", b"v", tag="t")
    for i in range(4000):
        cache.set(f"k{i % 100}", b"v", tag=f"t{i % 7}")
    index = index_of(cache)
    rooms = [table.room for p in range(f.PARTITIONS) if (table := index._tag_table(p)) is not None]
    assert sum(rooms) <= 2.3 * 100 + len(rooms) * 21
    assert index.words[f.W_INDEX_BYTES] <= 256 << 10


def test_an_untagged_cache_has_no_tables(make: Make) -> None:
    cache = make()
    cache.set_many(dict.fromkeys(range(3000), b"v"))
    assert cache.evict("t") == 0 and tagged(cache, "t") == set()
    assert not index_of(cache).has_tags


def test_the_other_core_finds_what_one_has_stored(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {}
    for turn, name in enumerate(("python", "c", "python", "c")):
        monkeypatch.setenv("YATAGARASU_CORE", name)
        cache = make()
        for i in range(300):
            key, tag = f"k{(i * 7 + turn * 150) % 400}", TAGS[(i + turn) % len(TAGS)]
            cache.set(key, b"v", tag=tag)
            model[key] = tag
        check(cache, model)
        assert cache.check() == []
        cache.close()


def test_a_walk_of_tags_while_others_change(make: Make) -> None:
    """What is there all the time is found once, whatever is put, removed and moved meanwhile."""
    cache = make(size_limit=4 << 20, segment_size=64 << 10, eviction="none")
    steady = {f"steady-{i}" for i in range(200)}
    cache.set_many(dict.fromkeys(steady, b"s" * 500), tag="t")
    ends: list[int] = []

    def work(which: int) -> None:
        try:
            if which:
                for _ in range(12):
                    assert steady <= tagged(cache, "t")
            else:
                for i in range(3000):
                    if ends:
                        return
                    cache.set(f"k{i % 300}", noise(400, i), tag="t" if i % 3 else "u")
                    if i % 40 == 0:
                        cache.evict("u")
        finally:
            if which:
                ends.append(which)

    in_threads(3, work)


def test_an_entry_that_was_replaced_during_an_eviction_stays(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make()
    cache.set_many(dict.fromkeys(range(5), b"old"), tag="t")
    removal = cache._store.removal
    remove = type(removal).remove

    def replaced_first(self: Any, *arguments: Any) -> Any:
        cache.set(3, b"new", tag="t")
        return remove(self, *arguments)

    monkeypatch.setattr(type(removal), "remove", replaced_first)
    assert cache.evict("t") == 4
    assert list(cache) == [3] and cache.get(3) == b"new"


def test_an_eviction_goes_on_where_the_disk_cannot_read_a_record(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make()
    cache.set_many(dict.fromkeys(range(20), b"v"), tag="t")
    bad = cache._desk.identify(7)[:2]
    reading = cache._store.reading
    names_of = reading.names_of

    def failing(slot: f.Slot) -> Any:
        if slot[:2] == bad:
            raise CacheIOError(errno.EIO, "cannot read an entry")
        return names_of(slot)

    monkeypatch.setattr(reading, "names_of", failing)
    with pytest.raises(CacheIOError):
        list(cache.entries(tag="t"))
    with pytest.raises(CacheIOError):
        cache.evict("t")
    monkeypatch.undo()
    assert list(cache) == [7] and cache.evict("t") == 1


def test_closed_and_read_only_handles(make: Make) -> None:
    cache = make()
    cache.set_many(dict.fromkeys(range(9), b"v"), tag="t")
    reading = make(read_only=True)
    assert tagged(reading, "t") == set(range(9))
    with pytest.raises(ReadOnlyError):
        reading.evict("t")
    cache.set(10, b"v", tag="t")
    assert tagged(reading, "t") == {*range(9), 10}
    walk = cache.entries(tag="t")
    next(walk)
    cache.close()
    with pytest.raises(ClosedError):
        list(walk)
    with pytest.raises(ClosedError):
        cache.evict("t")
    with pytest.raises(ClosedError):
        list(cache.entries(tag="t"))


# -- a model ---------------------------------------------------------------------------------------

KEYS = st.integers(0, 12).map("k{}".format)
OF_TAGS = st.sampled_from(TAGS)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), KEYS, OF_TAGS),
        st.tuples(st.just("set"), KEYS, OF_TAGS),
        st.tuples(st.just("set_many"), st.lists(KEYS, min_size=1, max_size=9, unique=True), OF_TAGS),
        st.tuples(st.just("add"), KEYS, OF_TAGS),
        st.tuples(st.just("large"), KEYS, OF_TAGS),
        st.tuples(st.just("delete"), KEYS),
        st.tuples(st.just("evict"), st.sampled_from(TAGS[1:])),
        st.tuples(st.just("touch"), KEYS),
        st.tuples(st.sampled_from(["clear", "clean", "reopen", "rebuild", "checkpoint", "remake", "check"])),
    ),
    max_size=40,
)


def step(cache: DiskCache, model: dict[str, Any], what: str, *arguments: Any) -> None:
    store = cache._store
    if what in ("set", "large", "add"):
        key, tag = arguments
        value = noise(20_000 if what == "large" else 300, len(model))
        if what != "add":
            cache.set(key, value, tag=tag)
            model[key] = tag
        elif cache.add(key, value, tag=tag):
            model[key] = tag
    elif what == "set_many":
        keys, tag = arguments
        cache.set_many(dict.fromkeys(keys, b"m" * 50), tag=tag)
        model.update(dict.fromkeys(keys, tag))
    elif what == "delete":
        assert cache.delete(*arguments) == (model.pop(arguments[0], "none") != "none")
    elif what == "evict":
        gone = [k for k, tag in model.items() if tag == arguments[0] and type(tag) is type(arguments[0])]
        assert cache.evict(*arguments) == len(gone)
        for key in gone:
            del model[key]
    elif what == "touch":
        cache.touch(arguments[0], 5000)
    elif what == "clear":
        cache.clear()
        model.clear()
    elif what == "clean":
        store.cleaner.clean_little()
    elif what == "checkpoint":
        store.checkpoints.write()
    elif what == "remake":
        with store.locks.index:
            store.current.remake(index_of(cache).table_capacity)
    elif what == "check":
        assert cache.check() == []


@pytest.mark.in_turn
@pytest.mark.usefixtures("quiet")
@settings(max_examples=40)
@given(steps=STEPS, saved=st.booleans())
def test_like_a_model(
    backend: str, tmp_path_factory: pytest.TempPathFactory, steps: list[Any], saved: bool
) -> None:
    directory = tmp_path_factory.mktemp("model") / "cache"
    options: dict[str, Any] = {
        "backend": backend, "size_limit": 2 << 20, "segment_size": 32 << 10, "eviction": "none",
    }  # fmt: skip
    cache, model = DiskCache(directory, **options), dict[str, Any]()
    try:
        for what in [*steps, ("rebuild",)]:
            if what[0] in ("reopen", "rebuild"):
                if saved:
                    cache._store.checkpoints.write()
                cache.close()
                if what[0] == "rebuild":
                    (directory / "index").unlink()
                cache = DiskCache(directory, **options)
            else:
                step(cache, model, *what)
            check(cache, model)
        assert cache.check() == []
    finally:
        cache.close()


# -- processes, and their deaths -------------------------------------------------------------------


@pytest.mark.in_turn
@pytest.mark.usefixtures("apart", "quiet")
def test_processes_add_under_a_tag_while_another_evicts(make: Make, directory: Path, backend: str) -> None:
    make().close()

    def work(number: int) -> Any:
        with DiskCache(directory, backend=backend) as cache:
            if number:
                for i in range(400):
                    cache.set(f"{number}-{i}", noise(200, i), tag="t")
                    if i % 100 == 99:
                        cache.set_many({f"{number}-many-{i}-{n}": b"v" for n in range(20)}, tag="t")
                return 480
            removed = 0
            for _ in range(25):
                removed += cache.evict("t")
                time.sleep(0.005)
            return removed

    with Crew(work) as crew:
        removed, *added = crew.results()
    cache = make()
    left = set(cache)
    assert removed + len(left) == sum(added)
    assert tagged(cache, "t") == left
    assert cache.evict("t") == len(left) and len(cache) == 0
    assert cache.check() == []


@pytest.mark.parametrize("times", [1, 3])
def test_a_version_that_was_tagged_and_never_shown_hides_none(make: Make, core: str, times: int) -> None:
    """Its writer died in between, and the entry that he was to replace has the same tag."""
    cache = make()
    cache.set("k", b"v", tag="t")
    cache.set("other", b"v", tag="t")
    store = cache._store
    low, high, _ = cache._desk.identify("k")
    with store.locks.index:
        index = store.current.index
        slot = index.slot(store.finding.find(low, high))
        for later in range(1, times + 1):
            index.tag(slot._replace(stamp=slot.stamp + later), f.tag_hash(encode_tag("t"), index.identity.seed))
    assert tagged(cache, "t") == {"k", "other"} and cache.check() == []
    assert cache.evict("t") == 2 and len(cache) == 0


@pytest.mark.in_turn
@pytest.mark.parametrize("rebuild", [False, True])
@pytest.mark.usefixtures("apart", "quiet")
def test_everything_that_was_stored_is_found_after_a_kill(
    make: Make, directory: Path, backend: str, rebuild: bool
) -> None:
    make().close()
    chance = random.Random(int(rebuild))
    done = 0
    for _ in range(8):
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                cache = DiskCache(directory, backend=backend)
                for i in range(100_000):
                    cache.set(f"k{i % 500}", noise(100, i), tag=f"t{i % 3}" if i % 4 else None)
                    os.write(write, b".")
            finally:
                os._exit(1)
        os.close(write)
        done += len(os.read(read, 1))
        time.sleep(0.05 + chance.random() * 0.1)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        if rebuild:
            (directory / "index").unlink()
        cache = make()
        tags = {entry.key: entry.tag for entry in cache.entries()}
        assert set(tags) == set(cache) and (tags or not done)
        for tag in ("t0", "t1", "t2"):
            assert tagged(cache, tag) == {key for key, its in tags.items() if its == tag}
        assert cache.evict("t1") == sum(tag == "t1" for tag in tags.values())
        assert [p for p in cache.check() if p.kind in ("index", "entry")] == []
        cache.close()
    assert done == 8


@pytest.mark.usefixtures("apart", "quiet")
def test_an_eviction_takes_what_the_dead_did_not_come_to_show(make: Make, directory: Path, backend: str) -> None:
    """A record that was appended, and not shown, does not come back when the index is made anew."""
    make().close()
    pid = os.fork()
    if not pid:
        cache = DiskCache(directory, backend=backend)
        cache.set("shown", b"v", tag="t")
        store = cache._store
        item = cache._desk.item("unshown", b"v", None, "t", None)
        with store.locks.appending:
            writer = store.room.writer(item.room)
            head, _ = item.draft(store.current.index, store.limits.policy, writer.next_place, 1,
                                 f.value_sum(b"v", item.low, 0))  # fmt: skip
            writer.append(head, b"v")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    cache = make()
    assert cache.evict("t") == 1
    cache.close()
    (directory / "index").unlink()
    assert list(make()) == []


def test_threads_under_one_tag(make: Make) -> None:
    cache = make()

    def work(which: int) -> None:
        for i in range(200):
            cache.set(f"{which}-{i}", b"v", tag="t")

    in_threads(4, work)
    assert cache.evict("t") == 800


@pytest.mark.skipif("c" not in CORES, reason="no compiled core")
@pytest.mark.parametrize("cells", [0, 3, 14])  # the table is made, has room, is made anew
def test_compiled_code_killed_after_every_store(
    tmp_path: Path, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry is found by its tag as soon as it is shown, and not before."""
    monkeypatch.setenv("YATAGARASU_CORE", "c")
    with DiskCache(tmp_path / "original", backend="threads") as first:
        seed = first._store.current.seed
        part = f.key_digest(encode_key("k"), seed)[1] % f.PARTITIONS
        beside = [i for i in range(2000) if f.key_digest(encode_key(i), seed)[1] % f.PARTITIONS == part][:4]
        first.set("k", b"old")
        first.set(beside[0], b"v", tag="other")
        first.clear()  # there is room for a table
        first.set("k", b"old")
        for i in range(cells):
            first.set(beside[i % 4], b"v", tag="t")
    stores = finished = 0
    while finished < 3:
        shutil.copytree(tmp_path / "original", tmp_path / f"killed-{stores}")
        cache = DiskCache(tmp_path / f"killed-{stores}", backend="threads")
        store = cache._store
        core: Any = store.core
        with store.locks.appending:
            writer = store.room.writer(5000)
            listed, writer.tail, *_ = core.put(
                writer.fd, writer.segment, writer.tail, store.locks.index.fd, time.time_ns(),
                (encode_key("k"), b"new", 0, 0, encode_key("t"), b""), stores,
            )  # fmt: skip
            writer.enlist(writer.tail, listed)
        with store.locks.index:
            pass  # what it left is put in order
        shown = cache.get("k") == b"new"
        others = set(beside[: min(4, cells)])
        assert tagged(cache, "t") == others | ({"k"} if shown else set())
        assert cache.check() == []
        for i in range(40):
            cache.set(beside[i % 4], b"w", tag="t" if i % 2 else "u")
        assert tagged(cache, "t") == {beside[1], beside[3]} | ({"k"} if shown else set())
        assert cache.check() == []
        cache.close()
        finished += shown
        stores += 1
    assert stores > 20


# -- damage ----------------------------------------------------------------------------------------


def table_words(index: Index) -> list[int]:
    """Every word of every tag table, and their descriptors."""
    found = list(range(f.W_TAGS, f.W_TAGS + f.PARTITIONS))
    for part in range(f.PARTITIONS):
        descriptor = index.words[f.W_TAGS + part]
        if descriptor != f.UNTAGGED:
            first = (descriptor >> f.DESCRIPTOR_BITS) * f.SLOT_WORDS
            found += range(first, first + (descriptor & f.CAPACITY_MASK) * f.SLOT_WORDS)
    return found


@pytest.fixture
def stored(make: Make) -> Iterator[tuple[DiskCache, dict[Any, Any]]]:
    cache = make()
    model = {f"k{i}": TAGS[i % len(TAGS)] for i in range(200)}
    for key, tag in model.items():
        cache.set(key, b"v" * 300, tag=tag)
    yield cache, model


@pytest.mark.in_turn
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.usefixtures("quiet")
def test_damaged_words_never_give_a_wrong_entry(
    stored: tuple[DiskCache, dict[Any, Any]], seed: int
) -> None:
    cache, model = stored
    chance = random.Random(seed)
    for _ in range(12):
        index = index_of(cache)
        words = table_words(index)
        for _ in range(chance.choice((1, 2, 8))):
            at = chance.choice(words)
            index.words[at] = chance.choice((0, index.words[at] ^ 1 << chance.randrange(64), f.MASK64, 5))
        for tag in TAGS[1:]:
            expected = {key for key, its in model.items() if its == tag and type(its) is type(tag)}
            assert tagged(cache, tag) <= expected
        for i in range(5):
            cache.set(f"k{i}", b"w", tag=model[f"k{i}"])
        cache.check(fix=True)
        check(cache, model)
        assert cache.check() == []


def test_damage_is_mended_and_told(
    stored: tuple[DiskCache, dict[Any, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """What is seen to be damaged is made anew by whoever comes upon it."""
    cache, model = stored
    caplog.set_level(logging.WARNING)
    for word in (f.W_TAGS, f.W_TAGS + 1):
        index_of(cache).words[word] = 0
        assert tagged(cache, "t") == {key for key, tag in model.items() if tag == "t"}
    assert "the index is damaged (a tag table" in caplog.text
    check(cache, model)


def test_a_handle_that_only_reads_walks_instead(stored: tuple[DiskCache, dict[Any, Any]], make: Make) -> None:
    cache, model = stored
    reading = make(read_only=True)
    for part in range(0, f.PARTITIONS, 9):
        index_of(cache).words[f.W_TAGS + part] ^= 4
    check(reading, model)


def test_check_finds_what_tags_do_not_lead_to(stored: tuple[DiskCache, dict[Any, Any]]) -> None:
    cache, model = stored
    index, lost = index_of(cache), 0
    for part in range(f.PARTITIONS):
        table = index._tag_table(part)
        if table is not None and table.count:
            index.words[table._first_cell + f.TagCell._fields.index("stamp")] += 1  # as if it were of another version
            lost += 1
    missing = {key for key, tag in model.items() if tag is not None} - {
        key for tag in TAGS[1:] for key in tagged(cache, tag)
    }
    assert len(missing) == lost > 10
    problems = cache.check()
    assert {problem.detail for problem in problems} == {"its tag does not lead to it"}
    assert len(problems) == lost and not any(problem.fixed for problem in problems)
    assert all(problem.fixed for problem in cache.check(fix=True))
    assert cache.check() == []
    check(cache, model)


def test_large_values_are_checked_as_well(make: Make) -> None:
    cache = make(large_value_size=16 << 10)
    cache.set("large", noise(40 << 10), tag="t")
    cache.set("other", noise(40 << 10))
    (table,) = [t for p in range(f.PARTITIONS) if (t := index_of(cache)._tag_table(p)) is not None]
    index_of(cache).words[table._first_cell] ^= 1 << 40
    assert [problem.detail for problem in cache.check(fix=True)] == ["its tag does not lead to it"]
    assert cache.evict("t") == 1 and set(cache) == {"other"}


def test_a_damaged_checkpoint_is_none(make: Make, directory: Path) -> None:
    """Hashes of some of the tags: nobody has written that."""
    cache = make()
    cache.set_many({f"k{i}": b"v" for i in range(1000)}, tag="t")
    cache._store.checkpoints.write()
    cache.close()
    path = directory / f.CHECKPOINT_NAME
    data = bytearray(path.read_bytes())
    at = f.CHECKPOINT_HEADER.size + int.from_bytes(data[48:56], "little") * f.CHECKPOINT_SEGMENT.size
    slots, hashes = f.CHECKPOINT_PART.unpack_from(data, at)
    assert slots == hashes > 0
    data[at + 8 : at + 16] = (hashes - 1).to_bytes(8, "little")
    data[-8:] = xxh3_64_intdigest(bytes(data[:-8])).to_bytes(8, "little")
    path.write_bytes(data)
    (directory / "index").unlink()
    cache = make()
    assert cache._store.recovery._read_checkpoint() is None
    assert len(tagged(cache, "t")) == 1000  # by the segments


def test_a_rebuild_by_the_checkpoint_alone_knows_the_tags(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments that it lists as sealed are not read."""
    cache = make(segment_size=16 << 10, size_limit=1 << 20)
    model = {f"k{i}": TAGS[i % len(TAGS)] for i in range(150)}
    for key, tag in model.items():
        cache.set(key, b"v" * 900, tag=tag)
    cache._store.checkpoints.write()
    assert index_of(cache).words[f.W_CHECKPOINT_BYTES] == (directory / f.CHECKPOINT_NAME).stat().st_size
    cache.close()
    (directory / "index").unlink()
    check(make(), model)

