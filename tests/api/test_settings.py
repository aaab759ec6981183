"""Settings that belong to the cache, settings that differ between handles, and both ends of each range."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import errno
import functools
import io
import itertools
import json
import logging
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from available import CORES
from helpers import FailingBackend, environment, noise, tree, wrap_backends
from hypothesis import example, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from yatagarasu_cache import AsyncDiskCache, DiskCache, ReadOnlyError, StorageFull, ValueTooLarge
from yatagarasu_cache.codec import decode_key
from yatagarasu_cache.config import RingSettings, Settings
from yatagarasu_cache.store import cache_settings
from yatagarasu_cache.store import format as f
from yatagarasu_cache.store.cache_settings import CacheSettings
from yatagarasu_cache.store.eviction import POLICIES
from yatagarasu_cache.store.victims import Victims

pytestmark = pytest.mark.once

Make = Callable[..., DiskCache]
LIMIT = 8 << 20


def kept(cache: DiskCache | AsyncDiskCache) -> tuple[int, str, float]:
    """What holds for a handle."""
    there = cache.settings
    return there.size_limit, there.eviction, there.headroom


def order(cache: DiskCache) -> list[Any]:
    """The keys of a small cache, the next victim first."""
    index = cache._store.current.index
    names = {(slot.low, slot.high): key for key, slot in cache._store.walks.entries()}
    with cache._store.locks.index:
        slots = [index.slot(at) for at, _ in itertools.islice(Victims()(index), len(names))]
    return [decode_key(names[slot.low, slot.high]) for slot in slots]


def in_turn(function: Callable[[int], Any], numbers: Iterable[int]) -> None:
    """Call it with each, in different milliseconds: `lfu` tells no shorter times apart."""
    for number in numbers:
        time.sleep(0.0025)
        function(number)


class Other:
    """A handle in another process, which evaluates what it is given."""

    CODE = """
import json, logging, sys
from test_settings import *
cache = DiskCache(sys.argv[1], **json.loads(sys.argv[2]))
print(repr(None), flush=True)
for line in sys.stdin:
    try:
        result = eval(line)
    except Exception as error:
        result = type(error).__name__
    print(repr(result), flush=True)
