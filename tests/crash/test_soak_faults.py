"""The soak whose processes are killed and worse: it comes to its end, and it sees what it is there to see."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # perf is not installed


from available import CORES  # noqa: E402

from perf.soak.faults import ABSENT, EXPIRING, PRESENT, Driver, complaint, kind_of, value_for  # noqa: E402
from yatagarasu_cache import DiskCache  # noqa: E402


@pytest.mark.parametrize("core", CORES)
def test_a_short_soak_with_faults(tmp_path: Path, core: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "perf.soak.faults", "--minutes", "0.1", "--processes", "4", "--core", core,
         "--directory", str(tmp_path / "cache")],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every value was right, nothing is left over" in done.stdout
    for what in ("operations", "kills"):
        found = re.search(rf"([\d,]+) {what}", done.stdout)
        assert found and int(found[1].replace(",", "")) > 0, done.stdout


def test_there_are_versions_of_all_kinds() -> None:
    versions = range(1, 1000)
    assert {kind_of(version) for version in versions} == {PRESENT, EXPIRING, ABSENT}
    sizes = [len(value) for version in versions if isinstance(value := value_for(0, 0, version), bytes)]
    assert min(sizes) < 200 and max(sizes) > 2 << 20
    assert value_for(1, 2, 3) == value_for(1, 2, 3) != value_for(1, 2, 4)


def broken(value: Any) -> Any:
    changed = bytearray(value)
    changed[-1] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(
    ("value", "least", "most", "found"),
    [
        (value_for(1, 5, 2), 2, 2, ""),
        (value_for(1, 5, 2), 1, 3, ""),
        (value_for(1, 5, 2), 3, 4, "version 2, of 3 to 4"),
        (value_for(1, 5, 5), 3, 4, "version 5, of 3 to 4"),
        (value_for(1, 6, 2), 2, 2, "wrong bytes of version 2"),
        (broken(value_for(1, 5, 2)), 2, 2, "wrong bytes of version 2"),
        (b"", 2, 2, "version -1, of 2 to 2"),
        (None, 2, 3, "missing, of versions 2 to 3"),
        (None, 7, 8, ""),  # it may have been removed,
        (None, 9, 9, ""),  # or have expired
    ],
)
def test_what_may_not_be_read(value: Any, least: int, most: int, found: str) -> None:
    assert complaint(1, 5, value, least, most) == found


def test_what_is_lost_in_the_end_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state").mkdir()
    options = argparse.Namespace(processes=1, seed=1, directory=str(tmp_path / "cache"), backend="threads")
    driver = Driver(options, str(tmp_path / "state"))
    with DiskCache(options.directory, backend="threads") as cache:
        cache.set(("key", 0, 0), value_for(0, 0, 1))
        cache.incr(("counter", 0), 5)
    row = driver.board.rows[0]
    row.stored[0] = row.storing[0] = 1
    row.added[0], row.adding[0] = 4, 6
    driver.look()
    assert not driver.board.problems.exists()
    row.stored[0] = row.storing[0] = 2
    row.stored[1] = row.storing[1] = 1
    row.added[0] = 6
    driver.look()
    told = driver.board.problems.read_text("utf-8").splitlines()
    assert told == [
        "in the end key 0 of row 0: version 1, of 2 to 2",
        "in the end key 1 of row 0: missing, of versions 1 to 1",
        "counter 0 is 5, and should be 6 to 6",
    ]
    capsys.readouterr()
