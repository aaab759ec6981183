"""`import-diskcache`: what diskcache has stored is taken over, and nothing of it is executed."""

from __future__ import annotations

import collections
import json
import os
import pickle
import sqlite3
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import yatagarasu_cache.compat.diskcache as dc
from yatagarasu_cache import CacheIOError, DiskCache, FormatError
from yatagarasu_cache.cli import main
from yatagarasu_cache.compat.diskcache.importer import import_diskcache
from yatagarasu_cache.compat.diskcache.plain_pickle import NotPlain, loads

BIG = os.urandom(3_000_000)


class Trap:
    """Unpickling it is noticed."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("sprung",)


class Old:
    """A directory as diskcache 5.6.3 leaves it."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory = directory
        directory.mkdir(parents=True)
        self.connection = sqlite3.connect(directory / "cache.db", isolation_level=None)
        self.connection.execute("PRAGMA journal_mode = wal")
        self.connection.execute("CREATE TABLE Settings (key TEXT NOT NULL UNIQUE, value)")
        self.connection.execute(
            "CREATE TABLE Cache (rowid INTEGER PRIMARY KEY, key BLOB, raw INTEGER, store_time REAL, expire_time REAL,"
            " access_time REAL, access_count INTEGER DEFAULT 0, tag BLOB, size INTEGER DEFAULT 0, mode INTEGER DEFAULT 0,"
            " filename TEXT, value BLOB)"
        )
        for item in {"size_limit": 10**8, "eviction_policy": "least-recently-used", "count": 0, **settings}.items():
            self.connection.execute("INSERT INTO Settings VALUES (?, ?)", item)

    def add(
        self, key: Any, value: Any, *, raw: int = 1, mode: int = 1, file: bytes | None = None,
        filename: str | None = None, expire: float | None = None, tag: Any = None,
    ) -> None:  # fmt: skip
        if file is not None:
            filename = filename or f"{len(os.listdir(self.directory)):02x}/aa/{os.urandom(14).hex()}.val"
            path = self.directory / filename
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file)
        self.connection.execute(
            "INSERT INTO Cache (key, raw, expire_time, tag, mode, filename, value) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (key, raw, expire, tag, mode, filename, value),
        )


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    made = Old(tmp_path / "old")
    yield made
    made.connection.close()
    assert not (tmp_path / "sprung").exists()


def test_everything_is_taken_over(old: Old, tmp_path: Path) -> None:
    soon = time.time() + 1000
    key = ("f", 1, None, "x", 2.5)
    old.add("text", "value", tag="t")
    old.add(5, b"bytes", expire=soon, tag=7)
    old.add(b"key", 2.5)
    old.add(pickle.dumps(key), pickle.dumps({"a": [1, (2,)]}), raw=0, mode=4)
    old.add(pickle.dumps(True), 1, raw=0)
    old.add("big", None, mode=2, file=BIG, tag="t")
    old.add("small file", None, mode=2, file=b"x" * 40_000)
    old.add("text file", None, mode=3, file="ä".encode() * 40_000)
    old.add("pickled file", None, mode=4, file=pickle.dumps(["x" * 50_000]))
    old.add("gone", 1, expire=time.time() - 1)
    report = import_diskcache(old.directory, tmp_path / "new")
    assert (report.total, report.imported, report.expired, report.present) == (10, 9, 1, 0) and not report.left_out
    expected = {
        "text": "value", 5: b"bytes", b"key": 2.5, key: {"a": [1, (2,)]}, True: 1, "big": BIG, "small file": b"x" * 40_000,
        "text file": "ä" * 40_000, "pickled file": ["x" * 50_000],
    }  # fmt: skip
    with dc.Cache(tmp_path / "new") as cache:
        assert {key: cache[key] for key in cache} == expected and list(cache) == list(expected)
        value, expires, tag = cache.get(5, expire_time=True, tag=True)
        assert (value, tag) == (b"bytes", 7) and abs(expires - soon) < 0.01
        assert (cache.size_limit, cache.eviction_policy) == (10**8, "least-recently-used")
        with cache.read("big") as reader:
            assert reader.read() == BIG
        assert cache.evict("t") == 2
    with DiskCache(tmp_path / "new") as plain:
        assert plain[key] == {"a": [1, (2,)]} and plain[5] == b"bytes"


