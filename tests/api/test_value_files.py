"""Parts of values: `open` as any binary file, `location` of a range, `view`; what damage does to each."""

from __future__ import annotations

import errno
import gc
import io
import mmap
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import LARGE, SEGMENT, Make, descriptors, in_threads, noise
from hypothesis import given
from hypothesis import strategies as st

from yatagarasu_cache import CacheIOError, DiskCache, ReadOnlyError
from yatagarasu_cache.store import format as f
from yatagarasu_cache.store.item import Pieces
from yatagarasu_cache.value_files import HeldReader, ValueReader

pytestmark = pytest.mark.usefixtures("core")

CHUNK = f.CHUNK_BYTES
LENGTHS = [0, 1, LARGE - 1, LARGE, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 5 * CHUNK + 12345]
VALUE = noise(5 * CHUNK + 12345)


def small(make: Make, **options: Any) -> DiskCache:
    """A cache in which values of LARGE bytes have files of their own."""
    return make(**{"size_limit": 64 << 20, "segment_size": SEGMENT, **options})


def large_file(directory: Path) -> Path:
    (path,) = (directory / "large").iterdir()
    return path


def flip(path: Path, *offsets: int) -> None:
    data = bytearray(path.read_bytes())
    for offset in offsets:
        data[offset] ^= 1
    path.write_bytes(data)


def flip_list(directory: Path, value: bytes) -> None:
    """Damage the list of sums of a value of `value`'s length, wherever its record is."""
    for path in (directory / "segments").iterdir():
        data = path.read_bytes()
        at = data.rfind(f.RECORD_MAGIC)
        while at >= 0:
            head = f.unpack_head(data, at)
            if head is not None and head.kind == f.LARGE and head.value_length == len(value):
                flip(path, at + head.head_bytes + f.LARGE_POINTER.size)
            at = data.rfind(f.RECORD_MAGIC, 0, at)


_before: set[str] = set()


@pytest.fixture(scope="module", autouse=True)
def of_others() -> None:
    """What another module's tests have lent is not this one's to give back: before Python 3.13 a view that
    somebody still refers to, as in a thread that has not ended, keeps a descriptor."""
    _before.update(_links())


def lent() -> list[str]:
    """Files of large values that are open, after whatever nobody has any more is gone."""
    gc.collect()
    return _lent() and _lent_after_all()


def _links() -> set[str]:
    entries = (entry.path for entry in os.scandir("/proc/self/fd") if os.path.lexists(entry.path))
    return {link for link in map(os.readlink, entries) if "/large/" in link}


def _lent() -> list[str]:
    return sorted(_links() - _before)


