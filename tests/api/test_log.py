"""The logger of the package: silent where nobody asked, and without keys."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from helpers import run_python

from yatagarasu_cache import DiskCache
from yatagarasu_cache.log import NAME, log, without_key

LOST = """
import sys
sys.stderr = sys.stdout
from yatagarasu_cache import DiskCache
DiskCache(sys.argv[1], backend="threads")["k"] = 1
"""


def test_the_logger_has_a_handler_that_does_nothing() -> None:
    assert log is logging.getLogger(NAME)
    assert any(isinstance(handler, logging.NullHandler) for handler in log.handlers)
    assert log.propagate and log.level == logging.NOTSET  # what is said goes where the application wants it


@pytest.mark.parametrize("configured", [False, True])
def test_nothing_is_printed_unless_logging_is_configured(tmp_path: Path, configured: bool) -> None:
    with DiskCache(tmp_path / "cache", backend="threads") as cache:
        cache["k"] = b"v"
    (tmp_path / "cache" / "index").unlink()  # it is recovered, which is a warning
    code = LOST.replace("from", "import logging; logging.basicConfig()\nfrom", 1) if configured else LOST
    printed = run_python(code, tmp_path / "cache")
    assert ("recovering it from the segments" in printed) is configured


def test_an_error_without_its_key() -> None:
    error = ValueError("the value of 'secret' cannot be read: odd")
    assert without_key(error) == str(error)
    error.without_key = "a value cannot be read: odd"  # type: ignore[attr-defined]
    assert "secret" not in without_key(error)
