"""`DiskCache`: values that are streams and files, and where they lie."""

from __future__ import annotations

import io
import os
import pickle
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from available import on_one_core
from helpers import LARGE, SEGMENT, Make, named, noise, run_python

from yatagarasu_cache import DiskCache, SerializationError

pytestmark = pytest.mark.usefixtures("core")


class Trickle(io.RawIOBase):
    """A binary file that gives at most `most` bytes a read."""

    def __init__(self, data: bytes, most: int) -> None:
        self._file, self._most = io.BytesIO(data), most

    def read(self, size: int | None = -1) -> bytes:
        return self._file.read(min(self._most, size if size is not None and size >= 0 else self._most))


class Bare(io.RawIOBase):
    """A file that has its own `read`, and leaves the rest as `io` has it: it does not say that it is readable."""

    def __init__(self, error: Exception | None = None) -> None:
        self._parts, self._error = [b"bare"], error

    def read(self, size: int = -1) -> bytes:
        if self._error is not None:
            raise self._error
        return self._parts.pop() if self._parts else b""


def test_files_that_cannot_be_read_are_refused_with_a_remedy(cache: DiskCache, tmp_path: Path) -> None:
    cache["k"] = "old"
    closed = io.BytesIO(b"x")
    closed.close()
    with pytest.raises(ValueError, match=r"^value is a closed file: open it for reading \(mode 'rb'\)$"):
        cache.set("k", closed)
    for buffering in (-1, 0):
        with open(tmp_path / "file", "wb", buffering) as file:
            with pytest.raises(ValueError, match="^value is a file that is open for writing only: .*'rb'"):
                cache.set("k", file)
        with pytest.raises(ValueError, match="^value is a closed file"):
            cache.set("k", file, length=3)
    assert cache["k"] == "old"


def test_files_of_the_callers_own_are_just_read(cache: DiskCache, tmp_path: Path) -> None:
    cache.set("k", Bare())
    assert cache["k"] == b"bare"
    with pytest.raises(ValueError, match="^mine$"):
        cache.set("k", Bare(ValueError("mine")))
    with open(tmp_path / "file", "w+b") as file:
        file.write(b"both")
        file.seek(0)
        cache.set("both", file)
    assert (cache["k"], cache["both"]) == (b"bare", b"both")


@pytest.mark.parametrize("length", [0, 1, 15, 16, LARGE - 1, LARGE, LARGE + 1, 3 * SEGMENT, (1 << 20) + 1])
@pytest.mark.parametrize("kind", ["file", "trickle", "iterator", "one", "views"])
def test_set_from_a_stream(make: Make, directory: Path, tmp_path: Path, length: int, kind: str) -> None:
    cache = make(size_limit=16 << 20, segment_size=SEGMENT)
    data = noise(length)
    path = tmp_path / "source"
    path.write_bytes(data)
    with path.open("rb") as file:
        source: Any = {
            "file": file,
            "trickle": Trickle(data, 1000),
            "iterator": (data[at : at + 777] for at in range(0, length, 777)),
            "one": iter([b"", data, b""]),
            "views": (memoryview(bytearray(data[at : at + 5000])) for at in range(0, length, 5000)),
        }[kind]
        assert cache.set("k", source, tag="t", meta="m", expire=1000) is True
    assert cache["k"] == data
    entry = cache.get_entry("k")
    assert entry is not None
    assert (entry.tag, entry.meta, entry.size) == ("t", "m", length)
    assert len(os.listdir(directory / "large")) == (length >= LARGE)
    assert os.listdir(directory / "tmp") == []
    assert cache.check() == []


def test_stream_of_strided_views(cache: DiskCache) -> None:
    cache.set("k", iter([memoryview(b"a_b_c_")[::2], memoryview(bytes(8)).cast("d")]))
    assert cache["k"] == b"abc" + bytes(8)


@pytest.mark.parametrize("good", [10, 3 * SEGMENT])
@pytest.mark.parametrize("failure", ["raises", "text", "number"])
def test_failing_stream_leaves_the_old_value(make: Make, directory: Path, good: int, failure: str) -> None:
    cache = make(size_limit=16 << 20, segment_size=SEGMENT)
    cache.set("k", b"old")
    before = cache.volume()

    def parts() -> Iterator[Any]:
        yield noise(good)
        if failure == "raises":
            raise RuntimeError("mine")
        yield "text" if failure == "text" else 5

    with pytest.raises(RuntimeError if failure == "raises" else SerializationError):
        cache.set("k", parts())
    assert cache["k"] == b"old"
    assert os.listdir(directory / "large") == os.listdir(directory / "tmp") == []
    assert cache.volume() == before
    assert cache.check() == []


def test_text_file_is_refused(cache: DiskCache, tmp_path: Path) -> None:
    (tmp_path / "t").write_text("x")
    with (tmp_path / "t").open() as file, pytest.raises(SerializationError, match="binary mode"):
        cache.set("k", file)


