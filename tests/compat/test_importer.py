"""`import-diskcache`: what diskcache has stored is taken over, and nothing of it is executed."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import shutil
import sqlite3
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import yatagarasu_cache.compat.diskcache as dc
from yatagarasu_cache import CacheIOError, ConfigurationError, DiskCache, FormatError
from yatagarasu_cache.cli import main
from yatagarasu_cache.compat.diskcache import importer
from yatagarasu_cache.compat.diskcache.importer import import_diskcache
from yatagarasu_cache.compat.diskcache.plain_pickle import NotPlain, loads

diskcache: Any = pytest.importorskip("diskcache")  # the real one, which makes what is imported
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
        filename: str | None = None, expire: float | None = None, tag: Any = None, size: Any = None,
    ) -> None:  # fmt: skip
        size = size if size is not None else len(file or b"")
        if file is not None:
            filename = filename or f"{len(os.listdir(self.directory)):02x}/aa/{os.urandom(14).hex()}.val"
            path = self.directory / filename
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file)
        self.connection.execute(
            "INSERT INTO Cache (key, raw, expire_time, tag, size, mode, filename, value) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (key, raw, expire, tag, size, mode, filename, value),
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
    old.add("nan", None), old.add("e", 1, expire="soon"), old.add("u", None, mode=3, file=b"\xff")  # type: ignore[arg-type]
    old.add("ok", 1)
    report = import_diskcache(old.directory, tmp_path / "new")
    assert report.imported == 2 and sum(report.left_out.values()) == report.total - 2 == 14
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


# -- queues -------------------------------------------------------------------------------------


def a_queue(old: Old) -> None:
    for n in range(3):
        old.add(500_000_000_000_000 + n, f"old {n}")
        old.add(f"jobs-{500_000_000_000_010 + n:015d}", f"job {n}")


def test_queues_that_were_used_before_show_what_is_imported(old: Old) -> None:
    a_queue(old)
    with dc.Cache("new") as cache:
        cache.push("N"), cache.push("J", prefix="jobs"), cache.pull(), cache.pull(prefix="jobs")
        assert cache.peek() == cache.peek(prefix="jobs") == (None, None)
    assert import_diskcache("old", "new").imported == 6
    with dc.Cache("new") as cache:
        assert [cache.pull()[1] for _ in range(4)] == ["old 0", "old 1", "old 2", None]
        assert [cache.pull(prefix="jobs")[1] for _ in range(4)] == ["job 0", "job 1", "job 2", None]


def test_queues_are_right_after_an_import_that_was_interrupted(old: Old) -> None:
    a_queue(old)
    import_diskcache("old", "new")
    with dc.Cache("new") as cache:  # as it is if the import ended just after it had stored them
        cache._entries.hide("queue", (500_000_000_000_000, 500_000_000_000_000))
        assert cache.peek() == (None, None)
    assert import_diskcache("old", "new").present == 6
    with dc.Cache("new") as cache:
        assert cache.pull()[1] == "old 0"


def test_large_items_of_queues(old: Old) -> None:
    with dc.Cache("new") as cache:
        cache.push("N"), cache.pull(), cache.peek()
    old.add(500_000_000_000_000, None, mode=2, file=BIG)
    import_diskcache("old", "new")
    with dc.Cache("new") as cache:
        assert cache.pull()[1] == BIG


def test_queues_of_a_json_disk(tmp_path: Path) -> None:
    with diskcache.Cache(str(tmp_path / "old"), disk=diskcache.JSONDisk) as real:
        real.push({"a": 1}), real.push("x", prefix="jobs")
    report = import_diskcache(tmp_path / "old", tmp_path / "new", json_disk=True)
    assert report.imported == 2 and not report.left_out
    with dc.Cache(tmp_path / "new", disk=dc.JSONDisk) as cache:
        assert cache.pull()[1] == {"a": 1} and cache.pull(prefix="jobs")[1] == "x"


# -- what is missing, or cannot be read ---------------------------------------------------------


def shards(place: Path, count: int) -> None:
    for shard in range(count):
        old = Old(place / f"{shard:03d}")
        old.add(f"key {shard}", shard)
        old.connection.close()


def test_shards_without_a_database_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards(tmp_path / "fan", 6)
    shutil.rmtree(tmp_path / "fan" / "001")
    (tmp_path / "fan" / "002" / "cache.db").unlink()
    (tmp_path / "fan" / "003" / "cache.db").write_bytes(b"junk" * 1000)
    (tmp_path / "fan" / "004" / "cache.db").write_bytes(b"SQLite format 3\0" + b"junk" * 1000)
    (tmp_path / "fan" / "006").mkdir()
    report = import_diskcache(tmp_path / "fan", tmp_path / "new")
    assert report.imported == 2
    assert [Path(place).name for place in report.damaged] == ["001", "002", "003", "004", "006"]
    assert main(["import-diskcache", str(tmp_path / "fan"), str(tmp_path / "new")]) == 1
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'fan' / '002'} could not be imported: it has no cache.db" in printed


def test_a_shard_that_turns_out_to_be_damaged_does_not_stop_the_others(tmp_path: Path) -> None:
    shards(tmp_path / "fan", 3)
    with sqlite3.connect(tmp_path / "fan" / "001" / "cache.db") as connection:
        connection.executemany("INSERT INTO Cache (key, raw, mode, value) VALUES (?, 1, 1, 'x')", ((n,) for n in range(9000)))
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    with open(tmp_path / "fan" / "001" / "cache.db", "r+b") as file:
        file.seek(100_000)
        file.write(b"\xff" * 30_000)
    report = import_diskcache(tmp_path / "fan", tmp_path / "new")
    (place,) = report.damaged
    assert Path(place).name == "001"
    with dc.Cache(tmp_path / "new") as cache:
        assert cache["key 0"] == 0 and cache["key 2"] == 2


@pytest.mark.parametrize("junk", [b"", b"junk" * 1000, b"SQLite format 3\0" + b"junk" * 1000])
def test_a_single_database_that_is_junk(tmp_path: Path, junk: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "cache.db").write_bytes(junk)
    assert main(["import-diskcache", str(tmp_path / "old"), str(tmp_path / "new")]) == 2
    assert "cache.db" in capsys.readouterr().err and not (tmp_path / "new").exists()


def without_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user who may not make the index of the log in the directory (the superuser may)."""
    connect = sqlite3.connect

    def connected(place: str, **options: Any) -> sqlite3.Connection:
        if place.endswith("?mode=ro"):
            raise sqlite3.OperationalError("unable to open database file")
        return connect(place, **options)

    monkeypatch.setattr(sqlite3, "connect", connected)


