"""What is said of an index that can't be believed."""

from __future__ import annotations


class IndexDamaged(Exception):
    """The index contradicts itself: it has to be rebuilt from the segments."""
