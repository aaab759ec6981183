"""`throttle` of both faces: at most so many calls in any so many seconds."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import SECOND, Clock, Make, at_most, environment, in_threads, noise
from hypothesis import given
from hypothesis import strategies as st

from yatagarasu_cache import AsyncDiskCache
from yatagarasu_cache.computing import throttling
from yatagarasu_cache.computing.throttling import Rate


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    with at_most(60):
        yield


def begun(rate: Rate, arrivals: list[int]) -> list[int]:
    calls: list[tuple[int, int]] = []
    times = []
    for now in arrivals:
        at, calls = rate.next(now, calls)
        assert at >= now and len(calls) <= 515
        times.append(at)
    return times


@given(
    st.integers(1, 40), st.integers(1, 10**10),
    st.lists(st.integers(0, 10**9), min_size=1, max_size=200),
)  # fmt: skip
def test_at_most_so_many_calls_in_any_period(most: int, period: int, pauses: list[int]) -> None:
    arrivals = [sum(pauses[: i + 1]) + 10**18 for i in range(len(pauses))]
    times = begun(Rate(most, period, "k"), arrivals)
    assert times == sorted(times)
    assert all(later - earlier >= period for earlier, later in zip(times, times[most:], strict=False))
    for i, (now, at) in enumerate(zip(arrivals, times, strict=True)):  # nobody waits for nothing
        before = times[i - most] if i >= most else -(1 << 62)
        assert at <= max(now, before + period + period // 20 + 1, times[i - 1] if i else 0)


def test_many_calls_are_counted_together() -> None:
    rate = Rate(10_000, SECOND, "k")
    times = begun(rate, [10**18] * 35_000)
    assert times[9_999] == 10**18 and times[10_000] >= 10**18 + SECOND
    assert all(later - earlier >= SECOND for earlier, later in zip(times, times[10_000:], strict=False))
    assert times[-1] <= 10**18 + 3.1 * SECOND


def test_throttled_functions(make: Make) -> None:
    cache = make()
    times: list[float] = []

    @cache.throttle(3, 0.2)
    def work(n: int, *, more: int = 0) -> int:
        """What it does."""
        times.append(time.monotonic())
        return n + more

    assert [work(n, more=1) for n in range(7)] == list(range(1, 8))
    assert work.__name__ == "work" and work.__doc__ == "What it does." and work.__wrapped__  # type: ignore[attr-defined]
    assert times[6] - times[0] >= 0.38 and times[3] - times[0] >= 0.18
    assert len(list(cache)) == 1
    expires = next(cache.entries()).expires
    assert expires is not None and expires < time.time() + 1


@pytest.mark.usefixtures("apart")
def test_processes_count_together(make: Make) -> None:
    caches = [make() for _ in range(3)]
    times: list[float] = []
    works = [cache.throttle(4, 0.15, name="work")(lambda: times.append(time.monotonic())) for cache in caches]
    began = time.monotonic()  # a call may itself begin late, where the machine is busy
    in_threads(12, lambda n: works[n % 3]())
    assert len(times) == 12 and max(times) - began >= 0.29


def test_names(make: Make) -> None:
    cache = make()
    with pytest.raises(ValueError, match="name="):
        cache.throttle(1, 1)(lambda: 1)
    for name in ("", 5, b"x"):
        with pytest.raises(TypeError, match="name"):
            cache.throttle(1, 1, name=name)  # type: ignore[arg-type]
    for count in (0, -1, 10**10):
        with pytest.raises(ValueError, match="count"):
            cache.throttle(count, 1)
    for seconds in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="seconds"):
            cache.throttle(1, seconds)
    for seconds in ("1", True, None):
        with pytest.raises(TypeError, match="seconds"):
            cache.throttle(1, seconds)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="count"):
        cache.throttle(1.5, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="functions"):
        cache.throttle(1, 1)(5)  # type: ignore[type-var]


@pytest.mark.parametrize("left", [b"", b"x", b"x" * 8, noise(8 + 16 * 3), b"\0" * 24, "text", [1], b"\xff" * 40, b"\0" * (8 + 16 * 5000)])
def test_what_is_in_its_place_is_not_believed(make: Make, left: Any) -> None:
    cache = make()
    work = cache.throttle(5, 1, name="work")(lambda: 1)
    assert work() == 1
    cache.set(next(iter(cache)), left)
    assert work() == 1


def test_without_its_entry_it_begins_anew(make: Make) -> None:
    cache = make()
    work = cache.throttle(1, 1000, name="work")(lambda: 1)
    for _ in range(3):
        assert work() == 1
        cache.clear()


def test_a_clock_that_is_set_back(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    work = cache.throttle(1, 10, name="work")(lambda: 1)
    work()
    clock.advance(-1)
    work()
    clock.advance(-3600)
    work()
    assert slept[0] == 0 and slept[1] <= 10.1 and slept[2] <= 20.2


def test_throttled_coroutine_functions(directory: Path, backend: str) -> None:
    async def main() -> None:
        async with AsyncDiskCache(directory, backend=backend) as cache:
            times: list[float] = []

            async def coroutine(n: int) -> int:
                times.append(time.monotonic())
                return n

            def plain(n: int) -> int:
                times.append(time.monotonic())
                return n

            for throttled in (
                cache.throttle(3, 0.2)(coroutine), cache.throttle(3, 0.2)(plain),
                cache._sync().throttle(3, 0.2, name="other")(coroutine),
            ):  # fmt: skip
                times.clear()
                began = time.monotonic()  # a call may itself begin late, where the machine is busy
                assert await asyncio.gather(*(throttled(n) for n in range(7))) == list(range(7))
                assert asyncio.iscoroutinefunction(throttled)
                assert max(times) - began >= 0.38
            task = asyncio.ensure_future(cache.throttle(1, 1000, name="long")(coroutine)(1))
            assert await task == 1
            task = asyncio.ensure_future(cache.throttle(1, 1000, name="long")(coroutine)(1))
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())


@pytest.mark.parametrize("interrupted", [1, 10])
def test_who_is_interrupted_gives_his_time_back(make: Make, monkeypatch: pytest.MonkeyPatch, interrupted: int) -> None:
    clock = Clock(monkeypatch)
    cache = make()
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if 0 < len(slept) - 1 <= interrupted:
            raise KeyboardInterrupt
        clock.advance(seconds)

    monkeypatch.setattr(throttling.time, "sleep", sleep)
    work = cache.throttle(1, 10, name="work")(lambda: 1)
    work()
    for _ in range(interrupted):
        with pytest.raises(KeyboardInterrupt):
            work()
    assert work() == 1
    assert 9 < slept[-1] < 11


def test_tasks_that_are_cancelled_give_their_time_back(directory: Path, backend: str) -> None:
    async def main() -> None:
        async with AsyncDiskCache(directory, backend=backend) as cache:
            async def coroutine() -> float:
                return time.monotonic()

            for throttled in (
                cache.throttle(1, 0.5, name="a")(coroutine), cache._sync().throttle(1, 0.5, name="b")(coroutine),
                cache.throttle(1, 0.5, name="c")(time.monotonic),
            ):  # fmt: skip
                tasks = [asyncio.ensure_future(throttled()) for _ in range(20)]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.sleep(0.05)
                for task in tasks:
                    task.cancel()
                began = min(one for one in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(one, float))
                assert await throttled() - began < 5

    asyncio.run(main())


THROTTLED = """
import sys, time
from yatagarasu_cache import DiskCache
cache = DiskCache(sys.argv[1] if __name__ == "__main__" else PLACE)
@cache.throttle(1, 1000)
def work(): pass
if __name__ in ("__main__", "use"):
    work()
    print(*cache)
"""


def test_a_module_counts_as_itself_whoever_runs_it(tmp_path: Path, directory: Path) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").write_text("")
    (tmp_path / "shop" / "prices.py").write_text(f"PLACE = {str(directory)!r}\n{THROTTLED}")
    (tmp_path / "link.py").symlink_to(tmp_path / "shop" / "prices.py")

    def key_of(*command: object) -> str:
        shutil.rmtree(directory, ignore_errors=True)
        done = subprocess.run(
            [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=100, cwd=tmp_path,
            env=environment(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    imported = "import shop.prices as p; p.work(); print(*p.cache)"
    assert key_of("-m", "shop.prices", directory) == key_of("-c", imported)
    assert "shop.prices:work" in key_of("-c", imported)
    assert key_of("link.py", directory) == key_of("shop/prices.py", directory)