def test_a_log_that_has_no_index_is_read(old: Old, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old.add("first", 1)
    old.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    old.add("in the log", 2)
    place = tmp_path / "copy"
    place.mkdir()
    for name in ("cache.db", "cache.db-wal"):
        shutil.copy(old.directory / name, place / name)
    without_index(monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    before = sorted(place.iterdir()), (place / "cache.db-wal").read_bytes(), (place / "cache.db").read_bytes()
    report = import_diskcache(place, tmp_path / "new")
    assert report.imported == 2 and not os.listdir(tmp_path / "temporary")
    assert before == (sorted(place.iterdir()), (place / "cache.db-wal").read_bytes(), (place / "cache.db").read_bytes())
    (tmp_path / "temporary").rmdir()
    with pytest.raises(CacheIOError, match=r"TMPDIR"):
        import_diskcache(place, tmp_path / "newer")


def test_a_log_that_is_a_link_is_not_followed(old: Old, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old.add("a", 1)
    old.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    place = tmp_path / "copy"
    place.mkdir()
    shutil.copy(old.directory / "cache.db", place)
    (tmp_path / "private").write_bytes(b"x" * 100)
    (place / "cache.db-wal").symlink_to(tmp_path / "private")
    without_index(monkeypatch)
    with pytest.raises(CacheIOError):
        import_diskcache(place, tmp_path / "new")


@pytest.mark.parametrize("mode", [2, 3, 4])
@pytest.mark.parametrize("length", [40_000, 3_000_000])
def test_files_that_were_cut_off(old: Old, mode: int, length: int) -> None:
    data = pickle.dumps("x" * length)
    old.add("whole", None, mode=mode, file=data if mode == 4 else b"x" * length)
    old.add("cut off", None, mode=mode, file=(data + b"." if mode == 4 else b"x" * (length - 1)), size=length)
    report = import_diskcache("old", "new")
    assert report.imported == 1 and "has not the length" in next(iter(report.left_out))
    with dc.Cache("new") as cache:
        assert list(cache) == ["whole"]


def test_text_that_diskcache_has_written_has_its_length(tmp_path: Path) -> None:
    with diskcache.Cache(str(tmp_path / "old")) as real:
        real["text"], real["float"] = "ä\n" * 50_000, float("nan")
        real.set("file", io.BytesIO(BIG), read=True)
    report = import_diskcache(tmp_path / "old", tmp_path / "new")
    assert report.imported == 3
    with dc.Cache(tmp_path / "new") as cache:
        assert cache["text"] == "ä\n" * 50_000 and cache["float"] is None and cache["file"] == BIG


def test_what_a_json_disk_has_stored_from_a_file(tmp_path: Path) -> None:
    text = "x" * 30_000 + "ab" * 30_000 + str(os.urandom(60_000))
    with diskcache.Cache(str(tmp_path / "old"), disk=diskcache.JSONDisk) as real:
        real.set("raw", io.BytesIO(b"raw"), read=True, tag="t")
        real.set("big", io.BytesIO(BIG), read=True)
        real["json"] = text
    report = import_diskcache(tmp_path / "old", tmp_path / "new", json_disk=True)
    assert report.imported == 3 and not report.left_out
    with dc.Cache(tmp_path / "new", disk=dc.JSONDisk) as cache:
        assert list(cache) == ["raw", "big", "json"] and cache["json"] == text
        file, tag = cache.get("raw", read=True, tag=True)
        assert (file.read(), tag) == (b"raw", "t") and cache.read("big").read() == BIG


# -- settings, and where the cache is -----------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"size_limit": 10**9}])
def test_the_size_of_shards_is_kept_as_a_whole(tmp_path: Path, given: dict[str, int]) -> None:
    diskcache.FanoutCache(str(tmp_path / "fan"), shards=8, cull_limit=7, **given).close()
    import_diskcache(tmp_path / "fan", tmp_path / "new")
    whole = given.get("size_limit", 1 << 30)
    with dc.FanoutCache(tmp_path / "new", shards=8) as fan:
        assert fan.size_limit == whole // 8 and fan.cull_limit == 7
    with dc.Cache(tmp_path / "new") as cache:
        assert cache.size_limit == whole


def test_settings_that_are_no_good_are_left_out(tmp_path: Path) -> None:
    Old(tmp_path / "old", size_limit="much", eviction_policy="mine", cull_limit=-5).connection.close()
    import_diskcache(tmp_path / "old", tmp_path / "new")
    with dc.Cache(tmp_path / "new") as cache:
        assert (cache.size_limit, cache.eviction_policy, cache.cull_limit) == (2**30, "least-recently-stored", 10)


def test_a_size_without_a_limit(tmp_path: Path) -> None:
    Old(tmp_path / "old", size_limit=float("inf")).connection.close()
    import_diskcache(tmp_path / "old", tmp_path / "new")
    with dc.Cache(tmp_path / "new") as cache:
        assert cache.size_limit == 1 << 62


def test_settings_of_the_import_hold_for_whoever_opens_the_cache(old: Old, tmp_path: Path) -> None:
    given = ["--size-limit", "300MiB", "--eviction", "lfu"]
    assert main(["import-diskcache", "old", "new", *given]) == 0
    for _ in range(2):  # the second time, there is a cache already
        with dc.Cache("new") as cache:
            assert cache.eviction_policy == "least-frequently-used" and cache.size_limit < 300 << 20
        with DiskCache("new") as plain:
            assert 0 <= (300 << 20) - plain.settings.size_limit <= 2 and plain.settings.eviction == "lfu"
        import_diskcache("old", "new", size_limit=300 << 20, eviction="lfu")
    import_diskcache("old", "new", eviction="lru")
    with dc.Cache("new") as cache:
        assert cache.eviction_policy == "least-recently-used" and cache.size_limit < 300 << 20
    import_diskcache("old", "small", size_limit=1 << 20)
    with dc.Cache("small") as cache:
        assert 0 < cache.size_limit < 1 << 20


def test_neither_directory_may_be_within_the_other(old: Old, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "old")
    (tmp_path / "around").mkdir()
    (tmp_path / "around" / "old").symlink_to(tmp_path / "old")
    (tmp_path / "old" / "inner").mkdir()
    for inner in ("old/new", "old/a/b/new", "link/new", "old", "link", "around/old/new"):
        with pytest.raises(ConfigurationError, match="within"):
            import_diskcache("old", inner)
    with pytest.raises(ConfigurationError, match="within"):
        import_diskcache("old", tmp_path)
    assert main(["import-diskcache", "old", "old/new"]) == 2 and "within" in capsys.readouterr().err
    assert sorted(os.listdir("old"))[-1] == "inner"
    assert import_diskcache("old", "older").total == 0


# -- the report ---------------------------------------------------------------------------------


def test_the_report_as_json_names_what_was_left_out(old: Old, capsys: pytest.CaptureFixture[str]) -> None:
    old.add("b", pickle.dumps(collections.Counter()), mode=4)
    assert main(["import-diskcache", "old", "new", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert list(report["left_out"].values()) == [1] and list(report["examples"].values()) == [["'b'"]]


def test_examples_are_keys_and_not_pickles(old: Old) -> None:
    bad = pickle.dumps(collections.Counter())
    path = "/srv/" + "/".join(f"part{n}" for n in range(100))
    for key in (("f", path, None), ("f", 1, (2, [3])), [[[[[[[[1]]]]]]]]):
        old.add(pickle.dumps(key), bad, raw=0, mode=4)
    old.add(b"\x80\x04" + SHARED + b".", bad, raw=0, mode=4)
    old.add(path, bad, mode=4)
    (reason, *_), (examples, *_) = zip(*import_diskcache("old", "new").examples.items(), strict=True)
    assert examples[0].startswith("('f', '/srv/part0/part1/") and examples[0].endswith("...") and len(examples[0]) < 300
    assert examples[1] == "('f', 1, (2, [3]))" and examples[-1].startswith("'/srv/part0/part1/")
    assert all(len(one) < 300 for one in examples)


def test_evictions_are_no_success(old: Old, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(400):
        old.add(f"n{n}", os.urandom(10_000))
    assert main(["import-diskcache", "old", "new", "--size-limit", "1MiB"]) == 1
    assert "size limit" in capsys.readouterr().out


def test_a_secret_that_is_no_good_stops_the_import(old: Old, users_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(3):
        old.add(f"b{n}", pickle.dumps(collections.Counter()), mode=4)
    path = users_data / "yatagarasu_cache" / "pickle-secret"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"short")
    path.chmod(0o600)
    assert main(["import-diskcache", "old", "new", "--allow-pickle"]) == 2
    assert capsys.readouterr().err.count("holds no key to sign pickles with") == 1


def test_an_interrupted_import_says_how_it_goes_on(
    old: Old, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    old.add("a", 1)
    monkeypatch.setattr(importer._Import, "take_over", interrupted)
    assert main(["import-diskcache", "old", "new"]) == 130
    assert "begin it again" in capsys.readouterr().err


# -- pickles that would take for ever -----------------------------------------------------------


def chain(depth: int) -> bytes:
    """Sets in sets: to compare two that were made apart takes 2**depth steps."""
    data = b"(\x91"
    for _ in range(depth):
        data += b"q\x000((h\x00K\x01\x91(h\x00K\x02\x91\x91"
    return data


FORMS = [b"(%b%b\x91.", b"\x8f(%b%b\x90.", b"\x8f(%b\x90(%b\x90.", b"(%bN%bNd.", b"}(%bN%bNu.", b"}%bNs%bNs."]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrap", [b"%b", b"%b\x85", b"(K\x05%bt"])
def test_sets_in_sets_do_not_take_for_ever(form: bytes, wrap: bytes) -> None:
    began = time.monotonic()
    with pytest.raises(NotPlain, match="compare"):
        loads(b"\x80\x04" + form % (wrap % chain(40), wrap % chain(40)))
    assert time.monotonic() - began < 1
    loads(b"\x80\x04" + form % (wrap % chain(3), b"N"))


def test_others_go_on_where_a_set_would_take_for_ever(old: Old) -> None:
    began = time.monotonic()
    old.add("bad", b"\x80\x04(" + chain(40) + chain(40) + b"\x91.", mode=4)
    old.add("ok", 1)
    report = import_diskcache("old", "new")
    assert report.imported == 1 and sum(report.left_out.values()) == 1 and time.monotonic() - began < 10


def of_one_hash(count: int) -> list[int]:
    return [n * (2**61 - 1) for n in range(1, count + 1)]


@pytest.mark.parametrize("make", [set, frozenset, dict.fromkeys, lambda keys: {(key,) for key in keys}])
@pytest.mark.parametrize("protocol", [4, 5])
def test_members_of_one_hash_are_bounded(make: Any, protocol: int) -> None:
    few = make(of_one_hash(1000))
    assert loads(pickle.dumps(few, protocol)) == few
    made = b"".join(b"(\x8a\x0a" + one.to_bytes(10, "little") + b"\x90" for one in of_one_hash(20_000))
    began = time.monotonic()
    with pytest.raises(NotPlain, match="compare"):
        loads(b"\x80\x04\x8f" + made + b".")
    assert time.monotonic() - began < 5


def test_a_key_that_comes_again_and_again() -> None:
    for twice in (b"}(K\x01NK\x01Nu.", b"(K\x01K\x01\x91.", b"}K\x01NsK\x01Ns.", b"(\x8c\x01aq\x00h\x00\x91."):
        with pytest.raises(NotPlain, match="twice"):
            loads(b"\x80\x04" + twice)


def test_large_sets_are_read(old: Old) -> None:
    value = [set(range(100_000)), {f"k{n}": n for n in range(50_000)}, {(n, str(n)) for n in range(50_000)}, {1.5, None, 2**70}]
    assert loads(pickle.dumps(value)) == value


# -- sets and bytes of old protocols ------------------------------------------------------------


@given(plain, st.integers(0, 5))
def test_sets_and_bytes_of_each_protocol(value: Any, protocol: int) -> None:
    assert loads(pickle.dumps(value, protocol)) == value
    assert loads(pickle.dumps((value, [value]), protocol)) == (value, [value])


@pytest.mark.parametrize(
    "data",
    [b"cbuiltins\nset\n.", b"]cbuiltins\nset\na.", b"cbuiltins\nset\n]cbuiltins\nset\na\x85R.", b"cbuiltins\neval\n(X\x01\0\0\01tR.",
     b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR.", b"cbuiltins\nset\n(](K\x01K\x01e\x85R.", b"c_codecs\nencode\n(X\x01\0\0\0xX\x05\0\0\0utf-8tR.",
     b"c_codecs\nencode\n20.", b"cbuiltins\nset\n\x8c\x01aR.", b"NNR.", b"c_codecs\nencode\n(X\x01\0\0\0\xff\xff.",
     b"](K\x01K\x02K\x03eq\x00cbuiltins\nset\nq\x010(" + b"h\x01h\x00\x85R" * 5000 + b"t."],
)  # fmt: skip
def test_calls_that_are_none_of_these(data: bytes) -> None:
    with pytest.raises(NotPlain):
        loads(data)
