"""Checksums of large values by chunks: both cores, and any way in which the bytes come, give the same."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from available import CORES
from helpers import Make, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from yatagarasu_cache.backends import choose
from yatagarasu_cache.config import make_settings
from yatagarasu_cache.store import compiled
from yatagarasu_cache.store import core as cores
from yatagarasu_cache.store import format as f
from yatagarasu_cache.store.chunks import RunningSums, listed
from yatagarasu_cache.store.item import Item, Pieces

CHUNK = f.CHUNK_BYTES
LENGTHS = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK, 37 * CHUNK + 11]  # the last by two threads
SEED = 0x123456789ABCDEF0


def expected(data: bytes, seed: int = SEED) -> bytes:
    """By the definition."""
    chunks = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    return b"".join(xxh3_64_intdigest(chunk, seed).to_bytes(8, "little") for chunk in chunks)


@pytest.fixture(params=CORES)
def large(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """A core of either kind."""
    settings = make_settings(str(tmp_path / "none"), backend="threads")
    backend = choose(settings).backend
    if request.param == "python":
        yield cores.PythonCore(backend)
    else:
        yield cores.CompiledCore(backend, str(tmp_path), compiled.load())
    backend.close()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


@given(st.lists(st.one_of(st.integers(0, 100), st.integers(CHUNK - 3, 2 * CHUNK + 3)), max_size=8))
@settings(max_examples=50)
def test_sums_of_what_comes_in_pieces(lengths: list[int]) -> None:
    data, sums, at = noise(sum(lengths)), RunningSums(SEED), 0
    for length in lengths:
        sums.update(memoryview(data)[at : at + length])
        at += length
    assert sums.packed() == expected(data)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_write(large: Any, fd: int, length: int, parts: int) -> None:
    data = noise(length)
    cuts = [length * part // parts for part in range(parts + 1)]
    pieces = tuple(memoryview(bytearray(data[a:b])) for a, b in zip(cuts, cuts[1:], strict=False))
    assert large.write_file(fd, pieces, SEED) == expected(data)
    assert os.pread(fd, length + 9, 0) == data and os.fstat(fd).st_size == length


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("start", [0, CHUNK, 3 * CHUNK])
def test_read(large: Any, fd: int, length: int, start: int) -> None:
    whole = noise(start) + (data := noise(length, 1))
    os.pwrite(fd, whole, 0)
    assert large.read_chunks(fd, start, length, SEED, 0) == (data, expected(data))
    value, sums = large.read_chunks(fd, start, length, SEED, 0x19)
    assert type(value) is bytearray and (value, sums) == (data, expected(data))
    assert large.sum_chunks(fd, start, length, SEED) == expected(data)
    memory = bytearray(b"x" * (length + 2))
    assert large.read_chunks_into(fd, start, memoryview(memory)[1:-1], SEED) == expected(data)
    assert memory == b"x" + data + b"x"
    assert large.read_chunks(fd, start, length + 1, SEED, 0) is None
    assert large.read_chunks(fd, start, length + 1, SEED, 9) is None
    assert large.sum_chunks(fd, start, length + 1, SEED) is None
    assert large.read_chunks_into(fd, start, memoryview(bytearray(length + 1)), SEED) is None


def test_failures_are_told(large: Any, tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    for call in (
        lambda fd: large.read_chunks(fd, 0, 9, 1, 0), lambda fd: large.sum_chunks(fd, 0, 9, 1),
        lambda fd: large.read_chunks_into(fd, 0, memoryview(bytearray(9)), 1),
    ):  # fmt: skip
        with pytest.raises(OSError) as caught:
            call(directory)
        assert caught.value.errno == errno.EISDIR
    with pytest.raises(OSError) as caught:
        large.write_file(directory, (b"x",), 1)
    assert caught.value.errno == errno.EBADF
    os.close(directory)


def test_memory_that_cannot_be_used(fd: int) -> None:
    module = compiled.load()
    if module is None:
        pytest.skip("nothing is compiled")
    os.pwrite(fd, bytes(100), 0)
    with pytest.raises((TypeError, BufferError)):
        module.read_chunks_into(fd, 0, b"immutable", 1)
    with pytest.raises(TypeError):
        module.read_chunks_into(fd, 0, 5, 1)
    for parts in ([b"x"], b"x", (b"x", "text"), (b"x", None)):
        with pytest.raises((TypeError, BufferError)):
            module.write_file(fd, parts, 1)
    with pytest.raises(BufferError):
        module.write_file(fd, (memoryview(b"abcdef")[::2],), 1)
    kept = bytearray(9)
    module.write_file(fd, (kept,), 1)
    kept += b"released"  # it would be locked
    with pytest.raises((MemoryError, OverflowError)):
        module.read_chunks(fd, 0, (1 << 63) - 1, 1, 0)


@pytest.mark.parametrize("most", [1, 2, 4])
def test_long_lists_are_shortened(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(f, "MOST_SUMS", most)
    for chunks in range(12):
        for length in {max(0, chunks * CHUNK - 5), chunks * CHUNK}:
            sums = expected(noise(length))
            short = listed(sums, length, SEED)
            assert f.large_payload(length) == 8 + len(short) and len(short) <= 8 * most
            group = f.chunks_a_sum(length)
            assert group == 1 or -(-length // CHUNK) > most * group // 2
            if group == 1:
                assert short == sums
            else:
                groups = [sums[at : at + 8 * group] for at in range(0, len(sums), 8 * group)]
                assert short == b"".join(xxh3_64_intdigest(one, SEED).to_bytes(8, "little") for one in groups)


def test_the_list_of_the_longest_value_fits() -> None:
    assert f.large_payload(f.MAX_VALUE_BYTES) == 8 + 8 * f.MOST_SUMS
    assert f.large_payload(4 << 30) == 8 + 8 * f.MOST_SUMS
    assert f.chunks_a_sum(4 << 30) == 1 and f.chunks_a_sum((4 << 30) + 1) == 2
    assert f.chunks_a_sum(f.MAX_VALUE_BYTES) == 256


def test_in_small_segments(make: Make) -> None:
    """The record of a large value may take more than a segment of this handle has."""
    cache = make(size_limit=256 << 20, segment_size=8 << 10)
    data = noise(128 << 20)  # whose list has 16 KiB
    cache["k"] = data
    assert cache.set_meta("k", 1) and cache.get("k", with_meta=True) == (data, 1)
    assert cache.view("k") == data
    assert cache.check() == []


def test_pieces() -> None:
    pieces = Pieces([b"ab", memoryview(b"cd"), bytearray(b"e")])
    assert len(pieces) == 5 and pieces.joined() == b"abcde"
    assert b"".join(pieces.pieces) == b"abcde"
    assert Item(2, 0, b"", pieces, 0).data == b"abcde" and Item(2, 0, b"", b"x", 0).pieces == (b"x",)