def test_pickles_of_more_than_plain_values(old: Old, tmp_path: Path) -> None:
    old.add("object", pickle.dumps(collections.Counter("aab")), mode=4)
    old.add(pickle.dumps(collections.Counter("b")), 1, raw=0)
    old.add("plain", 1)
    report = import_diskcache(old.directory, tmp_path / "new")
    assert report.imported == 1 and sum(report.left_out.values()) == 2
    assert all("pickle of more than plain values" in reason for reason in report.left_out)
    report = import_diskcache(old.directory, tmp_path / "new", allow_pickle=True)
    assert (report.imported, report.present) == (2, 1) and not report.left_out
    with dc.Cache(tmp_path / "new") as cache:
        assert cache["object"] == collections.Counter("aab") and cache[collections.Counter("b")] == 1


def test_nothing_is_executed(old: Old, tmp_path: Path) -> None:
    for protocol in range(6):
        old.add(f"trap {protocol}", pickle.dumps(Trap(), protocol), mode=4)
        old.add(pickle.dumps((protocol, Trap()), protocol), 1, raw=0)
    report = import_diskcache(old.directory, tmp_path / "new")
    assert report.imported == 0 and sum(report.left_out.values()) == 12


def test_what_is_there_stays(old: Old, tmp_path: Path) -> None:
    old.add("a", 1)
    old.add("b", 2)
    with DiskCache(tmp_path / "new") as cache:
        cache["a"] = "newer"
    report = import_diskcache(old.directory, tmp_path / "new")
    assert (report.imported, report.present) == (1, 1)
    old.add("c", 3)  # and begun again, it goes on
    report = import_diskcache(old.directory, tmp_path / "new")
    assert (report.imported, report.present) == (1, 2)
    with DiskCache(tmp_path / "new") as cache:
        assert dict(cache.items()) == {"a": "newer", "b": 2, "c": 3} and cache.settings.size_limit == 10 << 30
    assert import_diskcache(old.directory, tmp_path / "new", overwrite=True).imported == 3
    with DiskCache(tmp_path / "new") as cache:
        assert cache["a"] == 1