cache.close()
"""

    def __init__(self, directory: Path, core: str = "", **options: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.CODE, str(directory), json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment(**({"YATAGARASU_CORE": core} if core else {})),
        )  # fmt: skip
        self._answer()

    def __call__(self, expression: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(expression + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"it ended: {self._process.wait()}"
        return ast.literal_eval(line)

    def close(self) -> None:
        self._process.communicate(timeout=60)
        assert self._process.returncode == 0

    def __enter__(self) -> Other:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# -- who names what ------------------------------------------------------------------------------


def test_who_names_none_takes_what_is_there(make: Make) -> None:
    make(size_limit=LIMIT, eviction="lfu", headroom=0.3).close()
    cache = make()
    assert kept(cache) == (LIMIT, "lfu", 0.3)
    assert (cache.stats().size_limit, cache.stats().eviction) == (LIMIT, "lfu")
    assert kept(make(read_only=True)) == (LIMIT, "lfu", 0.3)
    assert kept(make(eviction="lfu")) == (LIMIT, "lfu", 0.3)


def test_a_new_cache_has_the_defaults(make: Make) -> None:
    assert kept(make()) == (Settings.size_limit, "lru", 0.15)
    assert kept(make()) == (Settings.size_limit, "lru", 0.15)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("size_limit", 4 << 20, f"size_limit from {LIMIT} to {4 << 20}"),
        ("eviction", "none", "eviction from lru to none"),
        ("headroom", 0.4, "headroom from 0.15 to 0.4"),
    ],
)
def test_who_names_another_changes_it_for_all(
    make: Make, caplog: pytest.LogCaptureFixture, name: str, value: Any, shown: str
) -> None:
    first = make(size_limit=LIMIT)
    caplog.clear()
    with caplog.at_level(logging.INFO, "yatagarasu_cache"):
        second = make(**{name: value})
    said = [one.getMessage() for one in caplog.records if "settings" in one.getMessage()]
    assert said == [f"{first.directory}: the settings of the cache change for all who use it: {shown}"]
    expected = {"size_limit": LIMIT, "eviction": "lru", "headroom": 0.15, name: value}
    assert kept(second) == kept(first) == tuple(expected.values())
    first.close()
    second.close()
    caplog.clear()
    with caplog.at_level(logging.INFO, "yatagarasu_cache"):
        assert kept(make()) == tuple(expected.values())
        make(**{name: value})  # the same again is no change
    assert not [one for one in caplog.records if "settings" in one.getMessage()]


def test_one_line_for_several_changes(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    make(size_limit=LIMIT)
    make(size_limit=2 * LIMIT, eviction="fifo")
    said = [one.getMessage() for one in caplog.records if "settings" in one.getMessage()]
    assert len(said) == 1
    assert said[0].endswith(f"size_limit from {LIMIT} to {2 * LIMIT}, eviction from lru to fifo")


def test_an_asynchronous_cache_shows_what_holds_once_it_is_open(make: Make, directory: Path) -> None:
    make(size_limit=LIMIT, eviction="lfu", headroom=0.3).close()

    async def main() -> None:
        cache = AsyncDiskCache(directory, headroom=0.3)
        assert kept(cache) == (Settings.size_limit, "lru", 0.3)
        async with cache:
            assert kept(cache) == (LIMIT, "lfu", 0.3)

    asyncio.run(main())


def test_read_only_changes_nothing(make: Make, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with make(size_limit=LIMIT, eviction="fifo") as cache:
        cache.set("k", b"v")
    before = tree(directory)
    with make(size_limit=2 * LIMIT, eviction="lfu", headroom=0.5, read_only=True) as cache:
        assert kept(cache) == (LIMIT, "fifo", 0.15)
        assert cache.get("k") == b"v"
        with pytest.raises(ReadOnlyError):
            cache.set("k", b"w")
    assert tree(directory) == before
    assert "change" not in caplog.text


def test_a_pickle_carries_what_was_named(make: Make) -> None:
    cache = make(size_limit=LIMIT, default_expire=60)
    _, (_, directory, options) = cache.__reduce__()
    assert directory == cache.directory
    assert set(options) == {"backend", "size_limit", "default_expire"}
    _, (_, _, options) = make().__reduce__()
    assert set(options) == {"backend"}
    with pickle.loads(pickle.dumps(cache)) as copy:
        assert set(copy.__reduce__()[1][2]) == {"backend", "size_limit", "default_expire"}


@pytest.mark.parametrize("kind", [DiskCache, AsyncDiskCache])
def test_an_unpickled_handle_changes_nothing(
    make: Make, directory: Path, backend: str, caplog: pytest.LogCaptureFixture, kind: Any
) -> None:
    """It was pickled before somebody else changed them."""
    first = kind(directory, size_limit=LIMIT, eviction="fifo", backend=backend)
    data = pickle.dumps(first)
    with make(size_limit=2 * LIMIT, eviction="lfu") as changed:
        caplog.clear()
        copy = pickle.loads(data)
        if kind is DiskCache:
            assert kept(copy) == kept(changed) == (2 * LIMIT, "lfu", 0.15)
            copy.set("k", b"v")
            copy.close()
            first.close()
        else:

            async def use() -> None:
                async with copy:
                    assert kept(copy) == (2 * LIMIT, "lfu", 0.15)
                    await copy.set("k", b"v")

            asyncio.run(use())
        assert kept(changed) == (2 * LIMIT, "lfu", 0.15)
        assert changed["k"] == b"v"
        assert "change" not in caplog.text


def test_an_unpickled_handle_makes_a_new_cache_as_named(make: Make, directory: Path) -> None:
    cache = make(size_limit=LIMIT, eviction="lfu", headroom=0.25)
    data = pickle.dumps(cache)
    cache.close()
    shutil.rmtree(directory)
    with pickle.loads(data) as copy:
        assert kept(copy) == (LIMIT, "lfu", 0.25)
    assert kept(make()) == (LIMIT, "lfu", 0.25)


def test_subclasses_are_unpickled_through_their_constructor(directory: Path) -> None:
    with Counted(directory, size_limit=LIMIT) as cache:
        DiskCache(directory, size_limit=2 * LIMIT).close()
        with pickle.loads(pickle.dumps(cache)) as copy:
            assert (copy.made, kept(copy)[0]) == (True, 2 * LIMIT)


class Counted(DiskCache):
    """With something of its own."""

    def __init__(self, directory: Any, **options: Any) -> None:
        self.made = True
        super().__init__(directory, **options)


@pytest.mark.parametrize("named", [True, False])
def test_settings_of_a_file(make: Make, directory: Path, named: bool) -> None:
    make(size_limit=LIMIT, eviction="fifo").close()
    disk: dict[str, Any] = {"cache_dir": str(directory)}
    if named:
        disk["max_disk_cache_size_mb"] = 16
    with DiskCache.from_config({"cache": {"disk": disk}}) as cache:
        assert kept(cache) == (16 << 20 if named else LIMIT, "fifo", 0.15)

    async def use() -> None:
        async with AsyncDiskCache.from_config({"disk": {"directory": str(directory)}}) as cache:
            assert kept(cache)[1:] == ("fifo", 0.15)

    asyncio.run(use())
    assert kept(make()) == (16 << 20 if named else LIMIT, "fifo", 0.15)


# -- where they are kept -------------------------------------------------------------------------


def test_a_lost_index_keeps_them(make: Make, directory: Path) -> None:
    with make(size_limit=LIMIT, eviction="lfu", headroom=0.3) as cache:
        cache.set("k", b"v")
    (directory / "index").unlink()
    with make() as cache:
        assert kept(cache) == (LIMIT, "lfu", 0.3)
        assert cache["k"] == b"v"
        assert cache.check() == []


def test_a_lost_file_is_written_anew(make: Make, directory: Path) -> None:
    make(size_limit=LIMIT, eviction="lfu").close()
    whole = (directory / "settings").read_bytes()
    for lose in (Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(whole[:-1])):
        lose(directory / "settings")
        assert [problem.kind for problem in make(read_only=True).check()] == ["settings"]
        assert kept(make(read_only=True)) == (LIMIT, "lfu", 0.15)
        with make() as cache:
            assert kept(cache) == (LIMIT, "lfu", 0.15)
            assert cache.check() == []
        assert (directory / "settings").read_bytes() == whole


def test_check_mends_the_file(make: Make, directory: Path) -> None:
    cache = make(size_limit=LIMIT)
    whole = (directory / "settings").read_bytes()
    (directory / "settings").unlink()
    assert [(one.kind, one.fixed) for one in cache.check(fix=True)] == [("settings", True)]
    assert (directory / "settings").read_bytes() == whole
    assert cache.check() == []


def test_no_changed_bit_of_the_file_counts(make: Make, directory: Path) -> None:
    make(size_limit=LIMIT, eviction="fifo").close()
    cache = make(read_only=True)
    store = cache._store
    whole = (directory / "settings").read_bytes()
    assert cache_settings.read(store.backend, store.root) == CacheSettings(LIMIT, "fifo", 0.15)
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        (directory / "settings").write_bytes(changed)
        assert cache_settings.read(store.backend, store.root) is None
    (directory / "settings").write_bytes(whole)


def test_impossible_values_are_damage_whatever_the_checksum(make: Make, directory: Path) -> None:
    make(size_limit=LIMIT).close()
    cache = make(read_only=True)
    for code, limit, headroom in (
        (0, LIMIT, 0.15), (5, LIMIT, 0.15), (1, 0, 0.15), (1, (1 << 18) - 1, 0.15), (1, 1 << 63, 0.15),
        (1, LIMIT, 0.0), (1, LIMIT, 0.95), (1, LIMIT, float("nan")), (1, LIMIT, float("inf")),
    ):  # fmt: skip
        body = struct.pack("<8sIIQd", f.SETTINGS_MAGIC, f.FORMAT_VERSION, code, limit, headroom)
        (directory / "settings").write_bytes(body + xxh3_64_intdigest(body).to_bytes(8, "little"))
        assert cache_settings.read(cache._store.backend, cache.directory) is None
        words = memoryview(bytearray(f.HEADER_BYTES)).cast("Q")
        struct.pack_into("@QQd", words.cast("B"), f.W_SIZE_LIMIT * 8, limit, code, headroom)
        words[f.W_SETTINGS_SUM] = cache_settings.checksum(words)
        assert cache_settings.from_words(words) is None


@pytest.mark.parametrize("named", [{}, {"eviction": "lfu"}, {"size_limit": 1 << 20}])
def test_both_lost(make: Make, directory: Path, named: dict[str, Any]) -> None:
    """What the one that opens says, and the defaults."""
    with make(size_limit=LIMIT, eviction="fifo") as cache:
        cache.set("k", b"v")
    (directory / "index").unlink()
    (directory / "settings").unlink()
    with make(**named) as cache:
        assert kept(cache) == (named.get("size_limit", 10 << 30), named.get("eviction", "lru"), 0.15)
        assert cache["k"] == b"v"
    assert kept(make()) == (named.get("size_limit", 10 << 30), named.get("eviction", "lru"), 0.15)


@pytest.mark.parametrize("word", [f.W_SIZE_LIMIT, f.W_EVICTION, f.W_HEADROOM, f.W_SETTINGS_SUM])
@pytest.mark.parametrize("bit", [0, 1, 20, 40, 63])
def test_a_damaged_word_is_found_at_opening(
    make: Make, directory: Path, caplog: pytest.LogCaptureFixture, word: int, bit: int
) -> None:
    with make(size_limit=LIMIT, eviction="lfu", headroom=0.3) as cache:
        cache.set("k", b"v")
    with open(directory / "index", "r+b") as file:
        file.seek(word * 8)
        (value,) = struct.unpack("<Q", file.read(8))
        file.seek(word * 8)
        file.write(struct.pack("<Q", value ^ 1 << bit))
    with pytest.raises(ReadOnlyError):
        make(read_only=True)
    with make() as cache:
        assert kept(cache) == (LIMIT, "lfu", 0.3)
        assert cache["k"] == b"v"
        assert cache.check() == []
    assert "recovering" in caplog.text


@pytest.mark.in_turn
@pytest.mark.parametrize("value", [0, 1, 3, 77, (1 << 64) - 1])
@pytest.mark.parametrize("word", [f.W_SIZE_LIMIT, f.W_EVICTION, f.W_HEADROOM, f.W_SETTINGS_SUM])
def test_a_damaged_word_under_an_open_handle(make: Make, core: str, word: int, value: int) -> None:
    """It goes by what it knew; nothing is evicted for it, and check finds it."""
    cache = make(size_limit=LIMIT, eviction="lru")
    for n in range(500):
        cache.set(n, noise(1000, n))
    if cache._store.current.index.words[word] == value:
        pytest.skip("no damage")
    cache._store.current.index.words[word] = value
    for n in range(500):
        assert cache.get(n) == noise(1000, n)
        cache.set(500 + n, noise(1000, n))
    assert kept(cache)[0] == LIMIT
    assert len(cache) == 1000 and cache.stats().evictions == 0
    assert [(one.kind, one.fixed) for one in cache.check(fix=True)] == [("index", True)]
    assert kept(cache) == (LIMIT, "lru", 0.15)
    assert cache.check() == []
    assert len(cache) == 1000


@pytest.mark.usefixtures("apart")
def test_a_change_that_was_interrupted_is_completed(make: Make, directory: Path) -> None:
    """The policy's word is there and half of the order, when the process is killed."""
    cache = make(size_limit=LIMIT, eviction="lru")
    for n in range(40):
        cache.set(n, b"v")
    in_turn(cache.get, range(10))
    index = cache._store.current.index
    with cache._store.locks.index:
        index.words[f.W_BUSY] = f.BUSY_SETTING
        index.words[f.W_EVICTION] = CacheSettings(LIMIT, "lfu", 0.15).code
        now = index.words[f.W_CLOCK]
        for at in itertools.islice(index.live_slots(), 20):
            access, stamp = index.words[at + f.S_ACCESS], index.words[at + f.S_STAMP]
            index.words[at + f.S_ACCESS] = POLICIES["lfu"].taken_over(access, stamp, now)
    assert kept(make(read_only=True))[1] in ("lru", "lfu")  # it may look, and waits for nobody
    with make() as other:
        assert kept(other) == (LIMIT, "lfu", 0.15)
        assert order(other) == order(cache)
        assert sorted(order(other)[-10:]) == list(range(10))
        assert {index.words[at + f.S_ACCESS] >> 44 for at in index.live_slots()} == {1}
        assert other.check() == []
    (directory / "index").unlink()
    assert kept(make())[1] == "lfu"


