"""Marks of the tests of the ring and its backend, which come in several files."""

from __future__ import annotations

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    """The ring is driven through cffi, the same on every Python; what is built on it is not."""
    if item.path.name.startswith(("test_ring", "test_uring")):
        item.add_marker(pytest.mark.compiled)
    if item.path.name.startswith("test_ring"):
        item.add_marker(pytest.mark.once)
