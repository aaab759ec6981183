"""Numbers for new segments and logs, and the files that have them."""

from __future__ import annotations

import errno

from ..errors import StorageFull
from .cache_files import CacheFiles
from .current import ATTEMPTS, CurrentIndex
from .recovery import has_room_for_table


class SegmentTable:
    """Segments that are begun, by this handle. The lock is held."""

    def __init__(self, files: CacheFiles, current: CurrentIndex) -> None:
        self._files, self._current = files, current

    def new_segment(self) -> int:
        """A number for a new segment or log. The lock is held; the index may be another one afterwards."""
        segment = self._current.index.next_segment_id()
        if segment is None and has_room_for_table(self._current.index):
            self._current.remake(2 * self._current.index.table_capacity)
            segment = self._current.index.next_segment_id()
        if segment is None:
            raise StorageFull(errno.ENOSPC, "there are more segments than can be listed: raise segment_size")
        return segment

    def new_file(self) -> tuple[int, int]:
        """`new_segment`, and a descriptor of its file, which this makes: past files that nobody lists."""
        for _ in range(ATTEMPTS):
            segment = self.new_segment()
            path = self._files.segments.path(segment)
            try:
                return segment, self._files.new_file(path)
            except FileExistsError:
                pass
        raise FileExistsError(errno.EEXIST, "there are files that are not of this cache: run check()", path)

    def give_up(self, segment: int, fd: int) -> None:
        """One that was not begun to its end: maybe listed already. The lock is held."""
        self._files.backend.let_go(fd)
        self._files.backend.clear_away(self._files.segments.path(segment))
        self._current.complete_begun()
        if self._current.index.state(segment):
            self._current.index.drop_segment(segment)
