"""Marks of the tests of the compiled core, which come in several files."""

from __future__ import annotations

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.path.name.startswith("test_core"):
        item.add_marker(pytest.mark.compiled)
