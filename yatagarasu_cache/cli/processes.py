"""Who has a cache open, as far as the system tells: what /proc says of other processes' files.

Nothing of the cache is opened, locked or touched for that: a process that uses a cache holds its directory
open, and one that may write holds a lock on its file `users`. The first is seen of processes of this user,
and of all by root; the second is seen of all, for /proc/locks hides nothing but other containers.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from ..store.format import USERS_NAME

__all__ = ["Process", "processes_of"]

PROC = "/proc"
UNKNOWN = "?"


class Process(NamedTuple):
    """One that has a cache open."""

    pid: int
    name: str  # of its program, as the system shortens it; "?" where it does not tell

    def __str__(self) -> str:
        return f"{self.name}({self.pid})"


Identity = tuple[int, int]  # device and inode


def processes_of(directory: str, proc: str = PROC) -> list[Process] | None:
    """Those that have the cache in `directory` open, without this one; None where the system is silent."""
    here = identity_of(directory)
    if here is None or not os.path.isdir(os.path.join(proc, "self", "fd")):
        return None
    users = identity_of(os.path.join(directory, USERS_NAME))
    found = {pid for pid in pids(proc) if has_open(proc, pid, here)}
    if users is not None:
        found |= lockers(proc, users)
    found.discard(os.getpid())
    return [Process(pid, name_of(proc, pid)) for pid in sorted(found)]


def identity_of(path: str) -> Identity | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def pids(proc: str) -> list[int]:
    try:
        return [int(name) for name in os.listdir(proc) if name.isdecimal()]
    except OSError:
        return []


def has_open(proc: str, pid: int, wanted: Identity) -> bool:
    """Whether a process has a directory open. Not by its path: containers see it under others."""
    place = os.path.join(proc, str(pid), "fd")
    try:
        names = os.listdir(place)
    except OSError:  # it has ended, or is another user's
        return False
    for name in names:
        path = os.path.join(place, name)
        try:
            # Sockets, pipes and the like are left out: their links do not begin so, and they are many.
            if os.readlink(path).startswith("/") and identity_of(path) == wanted:
                return True
        except OSError:
            continue
    return False


def lockers(proc: str, wanted: Identity) -> set[int]:
    """Processes that hold a lock on a file: ``1: FLOCK ADVISORY READ 4711 fd:01:1234 0 EOF``."""
    found = set()
    try:
        with open(os.path.join(proc, "locks"), encoding="ascii", errors="replace") as lines:
            for line in lines:
                words = line.split()
                if "->" in words or len(words) < 6:  # who waits for a lock holds none
                    continue
                major, minor, inode = words[5].split(":")
                if (os.makedev(int(major, 16), int(minor, 16)), int(inode)) == wanted and int(words[4]) > 0:
                    found.add(int(words[4]))
    except (OSError, ValueError):
        pass
    return found


def name_of(proc: str, pid: int) -> str:
    try:
        with open(os.path.join(proc, str(pid), "comm"), encoding="utf-8", errors="replace") as file:
            return file.read().strip() or UNKNOWN
    except OSError:
        return UNKNOWN