def test_hostile_directories(old: Old, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("not to be had")
    os.mkfifo(old.directory / "pipe")
    (old.directory / "link").symlink_to(tmp_path / "private")
    for name in ("../private", str(tmp_path / "private"), "link", "pipe", "none", "", "a\0b", "cache.db/x"):
        old.connection.execute("INSERT INTO Cache (key, raw, mode, filename) VALUES (?, 1, 2, ?)", (f"n {name}", name))
    old.add(None, 1), old.add("x", 1, mode=9), old.add("y", "text", mode=4), old.add(b"junk", 1, raw=0)
    old.add("z", None), old.add("e", 1, expire="soon"), old.add("u", None, mode=3, file=b"\xff")  # type: ignore[arg-type]
    old.add("ok", 1)
    report = import_diskcache(old.directory, tmp_path / "new")
    assert report.imported == 1 and sum(report.left_out.values()) == report.total - 1 == 15
    assert all(len(examples) <= 5 for examples in report.examples.values())


def test_a_database_that_is_damaged(old: Old, tmp_path: Path) -> None:
    for n in range(2000):
        old.add(n, "x" * 100)
    old.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with open(old.directory / "cache.db", "r+b") as file:
        file.seek(8192)
        file.write(os.urandom(100_000))
    with pytest.raises(CacheIOError, match="cache.db cannot be read"):
        import_diskcache(old.directory, tmp_path / "new")


def test_shards(tmp_path: Path) -> None:
    for shard in range(3):
        old = Old(tmp_path / "fan" / f"{shard:03d}", size_limit=10**6)
        old.add(f"key {shard}", shard)
        old.connection.close()
    Old(tmp_path / "fan" / "cache" / "mine").connection.close()
    report = import_diskcache(tmp_path / "fan", tmp_path / "new")
    assert report.imported == 3 and report.others == [str(tmp_path / "fan" / "cache" / "mine")]
    with dc.FanoutCache(tmp_path / "new", shards=3) as cache:
        assert set(cache) == {"key 0", "key 1", "key 2"} and cache.size_limit == 10**6


def test_json_disks(old: Old, tmp_path: Path) -> None:
    def packed(value: Any) -> bytes:
        return zlib.compress(json.dumps(value).encode())

    old.add(packed(["a", 1]), packed({"x": None}))
    old.add("other", 1)
    report = import_diskcache(old.directory, tmp_path / "new", json_disk=True)
    assert report.imported == 1 and "JSONDisk" in next(iter(report.left_out))
    with dc.Cache(tmp_path / "new", disk=dc.JSONDisk) as cache:
        assert cache[["a", 1]] == {"x": None} and list(cache) == [["a", 1]]


def test_read_only_directories(old: Old, tmp_path: Path) -> None:
    old.add("a", 1)
    old.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    old.connection.close()
    before = {path: path.stat().st_mtime_ns for path in old.directory.rglob("*")}
    assert import_diskcache(old.directory, tmp_path / "new").imported == 1
    assert {path: path.stat().st_mtime_ns for path in old.directory.rglob("cache.db")}.items() <= before.items()


def test_the_error_names_the_command(old: Old, tmp_path: Path) -> None:
    for kind in (DiskCache, dc.Cache, dc.FanoutCache):
        with pytest.raises(FormatError, match=r"diskcache made it: .*import-diskcache .*old NEW_DIRECTORY"):
            kind(old.directory)
    with pytest.raises(FormatError, match="no directory of diskcache"):
        import_diskcache(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_command(old: Old, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old.add("a", 1)
    old.add("b", pickle.dumps(collections.Counter()), mode=4)
    assert main(["import-diskcache", str(old.directory), str(tmp_path / "new")]) == 1
    printed = capsys.readouterr().out
    assert "1 of 2 entries imported" in printed and "1 left out: its value is a pickle" in printed and "'b'" in printed
    assert main(["import-diskcache", str(old.directory), str(tmp_path / "new"), "--allow-pickle", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["imported"], report["present"], report["left_out"]) == (1, 1, {})
    assert main(["import-diskcache", str(tmp_path), str(tmp_path / "new")]) == 2
    assert "no directory of diskcache" in capsys.readouterr().err


# -- plain pickles -----------------------------------------------------------------------------

plain: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.binary().map(bytearray),
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner)
        | st.sets(st.integers() | st.text()) | st.frozensets(st.integers())
    ),
)  # fmt: skip


@given(plain)
def test_plain_values_come_back(value: Any) -> None:
    data = pickle.dumps(value, 5)
    assert loads(data) == value == pickle.loads(data)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
), st.integers(0, 5))  # fmt: skip
def test_of_each_protocol(value: Any, protocol: int) -> None:
    assert loads(pickle.dumps(value, protocol)) == value


@given(st.binary(max_size=60))
def test_any_bytes(data: bytes) -> None:
    try:
        value = loads(data)
    except NotPlain:
        return
    assert type(value) in (type(None), bool, int, float, str, bytes, bytearray, tuple, list, dict, set, frozenset)


@given(plain, st.integers(0, 10**6), st.integers(0, 255))
def test_damaged_ones(value: Any, at: int, byte: int) -> None:
    data = bytearray(pickle.dumps(value, 5))
    data[at % len(data)] = byte
    try:
        loads(bytes(data))
    except NotPlain:
        pass


