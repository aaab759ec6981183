"""What adapters share: one handle for all in a process that name the same directory and settings."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from pathlib import Path

import pytest

from yatagarasu_cache import ClosedError, ConfigurationError, PickleSerializer
from yatagarasu_cache.integrations import _handles
from yatagarasu_cache.integrations._handles import Use, settings_among
from yatagarasu_cache.integrations._values import signed_pickles


def test_uses_of_the_same_directory_and_settings_share_a_handle(tmp_path: Path) -> None:
    first, second = Use(tmp_path / "cache", {"size_limit": 1 << 26}), Use(str(tmp_path / "cache"), {"size_limit": 1 << 26})
    assert first.cache is second.cache and first.aio is second.aio
    first.cache["key"] = 1
    first.close()
    first.close()
    assert first.closed and not second.closed and second.cache["key"] == 1
    for attribute in ("cache", "aio"):
        with pytest.raises(ClosedError, match="was closed"):
            getattr(first, attribute)


@pytest.mark.parametrize("other", [{"size_limit": 1 << 27}, {"serializer": PickleSerializer(b"other")}, {"io_uring": {"queue_depth": 7}}])
def test_other_settings_are_another_handle(tmp_path: Path, other: dict[str, object]) -> None:
    first, second = Use(tmp_path / "cache", {}), Use(tmp_path / "cache", other)
    assert first.cache is not second.cache
    first.cache["key"] = 1
    assert second.cache["key"] == 1


def test_the_last_use_closes_the_cache(tmp_path: Path) -> None:
    first, second = Use(tmp_path / "cache", {}), Use(tmp_path / "cache", {})
    store = first.cache._store
    first.close()
    gc.collect()
    assert not store.life.closed
    del second
    gc.collect()
    assert store.life.closed and not [one for one in _handles._handles.values() if one._directory == first.directory]


def test_one_that_was_closed_by_hand_is_opened_anew(tmp_path: Path) -> None:
    use = Use(tmp_path / "cache", {})
    use.cache["key"] = 1
    use.cache.close()
    assert use.cache["key"] == 1

    async def close_and_get() -> int:
        assert await use.aio.get("key") == 1
        await use.aio.close()
        return int(await use.aio.get("key"))

    assert asyncio.run(close_and_get()) == 1


def test_nothing_is_opened_before_it_is_used(tmp_path: Path) -> None:
    Use(tmp_path / "cache", {})
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ConfigurationError, match="size_limit"):
        Use(tmp_path / "cache", {"size_limit": "much"})


def test_many_threads_open_one(tmp_path: Path) -> None:
    uses, found = [Use(tmp_path / "cache", {}) for _ in range(8)], []
    barrier = threading.Barrier(8)

    def open_it(use: Use) -> None:
        barrier.wait()
        found.append(use.cache)

    threads = [threading.Thread(target=open_it, args=(use,)) for use in uses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(map(id, found))) == 1


def test_closing_in_a_coroutine_does_not_make_the_loop_wait(tmp_path: Path) -> None:
    async def run() -> None:
        use = Use(tmp_path / "cache", {})
        await use.aio.set("key", 1)
        await use.aclose()
        await use.aclose()
        with pytest.raises(ClosedError):
            await use.aio.get("key")

    asyncio.run(run())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_child_of_a_fork_goes_on(tmp_path: Path) -> None:
    use = Use(tmp_path / "cache", {})
    use.cache["key"] = 1
    child = os.fork()
    if not child:
        try:
            Use(tmp_path / "cache", {}).cache["child"] = use.cache["key"] + 1
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0 and use.cache["child"] == 2


def test_serializers_of_the_same_secrets_are_the_same() -> None:
    assert signed_pickles(b"a") is signed_pickles(b"a") is not signed_pickles(b"a", [b"b"])


def test_what_is_no_setting_is_said(caplog: pytest.LogCaptureFixture) -> None:
    options = {"size_limit": 5, "known": 1, "sise_limit": 2}
    assert settings_among(options, "it", ("known",)) == {"size_limit": 5}
    assert [record.getMessage() for record in caplog.records] == ["it: 'sise_limit' is no setting of a DiskCache, and ignored"]