def _lent_after_all() -> list[str]:
    """The same without what another module's last test had when this one began (`quick_collections`)."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    return _lent()


# -- open ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_open_is_a_binary_file(make: Make, length: int) -> None:
    cache, data = small(make), noise(length)
    cache["k"] = data
    with cache.open("k") as file:
        assert isinstance(file, io.BufferedReader)
        assert (file.readable(), file.seekable(), file.writable()) == (True, True, False)
        assert file.read() == data and file.read() == b"" and file.tell() == length
        assert file.seek(0) == 0
        buffer = bytearray(length + 7)
        assert file.readinto(buffer) == length and buffer == data + bytes(7)
        assert file.seek(-length // 2, io.SEEK_END) == length - (length + 1) // 2
        assert file.read(10) == data[length - (length + 1) // 2 :][:10]
        assert file.seek(length + 5) == length + 5 and file.read() == b"" and file.read(9) == b""
        assert file.readinto(bytearray(3)) == 0
        file.seek(0)
        assert file.peek(1)[:1] == data[:1] and file.read1(5) == data[:5]
        with pytest.raises(ValueError):
            file.seek(-1)
        with pytest.raises(OSError):
            file.write(b"x")
    assert file.closed
    for call in (file.read, file.tell, file.fileno, lambda: file.seek(0)):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_lines(make: Make) -> None:
    cache = small(make)
    text = b"".join(b"line %d\n" % number for number in range(40_000)) + b"no end"
    cache["k"] = text
    with cache.open("k") as file:
        assert list(file) == text.splitlines(keepends=True)
        file.seek(text.index(b"line 20000\n"))
        assert file.readline() == b"line 20000\n" and next(file) == b"line 20001\n"
    with io.TextIOWrapper(cache.open("k"), encoding="ascii") as lines:
        assert sum(1 for _ in lines) == 40_001


def test_text_is_read_as_utf8(make: Make) -> None:
    cache = small(make)
    for text in ("grün \ud800", "é" * LARGE):
        cache["k"] = text
        with cache.open("k") as file:
            assert file.read().decode("utf-8", "surrogatepass") == text
        assert bytes(cache.view("k")).decode("utf-8", "surrogatepass") == text


def test_fileno_where_the_value_is_a_file_of_its_own(make: Make, tmp_path: Path) -> None:
    """The file has the value's bytes and no others: who asks for its size, as all that send files do, is told
    the right one."""
    cache = small(make)
    cache["small"], cache["large"] = b"x" * 10, VALUE
    with cache.open("small") as file:
        with pytest.raises(io.UnsupportedOperation):
            file.fileno()
        assert isinstance(file.raw, HeldReader)  # type: ignore[attr-defined]
    with cache.open("large") as file:
        assert os.fstat(file.fileno()).st_size == len(VALUE)
        assert os.pread(file.fileno(), len(VALUE) + 9, 0) == VALUE
        assert isinstance(file.raw, ValueReader)  # type: ignore[attr-defined]
        with (tmp_path / "copy").open("wb") as out:
            shutil.copyfileobj(file, out)
        file.seek(0)
        cache.set("copy", file)
    assert (tmp_path / "copy").read_bytes() == VALUE == cache["copy"]


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.one_of(st.integers(-1, 9), st.integers(CHUNK - 9, 3 * CHUNK + 9))),
        st.tuples(st.just("readinto"), st.one_of(st.integers(0, 9), st.integers(CHUNK - 9, 3 * CHUNK + 9))),
        st.tuples(st.just("read1"), st.integers(-1, 2 * CHUNK)),
        st.tuples(st.just("readline"), st.integers(-1, 100)),
        st.tuples(st.just("seek"), st.integers(0, len(VALUE) + 9)),
        st.tuples(st.just("seek"), st.builds(lambda n, d: max(0, n * CHUNK + d), st.integers(0, 6), st.integers(-2, 2))),
    ),
    max_size=12,
)


@given(OPERATIONS)
def test_reads_across_chunks_are_those_of_a_file(long_lived: DiskCache, operations: list[tuple[str, int]]) -> None:
    model = io.BytesIO(VALUE)
    with long_lived.open("k") as file:
        for name, number in operations:
            if name == "read1":
                data = file.read1(number)
                assert data == model.read(len(data)) and (data or number == 0 or not model.read(1))
            elif name == "readinto":
                ours, theirs = bytearray(number), bytearray(number)
                assert file.readinto(ours) == model.readinto(theirs) and ours == theirs
            else:
                assert getattr(file, name)(number) == getattr(model, name)(number)
            assert file.tell() == model.tell()


@pytest.fixture
def long_lived(make: Make) -> DiskCache:
    cache = small(make)
    if "k" not in cache:
        cache["k"] = VALUE
    return cache


# -- location -----------------------------------------------------------------------------------


@given(st.integers(0, len(VALUE)), st.one_of(st.none(), st.integers(0, len(VALUE) + 9)))
def test_location_of_a_range(long_lived: DiskCache, offset: int, length: int | None) -> None:
    with long_lived.location("k", offset, length) as (fd, at, count):
        expected = VALUE[offset:] if length is None else VALUE[offset : offset + length]
        assert os.pread(fd, count, at) == expected and count == len(expected)


@pytest.mark.parametrize("value", [b"", b"0123456789", noise(LARGE + 5)])
def test_location_checks_its_arguments(make: Make, value: bytes) -> None:
    cache = small(make)
    cache["k"] = value
    for offset, length, error in [
        ("1", None, TypeError), (1.0, None, TypeError), (True, None, TypeError), (None, None, TypeError),
        (0, "1", TypeError), (0, 1.0, TypeError), (0, False, TypeError), (-1, None, ValueError),
        (0, -1, ValueError), (len(value) + 1, None, ValueError), (1 << 70, 1 << 70, ValueError),
    ]:  # fmt: skip
        with pytest.raises(error, match=r"^(offset|length) "):
            cache.location("k", offset, length)
    for offset, length, expected in [
        (0, None, value), (len(value), None, b""), (len(value), 1 << 80, b""), (1, 4, value[1:5]),
    ]:  # fmt: skip
        if offset <= len(value):
            with cache.location("k", offset=offset, length=length) as (fd, at, count):
                assert os.pread(fd, count, at) == expected
    assert not lent()


# -- view ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_view(make: Make, length: int) -> None:
    cache, data = small(make), noise(length)
    cache["k"] = data
    view = cache.view("k")
    assert type(view) is memoryview and view.readonly and (view.format, view.itemsize) == ("B", 1)
    assert view == data and len(view) == length
    with pytest.raises(TypeError):
        view[:1] = b"x"
    assert isinstance(view.obj, mmap.mmap) == (length >= LARGE)


@pytest.mark.parametrize("value", [1, 1.5, None, True, [1], {"a": 1}, ("t",), ["x" * LARGE]])
def test_what_has_no_bytes_of_its_own(make: Make, value: Any) -> None:
    cache = small(make)
    cache["k"] = value
    with pytest.raises(TypeError, match=r"^the value of 'k' is neither bytes nor str nor an array: .*get\(\)$"):
        cache.view("k")
    for call in (cache.open, cache.location):
        with pytest.raises(TypeError, match=r"^the value of 'k' is neither bytes nor str: .*get\(\)$"):
            call("k")
    assert not lent() and cache["k"] == value


def test_misses(make: Make) -> None:
    cache = small(make)
    for call in (cache.open, cache.location, cache.view):
        with pytest.raises(KeyError):
            call("none")
    assert cache.stats().misses == 3


def test_views_outlive_whatever_happens_to_the_entry(make: Make, directory: Path) -> None:
    cache = small(make, size_limit=2 << 20)
    names = ("replaced", "deleted", "evicted", "cleared", "closed")
    views = {}
    for number, name in enumerate(names):
        cache[name] = noise(LARGE + number, number)
        views[name] = cache.view(name), cache.open(name), cache.location(name)
        if name == "replaced":
            cache[name] = b"another"
        elif name == "deleted":
            del cache[name]
        elif name == "evicted":
            for filler in range(100):
                cache[f"filler {filler}"] = bytes(2 * LARGE)
            assert name not in cache
        elif name == "cleared":
            cache.clear()
    cache.close()
    shutil.rmtree(directory)
    for number, name in enumerate(names):
        view, file, location = views[name]
        data = noise(LARGE + number, number)
        assert view == data and file.read() == data, name
        with location as (fd, at, length):
            assert os.pread(fd, length, at) == data
        file.close()


def test_a_view_is_there_in_a_child(make: Make) -> None:
    cache = small(make)
    cache["k"] = VALUE
    view = cache.view("k")

    def look(result: Any) -> None:
        result.put((bytes(view) == VALUE, cache.view("k") == VALUE, cache.open("k").read() == VALUE))

    context = multiprocessing.get_context("fork")
    result = context.Queue()
    child = context.Process(target=look, args=(result,))
    child.start()
    assert result.get(timeout=60) == (True, True, True)
    child.join(60)
    del cache["k"]
    assert view == VALUE


def test_nothing_leaks(make: Make) -> None:
    """Descriptors go with what holds them, and errors leave none."""
    cache = small(make)
    cache["k"], cache["n"], cache["small"] = VALUE, ["x" * LARGE], b"x"
    cache.view("k"), cache.open("k").close(), cache.location("small").close()
    before = descriptors()
    maps = Path("/proc/self/maps").read_text().count("/large/")
    for _ in range(20):
        held = [cache.view("k"), cache.view("small"), cache.open("k"), cache.open("small"), cache.location("k")]
        part = held[0][5:9]
        held[4].close()
        del held
        assert part == VALUE[5:9]
        for call in (cache.view, cache.open, cache.location):
            with pytest.raises(TypeError):
                call("n")
            with pytest.raises(KeyError):
                call("none")
    del part
    gc.collect()
    assert descriptors() == before
    assert Path("/proc/self/maps").read_text().count("/large/") == maps


@pytest.mark.skipif(sys.version_info < (3, 13), reason="the module keeps one before")
def test_views_need_no_descriptors(make: Make) -> None:
    cache = small(make)
    cache["k"] = VALUE
    cache.view("k")
    before = descriptors()
    views = [cache.view("k") for _ in range(50)]
    assert descriptors() == before and all(view == VALUE for view in views)


def test_where_nothing_can_be_mapped(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = small(make)
    cache["k"] = VALUE

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, "on purpose")

    monkeypatch.setattr("yatagarasu_cache.store.lending.mmap.mmap", refuse)
    assert cache.view("k") == VALUE and cache.view("k").readonly
    assert not lent()


def test_in_many_threads(make: Make) -> None:
    cache = small(make)
    cache["k"] = VALUE
    shared = cache.open("k")

    def read(number: int) -> None:
        for turn in range(10):
            at = (number * 10 + turn) * 1237
            with cache.open("k") as file:
                file.seek(at)
                assert file.read(2 * CHUNK) == VALUE[at : at + 2 * CHUNK]
            assert cache.view("k") == VALUE
            assert len(shared.read(1000)) == 1000

    in_threads(4, read)
    shared.close()


def test_read_only(make: Make) -> None:
    small(make)["k"] = VALUE
    reader = make(read_only=True)
    assert reader.view("k") == VALUE == reader.open("k").read()
    assert reader.get("k", with_meta=True) == (VALUE, None)
    with pytest.raises(ReadOnlyError):
        reader.set_meta("k", 1)


# -- damage -------------------------------------------------------------------------------------


def test_damage_in_one_chunk_is_found_by_who_reads_it(make: Make, directory: Path) -> None:
    cache = small(make)
    cache["k"] = VALUE
    flip(large_file(directory), 2 * CHUNK + 7)
    with cache.open("k") as file, cache.open("k") as other:
        assert file.read(2 * CHUNK) == VALUE[: 2 * CHUNK]
        with cache.location("k", 3 * CHUNK, 100) as (fd, at, length):
            assert os.pread(fd, length, at) == VALUE[3 * CHUNK : 3 * CHUNK + 100]
        assert cache.stats().corrupt == 0
        buffer = bytearray(b"x" * 3 * CHUNK)
        for call in (
            lambda: file.read(1), lambda: file.read(), lambda: file.readline(), lambda: file.read1(9),
            lambda: other.seek(CHUNK + 5) and other.read(2 * CHUNK), lambda: other.seek(0) or other.read(),
            lambda: other.seek(0) or other.readinto(buffer),
        ):  # fmt: skip
            with pytest.raises(CacheIOError, match="damaged") as caught:
                call()
            assert caught.value.errno == errno.EIO
        damaged = VALUE[2 * CHUNK : 2 * CHUNK + 7] + bytes([VALUE[2 * CHUNK + 7] ^ 1])
        assert damaged not in bytes(buffer)
        assert file.seek(3 * CHUNK) and file.read() == VALUE[3 * CHUNK :]  # what is sound stays readable
    assert cache.stats().corrupt == 1
    assert "k" not in cache and not list((directory / "large").iterdir())
    assert cache.check() == []


@pytest.mark.parametrize("call", ["get", "view", "location", "range"])
def test_what_reads_all_takes_damage_for_a_miss(make: Make, directory: Path, call: str) -> None:
    cache = small(make)
    cache["k"] = VALUE
    flip(large_file(directory), len(VALUE) - 1)
    calls: dict[str, Callable[[], Any]] = {
        "get": lambda: cache["k"], "view": lambda: cache.view("k"), "location": lambda: cache.location("k"),
        "range": lambda: cache.location("k", 5 * CHUNK),
    }  # fmt: skip
    with pytest.raises(KeyError):
        calls[call]()
    assert not lent() and cache.stats().corrupt == 1 and "k" not in cache


@pytest.mark.parametrize("length", [0, 1, CHUNK, len(VALUE) - 1])
def test_a_file_that_was_cut(make: Make, directory: Path, length: int) -> None:
    cache = small(make)
    for number, call in enumerate((cache.open, cache.view, cache.location, cache.__getitem__)):
        cache["k"] = VALUE
        os.truncate(large_file(directory), length)
        with pytest.raises(KeyError):
            call("k")
        assert cache.stats().corrupt == number + 1


def test_a_file_that_is_cut_while_it_is_open(make: Make, directory: Path) -> None:
    cache = small(make)
    cache["k"] = VALUE
    with cache.open("k") as file:
        os.truncate(large_file(directory), 3 * CHUNK)
        assert file.read(3 * CHUNK) == VALUE[: 3 * CHUNK]
        with pytest.raises(CacheIOError, match="damaged"):
            file.read(1)
    assert "k" not in cache


def test_a_damaged_list_loses_no_value(make: Make, directory: Path) -> None:
    """It can be made anew of the value, whose checksum is that of the list."""
    cache = small(make)
    cache["k"] = VALUE
    flip_list(directory, VALUE)
    assert cache["k"] == VALUE == cache.view("k") == cache.open("k").read()
    with cache.location("k", CHUNK, 5) as (fd, at, length):
        assert os.pread(fd, length, at) == VALUE[CHUNK : CHUNK + 5]
    (problem,) = cache.check()
    assert (problem.kind, problem.detail) == ("entry", "its list of checksums is damaged")
    flip(large_file(directory), CHUNK)  # with both of them nothing tells what was stored
    with pytest.raises(KeyError):
        cache.open("k")
    assert cache.stats().corrupt == 1


def test_check_reads_every_chunk(make: Make, directory: Path) -> None:
    cache = small(make)
    cache["k"] = VALUE
    assert cache.check() == []
    flip(large_file(directory), 3 * CHUNK)
    (problem,) = cache.check(fix=True)
    assert (problem.kind, problem.detail, problem.fixed) == ("entry", "its value fails its checksum", True)
    assert "k" not in cache and cache.check() == []


def test_damage_is_told_after_the_cache_was_closed_or_the_entry_replaced(make: Make, directory: Path) -> None:
    cache = small(make)
    cache["k"] = VALUE
    path = large_file(directory)
    with cache.open("k") as closed, cache.open("k") as replaced:
        flip(path, 0)
        kept = path.with_name("kept")
        os.link(path, kept)
        cache["k"] = b"new"
        with pytest.raises(CacheIOError, match="damaged"):
            replaced.read()
        assert cache["k"] == b"new" and cache.stats().corrupt == 0
        cache.close()
        with pytest.raises(CacheIOError, match="damaged"):
            closed.read()


def test_damage_read_through_a_read_only_handle(make: Make, directory: Path) -> None:
    with small(make) as cache:
        cache["k"] = VALUE
    flip(large_file(directory), 0)
    reader = make(read_only=True)
    with reader.open("k") as file, pytest.raises(CacheIOError, match="damaged"):
        file.read(1)
    assert reader.stats().process["corrupt"] == 1


def test_a_disk_that_fails_drops_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = small(make)
    cache["k"] = VALUE
    core = cache._store.core

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "on purpose")

    with cache.open("k") as file:
        for name in ("sum_chunks", "read_chunks", "read_chunks_into"):
            monkeypatch.setattr(core, name, fail)
        for call in (lambda: cache.view("k"), lambda: cache.location("k"), file.read, lambda: file.read(9)):
            with pytest.raises(CacheIOError) as caught:
                call()
            assert "damaged" not in str(caught.value)
        assert len(lent()) == 1
        monkeypatch.undo()
    assert cache["k"] == VALUE


# -- what is written in pieces, and arrays ----------------------------------------------------------


@pytest.mark.parametrize("lengths", [(0,), (5, 0, LARGE), (CHUNK, CHUNK), (CHUNK - 1, 2, CHUNK), (3 * CHUNK + 1, 40)])
def test_pieces(make: Make, lengths: tuple[int, ...]) -> None:
    cache = small(make)
    parts = [memoryview(bytearray(noise(length, number))) for number, length in enumerate(lengths)]
    data = b"".join(parts)
    key = cache._desk.encode_key("k")
    cache._desk.put(key, Pieces(parts), 0)
    assert cache["k"] == data
    cache["k"] = data
    assert cache["k"] == data == cache.view("k")
    assert cache.check() == []


@pytest.mark.parametrize("length", LENGTHS)
def test_arrays_come_in_memory_of_their_own(make: Make, length: int) -> None:
    """What the engine hands out of them is a bytearray, whoever asks in whichever way; nobody else has it."""
    cache, data = small(make), noise(length)
    desk, store = cache._desk, cache._store
    desk.put(desk.encode_key("k"), data, 9, 0, b"t", b"\x01")
    found = []

    def decode(payload: Any, flags: int, key: Any) -> Any:
        assert flags & 15 == 9
        found.append(payload)
        return payload

    cache._decode = desk.decode = decode  # type: ignore[method-assign]
    many = cache.get_many(["k", "none"])
    values = [cache["k"], cache.get("k", with_meta=True)[0], many["k"], store.reading.get(*desk.identify("k"))[0]]  # type: ignore[index]
    values.append(store.reading.get_many([desk.encode_key("k")])[0][0])  # type: ignore[index]
    for value in values:
        assert type(value) is bytearray and value == data
        value += b"mine"
    assert cache["k"] == data
    view = cache.view("k")
    assert type(view) is memoryview and view.readonly and view == data
    for call in (cache.open, cache.location):
        with pytest.raises(TypeError):
            call("k")


def test_sums_of_sums(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a value with too many chunks each sum in the list is of several."""
    monkeypatch.setattr(f, "MOST_SUMS", 2)
    cache = make(size_limit=64 << 20, segment_size=SEGMENT, backend="threads")
    cache["k"] = VALUE
    assert f.chunks_a_sum(len(VALUE)) == 4
    with cache.open("k") as file:
        for at in (0, CHUNK, 4 * CHUNK - 3, 5 * CHUNK, len(VALUE) - 1):
            file.seek(at)
            assert file.read(CHUNK) == VALUE[at : at + CHUNK]
        file.seek(0)
        assert file.read() == VALUE
    with cache.location("k", 4 * CHUNK + 1, 10) as (fd, at, length):
        assert os.pread(fd, length, at) == VALUE[4 * CHUNK + 1 : 4 * CHUNK + 11]
    flip(large_file(Path(cache.directory)), CHUNK)
    with cache.open("k") as file:
        file.seek(4 * CHUNK)
        assert file.read() == VALUE[4 * CHUNK :]
        file.seek(3 * CHUNK)
        with pytest.raises(CacheIOError, match="damaged"):
            file.read(1)