@pytest.mark.parametrize(
    "data",
    [b"", b".", b"N", b"\x80\x09N.", b"X\xff\xff\xff\x7fabc.", b"\x8d" + b"\xff" * 8 + b".", b"(((.", b"t.", b"]a.", b"}(K\x01u.",
     b"h\x05.", b"j\xff\xff\xff\xff.", b"I1\nR.", b"L" + b"9" * 5000 + b"L\n.", b"}]]s."],
)  # fmt: skip
def test_what_is_none(data: bytes) -> None:
    with pytest.raises(NotPlain):
        loads(data)


def test_large_numbers_in_a_pickle_cost_no_memory() -> None:
    assert loads(b"Nr\xff\xff\xff\x7f0j\xff\xff\xff\x7f.") is None
    value: Any = []
    for _ in range(10_000):
        value = [value]
    data = b"]" * 10_000 + b"a" * 9_999 + b"."
    assert type(loads(data)) is list


DEEP, SHARED = b")" + b"\x85" * 300_000, b")" + b"2\x86" * 60  # tuples in tuples, and of one tuple twice


@pytest.mark.parametrize("key", [DEEP, SHARED])
@pytest.mark.parametrize("form", [b"}%bNs.", b"}(%bNu.", b"(%bNd.", b"\x8f(%b\x90.", b"(%b\x91."])
def test_keys_that_cannot_be_hashed_are_not(key: bytes, form: bytes) -> None:
    with pytest.raises(NotPlain, match="tuples"):
        loads(b"\x80\x04" + form % key)


def test_tuples_are_keys(old: Old) -> None:
    value = {("a", (1, ("b",))): {(1, 2), (1, (2,))}, frozenset({(1,)}): 1}
    assert loads(pickle.dumps(value)) == value


@pytest.mark.parametrize("key", [DEEP, SHARED])
def test_others_go_on_where_a_key_cannot_be_stored(old: Old, tmp_path: Path, key: bytes) -> None:
    old.add(b"\x80\x04" + key + b".", 1, raw=0)
    old.add("k", 1)
    report = import_diskcache("old", "new")
    assert report.imported == 1 and "key cannot be stored" in next(iter(report.left_out))


def test_what_expires_in_ages_is_imported(old: Old, tmp_path: Path) -> None:
    old.add("inf", 1, expire=float("inf"))
    old.add("far", 2, expire=1e300)
    old.add("past", 3, expire=-1e300)
    report = import_diskcache("old", "new")
    assert report.imported == 2 and report.expired == 1
    with dc.Cache("new") as cache:
        assert cache["inf"] == 1 and cache["far"] == 2


@pytest.mark.parametrize(
    "packed", [zlib.compress(b"[" * 100_000), zlib.compress(bytes(1 << 29), 9), zlib.compress(b"[1]")[:-1]],
    ids=["deep", "bomb", "cut off"],
)  # fmt: skip
def test_others_go_on_where_json_cannot_be_read(old: Old, packed: bytes) -> None:
    good = zlib.compress(json.dumps("k").encode())
    old.add(zlib.compress(b'"bad"'), packed)
    old.add(packed, good)
    old.add(good, good)
    report = import_diskcache("old", "new", json_disk=True)
    assert report.imported == 1 and sum(report.left_out.values()) == 2
    with dc.Cache("new", disk=dc.JSONDisk) as cache:
        assert cache["k"] == "k" and len(cache) == 1


def test_text_that_is_damaged_does_not_stop_the_others(old: Old) -> None:
    old.add("before", 1)
    old.add("bad", 2)
    old.connection.execute("UPDATE Cache SET value = CAST(X'41FF' AS TEXT) WHERE key = 'bad'")
    old.add("after", 3)
    import_diskcache("old", "new")
    with dc.Cache("new") as cache:
        assert cache["before"] == 1 and cache["after"] == 3
