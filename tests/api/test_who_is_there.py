"""Who has a cache open: what is made of /proc, real or not."""

from __future__ import annotations

import os
from pathlib import Path

from yatagarasu_cache.cli.processes import Process, lockers, processes_of


def a_process(proc: Path, pid: int, name: str, *targets: Path) -> None:
    (proc / str(pid) / "fd").mkdir(parents=True)
    (proc / str(pid) / "comm").write_text(name + "\n")
    for number, target in enumerate(targets):
        (proc / str(pid) / "fd" / str(number)).symlink_to(target)


def test_who_has_the_directory_open_is_there(tmp_path: Path) -> None:
    proc, cache, other = tmp_path / "proc", tmp_path / "cache", tmp_path / "other"
    cache.mkdir()
    other.mkdir()
    a_process(proc, 12, "gunicorn", Path("socket:[1]"), other, cache)
    a_process(proc, 7, "worker", cache)
    a_process(proc, 8, "elsewhere", other)
    a_process(proc, os.getpid(), "myself", cache)
    (proc / "9").mkdir()  # of another user
    (proc / "self").symlink_to(str(os.getpid()))
    assert processes_of(str(cache), str(proc)) == [Process(7, "worker"), Process(12, "gunicorn")]
    assert str(Process(7, "worker")) == "worker(7)"


def test_who_holds_the_lock_of_users_is_there(tmp_path: Path) -> None:
    file = tmp_path / "users"
    file.touch()
    status = file.stat()
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    lines = [
        f"1: FLOCK  ADVISORY  READ  4711 {place} 0 EOF",
        f"1: -> FLOCK  ADVISORY  WRITE 4712 {place} 0 EOF",
        f"2: OFDLCK ADVISORY  READ  -1 {place} 0 EOF",
        "3: POSIX  ADVISORY  WRITE 4713 00:01:1 0 EOF",
    ]
    (tmp_path / "locks").write_text("\n".join(lines) + "\n")
    assert lockers(str(tmp_path), (status.st_dev, status.st_ino)) == {4711}
    (tmp_path / "locks").write_text("what is this\n")
    assert lockers(str(tmp_path), (1, 1)) == set()


def test_where_there_is_no_proc_nobody_knows(tmp_path: Path) -> None:
    assert processes_of(str(tmp_path), str(tmp_path / "none")) is None
    assert processes_of(str(tmp_path / "missing")) is None
