"""The file system of fsspec that keeps blocks of another one's files."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

fsspec = pytest.importorskip("fsspec")

from fsspec.implementations.memory import MemoryFileSystem  # noqa: E402

from yatagarasu_cache import ClosedError, ConfigurationError  # noqa: E402
from yatagarasu_cache.errors import CacheIOError  # noqa: E402
from yatagarasu_cache.integrations.fsspec import YatagarasuFileSystem  # noqa: E402

DATA = bytes(range(256)) * 40  # 10,240 bytes
BLOCK = 1000


class Counting(MemoryFileSystem):
    """Files in memory, that knows what was asked of it."""

    protocol = "counting"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    asked: list[tuple[Any, ...]] = []

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self.asked.append((path, start, end))
        return bytes(super().cat_file(path, start, end, **kwargs))

    def info(self, path: str, **kwargs: Any) -> Any:
        self.asked.append(("info", path))
        return super().info(path, **kwargs)


@pytest.fixture
def target() -> Any:
    Counting.store.clear()
    Counting.pseudo_dirs[:] = [""]
    Counting.asked.clear()
    fs = Counting(skip_instance_cache=True)
    fs.pipe("/dir/file", DATA)
    return fs


def blocks(target: Any, tmp_path: Path, **options: Any) -> YatagarasuFileSystem:
    given = {"cache_storage": str(tmp_path / "blocks"), "block_size": BLOCK, "skip_instance_cache": True, **options}
    return YatagarasuFileSystem(fs=target, **given)


@pytest.fixture(autouse=True)
def nothing_ahead(monkeypatch: Any) -> None:
    monkeypatch.setattr("yatagarasu_cache.integrations.fsspec._AHEAD", BLOCK)


def fetched(target: Any) -> list[tuple[int, int]]:
    """And forget it."""
    found = [(start, end) for path, start, end in (one for one in target.asked if one[0] != "info")]
    target.asked.clear()
    return found


def test_only_blocks_that_are_missing_are_fetched(target: Any, tmp_path: Path) -> None:
    fs = blocks(target, tmp_path)
    assert fs.cat_file("/dir/file", 2500, 4200) == DATA[2500:4200]
    assert fetched(target) == [(2000, 5000)]  # together
    assert fs.cat_file("/dir/file", 1999, 5001) == DATA[1999:5001]
    assert fetched(target) == [(1000, 2000), (5000, 6000)]
    for start, end in ((None, None), (-300, None), (10_000, None), (5, 5), (20_000, 30_000), (None, -10_000), (0, 10_240)):
        assert fs.cat_file("/dir/file", start, end) == DATA[start:end]
    assert fs.cat("/dir/file") == DATA
    target.asked.clear()
    with fs.open("/dir/file") as file:
        assert file.read(100) == DATA[:100] and file.seek(-50, 2) == len(DATA) - 50 and file.read() == DATA[-50:]
        assert file.seek(999) == 999 and file.read(3) == DATA[999:1002]
    assert fetched(target) == []
    assert fs.cat_ranges(["/dir/file"] * 2, [0, 5], [3, 9]) == [DATA[:3], DATA[5:9]]
    assert fs.read_block("/dir/file", 10, 20) == DATA[10:30] and fs.head("/dir/file", 4) == DATA[:4] and fs.tail("/dir/file", 4) == DATA[-4:]


def test_some_of_what_follows_is_fetched_as_well(target: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("yatagarasu_cache.integrations.fsspec._AHEAD", 4 * BLOCK)
    fs = blocks(target, tmp_path)
    with fs.open("/dir/file") as file:
        assert b"".join(iter(lambda: file.read(100), b"")) == DATA
    assert fetched(target) == [(0, 4000), (4000, 8000), (8000, 10_240)]


def test_lines_are_read_from_a_block_that_is_held(target: Any, tmp_path: Path, monkeypatch: Any) -> None:
    fs = blocks(target, tmp_path)
    target.pipe("/dir/lines", b"".join(b"line %d\n" % i for i in range(500)))
    looks: list[Any] = []
    real = fs._look_up
    monkeypatch.setattr(fs, "_look_up", lambda keys: looks.append(keys) or real(keys))
    with fs.open("/dir/lines") as file:
        assert list(file) == [b"line %d\n" % i for i in range(500)]
    assert len(looks) < 15


def test_an_empty_file_and_one_that_is_missing(target: Any, tmp_path: Path) -> None:
    fs = blocks(target, tmp_path)
    target.pipe("/dir/empty", b"")
    assert fs.cat("/dir/empty") == b"" and fs.open("/dir/empty").read() == b""
    for ask in (fs.cat_file, fs.open, fs.info):
        with pytest.raises(FileNotFoundError):
            ask("/dir/none")
    with pytest.raises((IsADirectoryError, FileNotFoundError)):
        fs.cat_file("/dir")


def test_all_else_is_asked_of_the_other_one(target: Any, tmp_path: Path) -> None:
    fs = blocks(target, tmp_path)
    assert fs.ls("/dir", detail=False) == ["/dir/file"] and fs.glob("/dir/*") == ["/dir/file"] and fs.find("/") == ["/dir/file"]
    assert fs.exists("/dir/file") and fs.isdir("/dir") and fs.isfile("/dir/file") and fs.size("/dir/file") == len(DATA)
    fs.get("/dir/file", str(tmp_path / "got"))
    assert (tmp_path / "got").read_bytes() == DATA
    fs.mkdir("/other")
    fs.put(str(tmp_path / "got"), "/other/put")
    assert target.cat("/other/put") == DATA
    mapper = fs.get_mapper("/dir")
    assert mapper["file"] == DATA and list(mapper) == ["file"]


@pytest.mark.parametrize("change", [
    lambda fs: fs.pipe_file("/dir/file", b"new"), lambda fs: fs.pipe({"/dir/file": b"new"}), lambda fs: fs.open("/dir/file", "wb").__enter__().write(b"new"),
    lambda fs: fs.rm("/dir", recursive=True), lambda fs: fs.mv("/dir/file", "/dir/moved"), lambda fs: fs.cp_file("/dir/other", "/dir/file"),
], ids=["pipe_file", "pipe", "open", "rm", "mv", "cp"])  # fmt: skip
def test_what_is_changed_through_it_is_not_read_from_the_cache(target: Any, tmp_path: Path, change: Any) -> None:
    fs = blocks(target, tmp_path)
    target.pipe("/dir/other", b"new")
    assert fs.cat("/dir/file") == DATA
    file = change(fs)
    if file is not None and hasattr(file, "close"):
        file.close()
    try:
        assert fs.cat("/dir/file") == target.cat("/dir/file") != DATA
    except FileNotFoundError:
        assert not target.exists("/dir/file")


def test_files_are_written_through(target: Any, tmp_path: Path) -> None:
    fs = blocks(target, tmp_path)
    assert fs.cat("/dir/file") == DATA
    with fs.open("/dir/file", "wb") as file:
        file.write(b"written")
    assert target.cat("/dir/file") == b"written" == fs.cat("/dir/file")
    with fs.open("/dir/text", "w") as file:
        file.write("é")
    with fs.open("/dir/text", "r", encoding="utf-8") as file:
        assert file.read() == "é"


def test_a_file_is_believed_for_a_time(target: Any, tmp_path: Path) -> None:
    fs, checking = blocks(target, tmp_path), blocks(target, tmp_path, check_files=True)
    assert fs.cat("/dir/file") == DATA
    target.pipe("/dir/file", b"other")
    assert fs.cat("/dir/file") == DATA  # it was told so for a week
    assert checking.cat("/dir/file") == b"other" == fs.cat("/dir/file")
    target.asked.clear()
    assert checking.cat("/dir/file") == b"other" and fetched(target) == []
    soon = blocks(target, tmp_path / "soon", expiry_time=1e-9)
    assert soon.cat("/dir/file") == b"other" and len(soon.cache) == 0
    forever = blocks(target, tmp_path / "forever", expiry_time=None)
    assert forever.cat("/dir/file") == b"other"
    assert {entry.expires for entry in forever.cache.entries()} == {None}


def test_a_reader_survives_eviction(target: Any, tmp_path: Path) -> None:
    fs = blocks(target, tmp_path)
    with fs.open("/dir/file", cache_type="none") as file:
        assert file.read(1500) == DATA[:1500]
        fs.clear_cache()
        assert file.read(1000) == DATA[1500:2500]
        for entry in list(fs.cache.entries()):
            fs.cache.delete(entry.key)
        file.seek(0)
        assert file.read() == DATA


def test_it_is_bounded(target: Any, tmp_path: Path) -> None:
    fs = blocks(target, tmp_path, size_limit=1 << 20, block_size=1 << 14)
    for i in range(8):
        target.pipe(f"/dir/{i}", os.urandom(1 << 19))
    for i in range(8):
        assert fs.cat(f"/dir/{i}") == target.cat(f"/dir/{i}")
    assert fs.cache_size() <= 1 << 20 and fs.cache.stats().evictions > 0


def test_what_is_damaged_or_forged_is_fetched_again(target: Any, tmp_path: Path) -> None:
    fs = blocks(target, tmp_path)
    assert fs.cat("/dir/file") == DATA
    for entry in list(fs.cache.entries(prefix=("fsspec block",))):
        fs.cache[entry.key] = b"too short" if entry.key[-1] % 2 else 5  # type: ignore[index, operator]
    assert fs.cat("/dir/file") == DATA
    for entry in list(fs.cache.entries(prefix=("fsspec",))):
        fs.cache[entry.key] = "nonsense"
    assert fs.cat("/dir/file") == DATA


def test_a_cache_that_fails_is_no_reason_to_fail(target: Any, tmp_path: Path, monkeypatch: Any) -> None:
    fs = blocks(target, tmp_path)
    assert fs.cat("/dir/file") == DATA

    def fail(*_: Any, **__: Any) -> Any:
        raise CacheIOError(5, "the disk fails")

    monkeypatch.setattr(type(fs.cache), "get_many", fail)
    monkeypatch.setattr(type(fs.cache), "set_many", fail)
    assert fs.cat("/dir/file") == DATA and fs.open("/dir/file").read() == DATA


def test_one_that_changes_while_it_is_read_is_no_mixture(target: Any, tmp_path: Path) -> None:
    fs = blocks(target, tmp_path)
    with fs.open("/dir/file", cache_type="none") as file:
        assert file.read(1500) == DATA[:1500]
        target.pipe("/dir/file", b"short")
        with pytest.raises(OSError, match="changed while it was read"):
            file.read()
    assert fs.cat("/dir/file") == b"short"


def test_targets_are_told_apart(tmp_path: Path) -> None:
    Counting.store.clear()
    first, second = Counting(endpoint="a", skip_instance_cache=True), Counting(endpoint="b", skip_instance_cache=True)
    first.pipe("/x", b"one")
    assert blocks(first, tmp_path).cat("/x") == b"one"
    second.pipe("/x", b"two")
    assert blocks(second, tmp_path).cat("/x") == b"two" and blocks(first, tmp_path).cat("/x") == b"one"


def test_chained_urls_and_pickles(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(DATA)
    options = {"yatagarasu": {"cache_storage": str(tmp_path / "blocks"), "block_size": BLOCK}}
    url = f"yatagarasu::file://{path}"
    with fsspec.open(url, "rb", **options) as file:
        assert file.read(10) == DATA[:10]
        other = pickle.loads(pickle.dumps(file))
        assert other.tell() == 10 and other.read(1000) == DATA[10:1010]
    fs, name = fsspec.url_to_fs(url, **options)
    assert type(fs) is YatagarasuFileSystem and name == str(path) and fs.cat(name) == DATA
    again = pickle.loads(pickle.dumps(fs))
    assert again == fs and again.cat(name) == DATA and again.cache is fs.cache
    assert fsspec.get_filesystem_class("yatagarasu") is YatagarasuFileSystem
    assert [file.path for file in fsspec.open_files(f"yatagarasu::file://{tmp_path}/*.txt", **options)] == [str(path)]


def test_temporary_storage(target: Any) -> None:
    fs = YatagarasuFileSystem(fs=target, skip_instance_cache=True)
    assert fs.cat("/dir/file") == DATA
    directory = fs.cache_storage
    assert os.path.isdir(directory)
    fs._use.close()
    with pytest.raises(ClosedError):
        fs.cat("/dir/file")
    del fs
    gc.collect()
    assert not os.path.exists(directory)


def test_arguments(target: Any, tmp_path: Path) -> None:
    for wrong in ({}, {"fs": target, "target_protocol": "memory"}, {"fs": target, "block_size": 0}):
        with pytest.raises(ValueError, match="target_protocol|block_size"):
            YatagarasuFileSystem(skip_instance_cache=True, **wrong)
    with pytest.raises(ConfigurationError, match="size_limit"):
        blocks(target, tmp_path, size_limit="much")


READER = """
import fsspec, sys
options = {"cache_storage": sys.argv[2], "block_size": 1000}
with fsspec.open("yatagarasu::file://" + sys.argv[1], "rb", yatagarasu=options) as file:
    data = file.read()
    fs = file.fs
assert data == bytes(range(256)) * 40
print(fs.cache.stats().process["sets"])
"""


def test_processes_share_blocks(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    command = [sys.executable, "-c", READER, str(path), str(tmp_path / "blocks")]
    assert [int(subprocess.check_output(command)) for _ in range(3)] == [12, 0, 0]
    together = [subprocess.Popen([*command[:-1], str(tmp_path / "other")]) for _ in range(3)]
    assert [process.wait(60) for process in together] == [0] * 3