def test_a_file_that_cannot_be_written(
    make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The settings hold all the same: a lower limit may be what makes room on a full disk."""
    make(size_limit=LIMIT).close()
    before = (directory / "settings").read_bytes()
    with monkeypatch.context() as patch:
        made = wrap_backends(patch, FailingBackend)
        broken = []

        def before_opening(self: FailingBackend, call: str, path: str, size: int) -> None:
            if call == "replace" and path.endswith("settings"):
                broken.append(path)
                raise OSError(errno.ENOSPC, "no space")

        patch.setattr(FailingBackend, "before", before_opening)
        with make(size_limit=2 * LIMIT) as cache:
            assert made and broken
            assert kept(cache)[0] == 2 * LIMIT
            cache.set("k", b"v")
    assert "cannot store the settings" in caplog.text
    assert (directory / "settings").read_bytes() == before
    assert os.listdir(directory / "tmp") == []
    with make() as cache:
        assert kept(cache)[0] == 2 * LIMIT
    assert (directory / "settings").read_bytes() != before


def test_a_link_in_place_of_the_file_is_not_followed(make: Make, directory: Path, tmp_path: Path) -> None:
    make(size_limit=LIMIT).close()
    target = tmp_path / "target"
    (directory / "settings").rename(target)
    (directory / "settings").symlink_to(target)
    before = target.read_bytes()
    assert kept(make(size_limit=2 * LIMIT))[0] == 2 * LIMIT
    assert target.read_bytes() == before
    assert not (directory / "settings").is_symlink()


def test_the_file_has_the_mode_of_files(make: Make, directory: Path) -> None:
    make(file_mode=0o640).close()
    assert (directory / "settings").stat().st_mode & 0o777 == 0o640


# -- limits that change --------------------------------------------------------------------------


def test_opening_and_reading_evict_nothing(make: Make, core: str) -> None:
    with make(size_limit=8 << 20) as cache:
        for n in range(3000):
            cache.set(n, noise(1000, n))
    with make(size_limit=1 << 20) as small:
        assert len(small) == 3000
        assert small.get_many(range(3000)).keys() == set(range(3000))
        assert all(small.get(n) == noise(1000, n) for n in range(3000))  # last: the order of use is this one
        assert len(small) == 3000 and small.stats().evictions == 0
    with make() as cache:
        assert len(cache) == 3000
        for n in range(100):
            cache.set(("new", n), noise(1000, n))
        assert cache.volume() <= (1 << 20) + (32 << 10)
        assert all(cache.get(("new", n)) == noise(1000, n) for n in range(100))
        left = [n for n in range(3000) if n in cache]
        assert left == list(range(3000 - len(left), 3000))  # the least recently used ones went
        assert len(left) > 300
        assert cache.check() == []


@pytest.mark.parametrize("eviction", ["lru", "none"])
@pytest.mark.parametrize("high", [1 << 40, 1 << 50])
def test_a_limit_for_many_segments_is_lowered(directory: Path, high: int, eviction: str) -> None:
    """What an index has to list as many is given back; others that have it open follow."""
    with DiskCache(directory, size_limit=high, eviction=eviction) as cache:
        cache.set_many({key: noise(500, key) for key in range(200)})
    assert (directory / "index").stat().st_size > 4 << 20
    with DiskCache(directory, size_limit=1 << 20) as cache, Other(directory) as other:
        cache.set("new", b"there")
        assert other("cache.set('more', b'there too')") is True
        assert (cache["new"], cache["more"]) == (b"there", b"there too")
        assert all(cache.get(key) == noise(500, key) for key in range(200))
        assert (directory / "index").stat().st_size < 1 << 20
        assert cache.check() == [] and cache.stats().evictions == 0


@pytest.mark.parametrize("core", CORES)
def test_open_handles_follow_a_lower_limit(make: Make, directory: Path, core: str) -> None:
    with Other(directory, core, size_limit=LIMIT) as other:
        other("[cache.set(n, bytes(1000)) for n in range(3000)] and None")
        assert other("len(cache)") == 3000
        make(size_limit=1 << 20).close()
        assert other("kept(cache)") == (1 << 20, "lru", 0.15)
        assert other("cache.get(0) is not None and len(cache)") == 3000
        other("[cache.set(-n, bytes(1000)) for n in range(500)] and None")
        assert other("cache.volume()") <= (1 << 20) + (512 << 10)  # it may have a large segment open
        assert other("len(cache)") < 1000
        assert other("cache.check()") == []


@pytest.mark.parametrize("core", CORES)
def test_open_handles_follow_a_higher_limit(make: Make, directory: Path, core: str) -> None:
    with Other(directory, core, size_limit=1 << 20, eviction="none") as other:
        assert other("[cache.set(n, bytes(1000)) for n in range(3000)]") == "StorageFull"
        assert other("cache.set('large', bytes(3 << 20))") == "ValueTooLarge"
        make(size_limit=32 << 20).close()
        assert other("cache.set('large', bytes(3 << 20))") is True
        assert other("all(cache.set(n, bytes(1000)) for n in range(3000))") is True
        assert other("len(cache)") == 3001
        assert other("cache.stats().size_limit") == 32 << 20


def test_a_segment_size_named_for_a_larger_limit(make: Make) -> None:
    """Segments are at most a quarter of the limit that holds."""
    make(size_limit=1 << 20).close()
    cache = make(segment_size=16 << 20)
    for n in range(2000):
        cache.set(n, noise(1000, n))
    assert cache.volume() <= (1 << 20) + (256 << 10)
    assert len(cache) > 50
    assert cache.check() == []


# -- policies that change ------------------------------------------------------------------------


@pytest.mark.parametrize("core", CORES)
def test_open_handles_follow_another_policy(make: Make, directory: Path, core: str) -> None:
    """Whoever hits or stores, in whatever process, and whichever core does it: one order for all."""
    first = make(size_limit=LIMIT)
    with Other(directory, core) as other:
        in_turn(lambda n: first.set(n, b"v"), range(10))
        other("in_turn(cache.get, (3, 1, 3))")
        assert order(first) == other("order(cache)") == [0, 2, 4, 5, 6, 7, 8, 9, 1, 3]

        make(eviction="lfu").close()
        assert order(first) == other("order(cache)") == [0, 2, 4, 5, 6, 7, 8, 9, 1, 3]
        other("in_turn(cache.get, (2, 2, 0))")
        first.get(2)
        other("in_turn(lambda n: cache.set(n, b'v'), (10,))")
        in_turn(lambda n: first.set(n, b"v"), (11,))
        assert order(first) == other("order(cache)") == [4, 5, 6, 7, 8, 9, 1, 3, 10, 11, 0, 2]
        assert other("cache.get_entry(11).accessed") is None

        make(eviction="lru").close()
        assert order(first) == other("order(cache)")
        assert order(first)[:8] == [4, 5, 6, 7, 8, 9, 1, 3]
        assert order(first)[-2:] == [10, 11]
        first.get(5)
        other("cache.get(4)")
        assert order(first)[-2:] == other("order(cache)")[-2:] == [5, 4]
        assert other("cache.get_entry(4).accessed") is not None

        make(eviction="fifo").close()
        assert order(first) == other("order(cache)") == list(range(12))
        other("[cache.get(n) for n in range(5)] and None")
        first.get(0)
        other("cache.set(3, b'w')")
        first.set(1, b"w")
        assert order(first) == other("order(cache)") == [0, 2, 4, 5, 6, 7, 8, 9, 10, 11, 3, 1]

        make(eviction="none").close()
        assert order(first) == [0, 2, 4, 5, 6, 7, 8, 9, 10, 11, 3, 1]
        make(eviction="lru").close()
        other("cache.get(2)")
        assert order(first) == other("order(cache)") == [0, 4, 5, 6, 7, 8, 9, 10, 11, 3, 1, 2]
        assert first.check() == []


def test_batches_and_counters_begin_as_the_policy_in_force_has_it(make: Make, core: str) -> None:
    cache = make(size_limit=LIMIT)
    cache.set(0, b"v")
    make(eviction="lfu").close()
    cache.set_many(dict.fromkeys(range(1, 20), b"v"))
    cache.incr(20)
    cache.add(21, b"v")
    cache.set(22, bytes(3 << 20))
    index = cache._store.current.index
    assert {index.words[at + f.S_ACCESS] >> 44 for at in index.live_slots()} == {1}
    make(eviction="fifo").close()
    cache.set_many(dict.fromkeys(range(23, 40), b"v"))
    assert all(index.words[at + f.S_ACCESS] == index.words[at + f.S_STAMP] for at in index.live_slots())


def test_an_entry_appended_before_a_change_is_shown_after_it(
    make: Make, monkeypatch: pytest.MonkeyPatch, core: str
) -> None:
    """The access word is the one of the policy that holds when the index is changed."""
    cache = make(size_limit=LIMIT)
    cache.set(0, b"v")
    store = cache._store
    real = store.core.append_many
    items = [cache._desk.item(n, b"v", None, None, None) for n in range(5)]

    def append_many(*arguments: Any) -> Any:
        done = real(*arguments)
        with store.locks.index:
            store.current.index.change_settings(CacheSettings(LIMIT, "lfu", 0.15))
        return done

    monkeypatch.setattr(store.core, "append_many", append_many)
    store.writing.put_many(items)
    index = store.current.index
    assert {index.words[at + f.S_ACCESS] >> 44 for at in index.live_slots()} == {1}


def test_a_rebuild_takes_over_the_order_of_an_older_checkpoint(make: Make, directory: Path) -> None:
    """It was written under another policy."""
    with make(size_limit=LIMIT) as cache:
        in_turn(lambda n: cache.set(n, b"v"), range(10))
        in_turn(cache.get, (3, 1))
        cache._store.checkpoints.write()
    with make(eviction="lfu") as cache:
        in_turn(lambda n: cache.set(n, b"v"), (10,))
    (directory / "index").unlink()
    with make() as cache:
        assert kept(cache)[1] == "lfu"
        assert order(cache) == [0, 2, 4, 5, 6, 7, 8, 9, 3, 1, 10]
        index = cache._store.current.index
        assert {index.words[at + f.S_ACCESS] >> 44 for at in index.live_slots()} == {1}


stamps = st.integers(1_600_000_000 * 10**9, 1_900_000_000 * 10**9)


@given(st.lists(st.tuples(stamps, stamps, st.integers(0, 50)), max_size=20), stamps)
def test_words_that_are_taken_over(entries: list[tuple[int, int, int]], now: int) -> None:
    """From each policy to each: what the words tell is kept, and doing it again changes nothing."""
    lru, lfu, fifo = POLICIES["lru"], POLICIES["lfu"], POLICIES["fifo"]
    now = max([now, *(max(entry[:2]) for entry in entries)])
    for one, other, hits in entries:
        stamp, used = min(one, other), max(one, other)
        counted = lfu.first(stamp)
        for _ in range(hits):
            counted = lfu.touched(counted, used)
        last = used if hits else stamp
        assert lfu.taken_over(counted, stamp, now) == counted
        assert lru.taken_over(used, stamp, now) == used
        assert lfu.taken_over(used, stamp, now) == lfu.first(used)
        back = lru.taken_over(counted, stamp, now)
        assert stamp <= back <= last and last - back < 1 << 20
        assert fifo.taken_over(used, stamp, now) == fifo.taken_over(counted, stamp, now) == stamp
        for policy in POLICIES.values():
            for word in (used, counted, stamp):
                once = policy.taken_over(word, stamp, now)
                assert policy.taken_over(once, stamp, now) == once


# -- handles whose settings differ ---------------------------------------------------------------

SIZES = (0, 1, 1000, 20_000, 300_000, 1_100_000)
DIFFERENT: dict[str, tuple[Any, Any]] = {
    "size_limit": (32 << 20, 64 << 20),
    "eviction": ("lru", "lfu"),
    "backend": ("threads", "auto"),
    "durability": ("none", "sync"),
    "serializer": ("msgpack", "pickle"),
    "max_value_size": (None, 2 << 20),
    "max_stream_size": (1, 2 << 20),
    "default_expire": (None, 1000.0),
    "read_only": (False, True),
    "segment_size": (4096, 8 << 20),
    "large_value_size": (1, 64 << 20),
    "headroom": (0.02, 0.5),
    "max_open_files": (8, 1 << 20),
    "max_in_flight": (1, 1 << 20),
    "lock_timeout": (0.5, None),
    "workers": (1, 32),
    "allow_network_fs": (False, True),
    "on_unreadable": ("error", "miss"),
    "compression": (None, "zstd"),
    "compression_level": (1, 9),
    "compression_min_size": (1024, 0),
    "directory_mode": (0o700, 0o750),
    "file_mode": (0o600, 0o640),
}
RING_DIFFERENT: dict[str, tuple[Any, Any]] = {
    "enabled": ("auto", False),
    "queue_depth": (1, 256),
    "use_registered_buffers": (True, False),
    "use_fixed_files": (True, False),
    "direct": ("auto", True),
    "sqpoll": (False, True),
    "cpu_affinity": (None, 0),
    "max_workers": (None, 2),
}
NEEDED: dict[str, dict[str, Any]] = {"compression_level": {"compression": "zstd"}}  # settings of others' sense
CASES = [
    ({**NEEDED.get(name, {}), name: first}, {**NEEDED.get(name, {}), name: second})
    for number, (name, values) in enumerate(DIFFERENT.items())
    for first, second in [values[:: -1 if number % 2 else 1]]  # both do the same
] + [({"io_uring": {name: one}}, {"io_uring": {name: two}}) for name, (one, two) in RING_DIFFERENT.items()]


def test_every_setting_is_among_them() -> None:
    assert {"directory", "io_uring", *DIFFERENT} == {one.name for one in dataclasses.fields(Settings)}
    assert set(RING_DIFFERENT) == {one.name for one in dataclasses.fields(RingSettings)}


@functools.cache
def value_of(size: int) -> bytes:
    return noise(size, size)


def store_some(cache: DiskCache, who: str) -> None:
    for size in SIZES:
        cache.set((who, size), value_of(size))
        cache.set((who, size, "text"), "t" * size, tag="t")
    cache.set_many({(who, size, "many"): value_of(size) for size in SIZES})
    cache.incr("counter")


def has_some(cache: DiskCache, who: str) -> bool:
    """True if it has all that `store_some` stored, each way that it may be asked for."""
    names = [(who, size, *more) for size in SIZES for more in ((), ("many",))]
    found = cache.get_many(names)
    assert all(found[name] == cache.get(name) == value_of(name[1]) for name in names)
    assert all(cache[(who, size, "text")] == "t" * size for size in SIZES)
    for size in SIZES:
        with cache.open((who, size)) as file:
            assert file.read() == value_of(size)
    return True


async def has_some_async(directory: Path, options: dict[str, Any], who: str) -> None:
    async with AsyncDiskCache(directory, **options) as cache:
        for size in SIZES:
            assert await cache.get((who, size)) == value_of(size)


@pytest.mark.parametrize(("one", "two"), CASES, ids=lambda options: str(options)[1:-1])
def test_two_handles_of_differing_settings(
    directory: Path, one: dict[str, Any], two: dict[str, Any]
) -> None:
    """In two processes: each reads what the other stored, at once and after reopening."""
    limit = {"size_limit": 64 << 20} if "size_limit" not in one else {}
    if one.get("read_only"):
        DiskCache(directory, **limit).close()
    with DiskCache(directory, **{**limit, **one}) as cache, Other(directory, **two) as other:
        writes = not one.get("read_only"), not two.get("read_only")
        if writes[0]:
            store_some(cache, "one")
            assert other("has_some(cache, 'one')") is True
        if writes[1]:
            assert other("store_some(cache, 'two')") is None
            assert has_some(cache, "two")
        if all(writes):
            assert cache["counter"] == other("cache['counter']") == 2
            assert other("cache.delete(('one', 0))") is True
            assert ("one", 0) not in cache
            store_some(cache, "one")
            assert other("has_some(cache, 'one')") is True
            assert other("kept(cache)") == kept(cache)
        assert cache.stats().evictions == cache.stats().corrupt == 0
        assert cache.check() == []
        assert other("cache.check()") == []
    stored = list(itertools.compress(("one", "two"), writes))
    for options in (one, two):
        with DiskCache(directory, **options) as cache:
            assert all(has_some(cache, who) for who in stored)
        asyncio.run(has_some_async(directory, options, stored[-1]))
    (directory / "index").unlink()
    with DiskCache(directory, **(one if writes[0] else two)) as cache:
        assert all(has_some(cache, who) for who in stored)
        assert cache.check() == []


# -- both ends of each range ---------------------------------------------------------------------


def test_values_above_a_mebibyte_in_segments(make: Make, backend: str, directory: Path) -> None:
    """A boundary that was raised: they are there when their segment is not among the open ones."""
    options = {"large_value_size": 16 << 20, "segment_size": 64 << 20, "size_limit": 1 << 30}
    sizes = [(1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20, (16 << 20) - 1, 16 << 20]
    values = {size: os.urandom(size) for size in sizes}
    with make(**options) as cache:
        for size, value in values.items():
            cache.set(size, value)
        assert len(os.listdir(directory / "large")) == 1
    for reading in ({}, options, {"read_only": True}):
        with make(**reading) as cache:
            assert all(cache.get(size) == value for size, value in values.items())
        with make(**reading) as cache:
            assert cache.get_many(sizes) == values
            assert cache.stats().corrupt == 0
            assert cache.check() == []

        async def use(reading: Any = reading) -> None:
            async with AsyncDiskCache(directory, backend=backend, **reading) as cache:
                for size, value in values.items():
                    assert await cache.get(size) == value
                await cache.get_many(sizes)

        asyncio.run(use())
    with make(**options) as cache:
        for n in range(10):
            cache.set(("more", n), bytes(8 << 20))
        assert all(cache.get(size) == value for size, value in values.items())
        assert cache.stats().corrupt == 0


def test_a_damaged_length_asks_for_no_memory(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a value that would have to be longer than its segment."""
    monkeypatch.setenv("YATAGARASU_CORE", "python")
    cache = make(size_limit=LIMIT)
    cache.set("k", bytes(1000))
    store = cache._store
    (at,) = store.current.index.live_slots()
    slot = store.current.index.slot(at)
    assert store.reading.in_segment(slot)
    for length in (LIMIT, 1 << 34, (1 << 40) - 1):
        lengths = length << 24 | slot.lengths & 0xFFFFFF
        assert not store.reading.in_segment(slot._replace(lengths=lengths))
    assert not store.reading.in_segment(slot._replace(place=f.pack_place(99, 64)))
    store.current.index.words[at + f.S_LENGTHS] = (1 << 36) << 24 | slot.lengths & 0xFFFFFF
    store.files.segments.forget(slot.segment)
    assert cache.get_many(["k"]) == {}
    assert cache.stats().corrupt == 1


@st.composite
def drawn_settings(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of a small cache, often at an end of their range; some are left to their defaults."""
    limit = draw(st.sampled_from([1 << 18, (1 << 18) + 1, 1 << 19, 1 << 20, 3 << 20, 8 << 20]))
    fields: dict[str, st.SearchStrategy[Any]] = {
        "segment_size": st.sampled_from([4096, 4097, 10_000, limit // 32, limit // 4 - 1, limit // 4]),
        "large_value_size": st.sampled_from([1, 2, 1000, 4096, limit // 16, limit, 1 << 40, (1 << 63) - 1]),
        "headroom": st.sampled_from([0.02, 0.15, 0.5, 0.9]),
        "eviction": st.sampled_from(f.EVICTIONS),
        "max_open_files": st.sampled_from([8, 9, 1 << 20]),
        "max_value_size": st.sampled_from([1, 2, 5000, limit - 1, limit]),
        "max_stream_size": st.sampled_from([1, 5000, limit // 8, limit]),
        "durability": st.sampled_from(["none", "sync"]),
        "max_in_flight": st.sampled_from([1, 2**31 - 1]),
        "lock_timeout": st.sampled_from([None, 1, 60.0]),
        "workers": st.sampled_from([1, 256]),
        "default_expire": st.sampled_from([1e-9, 1000, 1e300]),
    }
    chosen = {name: draw(values) for name, values in fields.items() if draw(st.booleans())}
    if chosen.get("default_expire") == 1e-9:  # what expires at once cannot be read
        del chosen["default_expire"]
    return {"size_limit": limit, **chosen}


def boundaries(cache: DiskCache, options: dict[str, Any]) -> list[int]:
    store = cache._store
    marks = [1, 1000, store.limits.large_bytes, store.limits.segment_bytes, store.limits.segment_bytes // 2]
    marks += [options.get("max_value_size", 1), max(1, store.budget.largest_value)]
    sizes = {0, *(mark + by for mark in marks for by in (-1, 0, 1))}
    return sorted(size for size in sizes if size <= 2 * options["size_limit"])


@given(drawn_settings(), st.sampled_from(CORES))
@settings(max_examples=40)
@example({"size_limit": 1 << 18, "headroom": 0.9}, CORES[-1])
@example({"size_limit": 1 << 18, "segment_size": 1 << 16}, CORES[0])
@example({"size_limit": 1 << 18, "segment_size": 4096, "large_value_size": 1}, CORES[0])
@example({"size_limit": 8 << 20, "segment_size": 2 << 20, "large_value_size": 1 << 40}, CORES[0])
def test_round_trips_at_the_boundaries(tmp_path_factory: Any, options: dict[str, Any], core: str) -> None:
    """A set that returns can be read in every way there is, later too; or it says that there is no room."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YATAGARASU_CORE", core)
        with DiskCache(directory, backend="threads", **options) as cache:
            stored = store_boundaries(cache, options)
            with DiskCache(directory, backend="threads") as other:
                readable(other, stored)
            readable(cache, stored)
            for n in range(50):
                try_to_set(cache, ("more", n), noise(n * 7, n))
            readable(cache, stored)
            assert cache.check() == []
        with DiskCache(directory, backend="threads") as again:
            readable(again, stored)
            assert again.check() == []
        asyncio.run(readable_async(directory, options, stored))
    shutil.rmtree(directory)


def try_to_set(cache: DiskCache, key: Any, value: bytes) -> bool:
    try:
        return cache.set(key, value)
    except (ValueTooLarge, StorageFull):
        return False


def store_boundaries(cache: DiskCache, options: dict[str, Any]) -> dict[int, bytes]:
    """What could be stored, of each size by itself."""
    stored: dict[int, bytes] = {}
    assert try_to_set(cache, "least", b"x"), "not even a byte"
    for size in boundaries(cache, options):
        value = value_of(size)
        if not try_to_set(cache, size, value):
            cache.delete(size)
            continue
        found = cache.get(size)
        assert found == value or found is None and options.get("eviction") == "lfu"
        assert cache.get_many([size]).get(size) == found
        if found is not None:
            stored[size] = value
    assert 1 in stored
    return stored


def readable(cache: DiskCache, stored: dict[int, bytes]) -> None:
    """Each is there and right; those that are not were evicted."""
    found = {size: cache.get(size) for size in stored}
    assert cache.get_many(stored) == {size: value for size, value in found.items() if value is not None}
    assert all(value in (None, stored[size]) for size, value in found.items())
    stats = cache.stats()
    assert stats.corrupt == 0
    assert list(found.values()).count(None) <= stats.evictions


async def readable_async(directory: Path, options: dict[str, Any], stored: dict[int, bytes]) -> None:
    async with AsyncDiskCache(directory, backend="threads", **options) as cache:
        found = {size: await cache.get(size) for size in stored}
        assert all(value in (None, stored[size]) for size, value in found.items())
        assert (await cache.stats()).corrupt == 0


@pytest.mark.parametrize("how", ["set", "add", "set_many", "stream"])
def test_what_is_large_is_said_by_the_limit_in_force(directory: Path, how: str, core: str) -> None:
    """Also where another process has raised it, and nothing has told of that yet."""
    with DiskCache(directory, size_limit=1 << 20) as cache:
        cache.set("before", b"x")
        with Other(directory, size_limit=LIMIT):
            pass
        value = noise(cache._store.limits.large_bytes)  # and so in a file of its own, by the old limit
        calls: dict[str, Any] = {
            "set": lambda: cache.set("k", value), "add": lambda: cache.add("k", value),
            "set_many": lambda: cache.set_many({"k": value}), "stream": lambda: cache.set("k", io.BytesIO(value)),
        }  # fmt: skip
        calls[how]()
        assert cache.get("k") == value
        assert not list((directory / "large").iterdir())
