"""Large files without an entry: this handle is storing them, or removing them. They count as well.

A handle notes what it has under way in its mark of life, at every change, under the index lock. So what
all large files take is always known, to the byte: those of entries, and what living handles have under
way. What a dead handle, or an interrupted call, had under way counts no more; the note tells whether it may
have left a file to look for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..concurrency.interruption import ours
from . import format as f
from .index import Index
from .owners import Owner


class Stream(Protocol):
    """A large value that a thread is storing; `length` of its bytes are counted."""

    thread: int
    length: int
    pointer: int  # in the name of its file, made or not; 0 before `grow`, and once it has an entry


@dataclass(frozen=True, eq=False)
class LargeFile:
    """What its name is made of, and the bytes that it takes. Equal to itself only."""

    low: int
    high: int
    pointer: int | None  # None: unreadable; the file is found later, as one without an entry
    size: int


class UnderWay:
    """What one handle has under way. Methods are called under the index lock, unless they say otherwise."""

    def __init__(self, owner: Owner, index: Callable[[], Index], unnoted: Callable[[OSError], None]) -> None:
        self._owner, self._index, self._unnoted = owner, index, unnoted
        self._streams: set[Stream] = set()
        self._leaving: dict[LargeFile, int] = {}  # and the thread that is about to remove it
        self._bytes_storing = self._bytes_leaving = 0  # as noted
        self.lost = False  # something that was forgotten still counts

    def __bool__(self) -> bool:
        return bool(self._streams or self._leaving)

    # -- storing ------------------------------------------------------------------------------

    def begin(self, stream: Stream) -> None:
        """Without the lock: nothing of it counts yet."""
        self._streams.add(stream)

    def grow(self, stream: Stream, length: int) -> None:
        """It is to have `length` bytes: they count from now on.

        The first call gives it the pointer for its name: others spare the file until it has an entry, or
        we are gone.
        """
        stream.pointer = stream.pointer or self._index().stamp()
        self._count(stream, f.file_bytes(length) - f.file_bytes(stream.length), length)

    def stored(self, stream: Stream, replaced: Sequence[LargeFile]) -> None:
        """It has an entry now, and counts there; files whose entries it replaced are to be removed."""
        length, stream.length, stream.pointer = stream.length, 0, 0
        self._leave(replaced, -f.file_bytes(length))

    def give_up(self, stream: Stream) -> None:
        """Its file is gone, and counts no more. No change if it was forgotten before, by an interruption."""
        if stream in self._streams:
            stream.pointer = 0
            self._count(stream, -f.file_bytes(stream.length), 0)

    def end(self, stream: Stream) -> None:
        """Without the lock: nothing of it counts any more, or it has an entry."""
        self._streams.discard(stream)

    def _count(self, stream: Stream, grown: int, length: int) -> None:
        words = self._index().words
        words[f.W_BUSY] = f.BUSY_STORING  # if we die in between, all is counted anew
        self._note(grown, 0)
        self._index().add(f.W_LARGE_BYTES, grown)
        stream.length = length
        words[f.W_BUSY] = 0

    # -- removing -----------------------------------------------------------------------------

    def leave(self, files: Sequence[LargeFile]) -> None:
        """Their entries are about to be removed, and then the files: until then they count."""
        if files:
            self._leave(files, 0)

    def _leave(self, files: Sequence[LargeFile], storing: int) -> None:
        thread, size = threading.get_ident(), 0
        for file in files:
            self._leaving[file] = thread
            size += file.size
        words = self._index().words
        self._note(storing, size)
        words[f.W_LEAVING] = min(words[f.W_LEAVING] + size, f.MASK64)

    def left(self, files: Sequence[LargeFile], *, removed: bool = True) -> None:
        """They are gone, or, if not `removed`, they stay. Those that were forgotten meanwhile don't count."""
        size = 0
        for file in files:
            if file in self._leaving:
                size += file.size
        if size:
            words = self._index().words
            words[f.W_BUSY] = f.BUSY_STORING
            self._note(0, -size)
            give_up(words, size) if removed else _stay(words, size)
            words[f.W_BUSY] = 0
        for file in files:
            self._leaving.pop(file, None)

    # -- what did not come to its end ---------------------------------------------------------

    def forget_own(self) -> None:
        """Without the lock: whatever this thread had under way was interrupted."""
        thread = threading.get_ident()
        for stream in list(self._streams):
            if stream.thread == thread:
                self.lost = True
                self._streams.discard(stream)
        for file, remover in list(self._leaving.items()):
            if remover == thread:
                self.lost = True
                self._leaving.pop(file, None)

    def recall(self) -> bool:
        """Note what is really under way. True if something that was forgotten still counts."""
        lost, self.lost = self.lost, False
        storing = sum(f.file_bytes(stream.length) for stream in list(self._streams))
        self._bytes_storing, self._bytes_leaving = storing, sum(file.size for file in list(self._leaving))
        self._note(0, 0)
        return lost

    def forget_all(self) -> None:
        """Nothing under way will be completed: the handle is closed, alone, and leftovers are removed."""
        self.after_fork()
        self._note(0, 0)

    def count_anew(self) -> None:
        """Count, exactly, what large files take."""
        count_anew(self._owner, self._index())

    def after_fork(self) -> None:
        """What is under way is the parent's."""
        self._streams, self._leaving = set(), {}
        self._bytes_storing = self._bytes_leaving = 0

    def _note(self, storing: int, leaving: int) -> None:
        """Note that so much more, or less, is under way. If that fails and we die, nobody looks for it."""
        self._bytes_storing += storing
        self._bytes_leaving += leaving
        named = tuple(stream.pointer for stream in list(self._streams) if stream.pointer)
        try:
            self._owner.note_under_way(max(0, self._bytes_storing), max(0, self._bytes_leaving), named)
        except ours(OSError) as error:
            self._unnoted(error)


def count(owner: Owner, index: Index) -> tuple[int, int]:
    """What large files take, exactly: those of entries, and what is under way; and how much of it is being
    removed. The lock is held."""
    notes = owner.notes_of_living()
    leaving = sum(note.leaving for note in notes)
    storing = sum(note.storing for note in notes)
    return index.large_bytes() + storing + leaving, leaving


def count_anew(owner: Owner, index: Index) -> None:
    """Put that into the index. The lock is held."""
    total, leaving = count(owner, index)
    index.words[f.W_LARGE_BYTES], index.words[f.W_LEAVING] = min(total, f.MASK64), min(leaving, f.MASK64)


def give_up(words: memoryview, size: int) -> None:
    """Large files of `size` bytes that were being removed count no more."""
    leaving, counted = words[f.W_LEAVING], words[f.W_LARGE_BYTES]
    if leaving > counted:  # damage
        leaving = size
    gone = min(size, leaving)
    words[f.W_LEAVING], words[f.W_LARGE_BYTES] = leaving - gone, max(0, counted - gone)


def _stay(words: memoryview, size: int) -> None:
    words[f.W_LEAVING] = max(0, words[f.W_LEAVING] - size)