@pytest.mark.parametrize("length", [0, 1, 1000, 2 << 20])
def test_open(cache: DiskCache, length: int) -> None:
    data = noise(length)
    cache.set("k", data)
    with cache.open("k") as file:
        assert file.readable() and file.seekable() and not file.writable()
        assert file.read() == data
        assert file.read() == b""
        assert file.seek(-min(7, length), os.SEEK_END) == length - min(7, length)
        assert file.read() == data[-7:]
        file.seek(length // 2)
        assert file.tell() == length // 2
        assert file.read(10) == data[length // 2 :][:10]
        assert file.seek(length + 100) == length + 100
        assert file.read() == b""
        with pytest.raises(ValueError):
            file.seek(-1)
        file.seek(0)
        buffer = bytearray(length + 10)
        assert file.readinto(buffer) == length
        assert buffer[:length] == data
    assert file.closed
    with pytest.raises(ValueError):
        file.read()


def test_open_text(cache: DiskCache) -> None:
    cache.set("k", "grün\n日本\n")
    with io.TextIOWrapper(cache.open("k"), encoding="utf-8") as file:
        assert list(file) == ["grün\n", "日本\n"]


@pytest.mark.parametrize("length", [100, 2 << 20])
def test_open_file_outlives_its_entry(cache: DiskCache, length: int) -> None:
    cache.set("k", noise(length))
    with cache.open("k") as file, cache.location("k") as location:
        first = file.read(10)
        cache.set("k", b"new")
        cache.clear()
        assert first + file.read() == noise(length)
        fd, offset, count = location
        assert os.pread(fd, count, offset) == noise(length)
    assert cache.get("k") is None


@pytest.mark.parametrize("value", [1, 1.5, None, True, [b"x"]], ids=named)
def test_open_refuses_what_is_not_bytes(cache: DiskCache, value: Any) -> None:
    cache["k"] = value
    for method in (cache.open, cache.location):
        with pytest.raises(TypeError, match="get()"):
            method("k")
        with pytest.raises(KeyError):
            method("missing")


@pytest.mark.parametrize("length", [0, 1, 5000, (2 << 20) + 13])
def test_location_by_sendfile_to_a_file(cache: DiskCache, tmp_path: Path, length: int) -> None:
    data = noise(length)
    cache.set("other", b"x" * 100)
    cache.set("k", data)
    with (tmp_path / "out").open("wb") as out, cache.location("k") as (fd, offset, count):
        done = 0
        while done < count:
            done += os.sendfile(out.fileno(), fd, offset + done, count - done)
    assert (tmp_path / "out").read_bytes() == data


@pytest.mark.parametrize("length", [1, 5000, (2 << 20) + 13])
def test_location_by_sendfile_to_a_socket(cache: DiskCache, length: int) -> None:
    data = noise(length)
    cache.set("k", data)
    left, right = socket.socketpair()
    received = bytearray()

    def receive() -> None:
        while part := right.recv(1 << 16):
            received.extend(part)

    with left, right:
        reader = threading.Thread(target=receive)
        reader.start()
        with cache.location("k") as location:
            fd, offset, count = location
            done = 0
            while done < count:
                done += os.sendfile(left.fileno(), fd, offset + done, count - done)
        left.shutdown(socket.SHUT_WR)
        reader.join()
    assert received == data
    location.close()  # again: nothing happens
    assert location.fd == -1


def _stream_large(cache: DiskCache, megabytes: int) -> None:
    """In a process of its own: the memory that a value of so many MiB takes both ways is bounded."""
    options = pickle.dumps((cache.directory, cache.settings.backend))
    cache.close()
    code = """
import hashlib, pickle, resource, sys
from yatagarasu_cache import DiskCache
directory, backend = pickle.loads(bytes.fromhex(sys.argv[1]))
megabytes = int(sys.argv[2])
block = hashlib.shake_128(b"x").digest(1 << 20)
def parts(sent):
    for n in range(megabytes):
        part = n.to_bytes(8, "little") + block[8:]
        sent.update(part)
        yield part
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
with DiskCache(directory, backend=backend, size_limit=4 << 30) as cache:
    cache.set("warm", block * 4)
    with cache.open("warm") as file:
        file.read(1 << 20)
    start = peak()
    sent, got = hashlib.sha256(), hashlib.sha256()
    cache.set("k", parts(sent), length=megabytes << 20)
    with cache.open("k") as file:
        while part := file.read(1 << 20):
            got.update(part)
    assert sent.digest() == got.digest()
    assert cache.get_entry("k").size == megabytes << 20
    print(peak() - start)
"""
    grown = int(run_python(code, options.hex(), megabytes))
    assert grown < 24, f"{grown} MiB"


@pytest.mark.slow
@on_one_core
def test_100_mb_in_constant_memory(cache: DiskCache) -> None:
    _stream_large(cache, 100)


@pytest.mark.in_turn
@pytest.mark.slow
@on_one_core
def test_1_gib_in_constant_memory(cache: DiskCache) -> None:
    _stream_large(cache, 1024)


def test_64_mib_in_constant_memory(cache: DiskCache) -> None:
    _stream_large(cache, 64)


@pytest.mark.slow
@on_one_core
def test_100_mb_at_once(cache: DiskCache) -> None:
    value = noise(100 << 20)
    cache.set("k", value)
    assert cache["k"] == value
    assert cache.pop("k") == value
    assert cache.volume() < 80 << 20
