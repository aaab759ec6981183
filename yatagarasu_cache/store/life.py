"""How far a handle has come: opened, closed, released; and what may be asked of it then."""

from __future__ import annotations

from ..errors import ClosedError, ReadOnlyError


class Life:
    """The state that all parts of a handle go by."""

    def __init__(self, root: str, read_only: bool) -> None:
        self._root, self.read_only = root, read_only
        self.usable = False  # it was opened, to the end
        self.closed = False
        self.released = True  # there is nothing to be closed, or not any more
        self.interrupted = False  # and maybe something left half done by that

    def ensure_open(self) -> None:
        if self.closed:
            raise self.closed_error()

    def ensure_writable(self, doing: str) -> None:
        if self.read_only:
            raise ReadOnlyError(f"cannot {doing}: the cache in {self._root!r} was opened with read_only=True")
        self.ensure_open()

    def closed_error(self) -> ClosedError:
        return ClosedError(f"the cache in {self._root!r} is closed: open it anew")
