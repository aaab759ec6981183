"""`set` of the compiled core keeps the rank of an entry: the part of its metadata that says where it stands in
an order of its users'."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from available import CORES

from yatagarasu_cache import DiskCache
from yatagarasu_cache.codec import encode_key
from yatagarasu_cache.store.core import RANK_BYTES, SHORT_META
from yatagarasu_cache.store.format import W_CLOCK

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif("c" not in CORES, reason="the compiled core is not there"),
]

AT = 3
TEMPLATE = b"abc" + bytes(RANK_BYTES) + b"z"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DiskCache]:
    monkeypatch.setenv("YATAGARASU_CORE", "c")
    with DiskCache(tmp_path / "cache", backend="threads") as cache:
        cache.set("first", b"")  # there is a segment now
        yield cache


def ranked(cache: DiskCache, key: str, value: bytes = b"value", meta: bytes = TEMPLATE, rank: int | None = AT) -> bool:
    return bool(cache._desk.set(key, value, "tag", meta, rank))


def meta_of(cache: DiskCache, key: str) -> Any:
    cache.get(key)  # opens the segment
    return cache._store.core.meta(encode_key(key), time.time_ns())


def rank_of(cache: DiskCache, key: str) -> int:
    meta = meta_of(cache, key)
    assert meta[:AT] == b"abc" and meta[AT + RANK_BYTES :] == b"z"
    return int(struct.unpack_from("<Q", meta, AT)[0])


def test_a_new_entry_is_behind_all_others(cache: DiskCache) -> None:
    ranks = []
    for i in range(50):
        before = cache._store.current.index.words[W_CLOCK]
        assert ranked(cache, f"{i}")
        ranks.append(rank_of(cache, f"{i}"))
        assert ranks[-1] > before
    assert ranks == sorted(set(ranks))
    assert cache.get_entry("7").tag == "tag" and cache.get("7") == b"value"


def test_one_that_is_replaced_keeps_its_rank(cache: DiskCache) -> None:
    assert ranked(cache, "a") and ranked(cache, "b")
    before = rank_of(cache, "a"), rank_of(cache, "b")
    for i in range(20):
        assert ranked(cache, "a", b"%d" % i)
        assert cache.get("a") == b"%d" % i
        assert (rank_of(cache, "a"), rank_of(cache, "b")) == before


@pytest.mark.parametrize("other", [b"", b"abc" + bytes(8), b"abd" + bytes(8) + b"z", b"abc" + bytes(8) + b"y", TEMPLATE + b"z"])
def test_one_whose_metadata_differ_otherwise_is_left_alone(cache: DiskCache, other: bytes) -> None:
    assert ranked(cache, "a", b"old", other, None)
    assert meta_of(cache, "a") == other
    assert not ranked(cache, "a")
    assert cache.get("a") == b"old" and meta_of(cache, "a") == other


def test_after_one_was_removed_or_has_expired_the_rank_is_a_new_one(cache: DiskCache) -> None:
    assert ranked(cache, "a")
    before = rank_of(cache, "a")
    cache.delete("a")
    assert ranked(cache, "a") and (second := rank_of(cache, "a")) > before
    assert cache.touch("a", 0.01)
    time.sleep(0.02)
    assert ranked(cache, "a") and rank_of(cache, "a") > second


def test_a_rank_is_within_the_metadata(cache: DiskCache) -> None:
    for rank in (AT + 2, len(TEMPLATE), 1 << 40):
        assert not ranked(cache, "a", rank=rank)
    assert not ranked(cache, "a", meta=bytes(SHORT_META + 1), rank=0)
    assert "a" not in cache
    for rank in (-1, 1 << 64):
        with pytest.raises(OverflowError):
            ranked(cache, "a", rank=rank)
    assert ranked(cache, "a", meta=bytes(SHORT_META), rank=SHORT_META - RANK_BYTES)
    assert len(cache) == 2


def test_metadata_without_a_rank_is_stored_as_it_is(cache: DiskCache) -> None:
    assert ranked(cache, "a", b"old", b"\x01meta", None) and meta_of(cache, "a") == b"\x01meta"
    assert ranked(cache, "a", b"new", b"", None) and meta_of(cache, "a") == b""
