"""The cache backend of Django, tested as Django tests its own backends."""

from __future__ import annotations

import asyncio
import copy
import pickle
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import environment

pytest.importorskip("django")

from django.conf import settings

if not settings.configured:
    settings.configure(SECRET_KEY="secret of the tests", USE_TZ=True)

from django.core.cache import caches
from django.core.cache.backends.base import CacheKeyWarning, InvalidCacheKey
from django.core.signals import request_finished
from django.test.utils import override_settings

from yatagarasu_cache import CacheIOError, ConfigurationError, DiskCache
from yatagarasu_cache.codec import PickleSerializer
from yatagarasu_cache.integrations.django import YatagarasuCache

BACKEND = "yatagarasu_cache.integrations.django.YatagarasuCache"


@pytest.fixture(autouse=True)
def of_these_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("YATAGARASU_CACHE_SECRET_FILE", str(tmp_path / "user-secret"))
    with override_settings(SECRET_KEY="secret of the tests", SECRET_KEY_FALLBACKS=[]):
        yield


@pytest.fixture
def cache(tmp_path: Path) -> YatagarasuCache:
    return YatagarasuCache(str(tmp_path / "cache"), {})


def another(cache: YatagarasuCache, **params: Any) -> YatagarasuCache:
    """Of the same location."""
    return YatagarasuCache(cache.cache.directory, params)


class Unpicklable:
    def __getstate__(self) -> Any:
        raise pickle.PickleError("no")


class Touchy:
    """Its pickles load until it is told otherwise."""

    broken = False

    def __setstate__(self, state: Any) -> None:
        if self.broken:
            raise RuntimeError("it has changed since")

    def __getstate__(self) -> Any:
        return {"some": "state"}


class Evil:
    ran = False

    def __reduce__(self) -> Any:
        return setattr, (Evil, "ran", True)


# -- values, keys and times -------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -1, 2**80, 1.5, "text", "Iñtërnâtiônàlizætiøn", "", b"\x00\xff", bytearray(b"x"),
        [1, (2, {3})], {"a": {1: None}}, frozenset({1}), complex(1, 2), range(3), int, Path("x"),
    ],
    ids=repr,
)  # fmt: skip
def test_any_value_comes_back_as_it_was(cache: YatagarasuCache, value: Any) -> None:
    cache.set("key", value)
    found = cache.get("key", "missing")
    assert found == value and type(found) is type(value)
    assert cache.get_many(["key"]) == {"key": value}
    assert cache.has_key("key") and "key" in cache and not cache.add("key", 5)
    assert cache.get_or_set("key", 5) == value


def test_a_value_is_a_copy(cache: YatagarasuCache) -> None:
    value = {"list": [1]}
    cache.set("key", value)
    value["list"].append(2)
    assert cache.get("key") == {"list": [1]} and cache.get("key") is not cache.get("key")


def test_what_does_not_pickle_raises_what_pickle_raises(cache: YatagarasuCache) -> None:
    cache.set("key", "old")
    for store in (cache.set, cache.add):
        with pytest.raises(pickle.PickleError):
            store("key", Unpicklable())
    with pytest.raises(pickle.PickleError):
        cache.set_many({"other": 1, "key": Unpicklable()})
    with pytest.raises((TypeError, pickle.PickleError)):
        cache.set("key", threading.Lock())
    assert cache.get("key") == "old" and cache.get("other") is None
    with pytest.raises(pickle.PickleError):
        asyncio.run(cache.aset("key", Unpicklable()))


def test_the_timeout_left_out_is_the_default_and_none_is_never(cache: YatagarasuCache) -> None:
    def left(cache: YatagarasuCache, key: str) -> float | None:
        entry = cache.cache.get_entry(cache.make_key(key))
        assert entry is not None
        return None if entry.expires is None else entry.expires - time.time()

    cache.set("default", 1)
    cache.set("never", 1, None)
    cache.set("named", 1, 60)
    cache.set("long", 1, 60 * 60 * 24 * 365 * 1000)
    cache.set_many({"many": 1}, timeout=None)
    cache.add("added", 1, timeout=None)
    assert 299 < (left(cache, "default") or 0) <= 300 and 59 < (left(cache, "named") or 0) <= 60
    assert left(cache, "never") is left(cache, "many") is left(cache, "added") is None
    assert (left(cache, "long") or 1e12) > 1e9
    forever = another(cache, TIMEOUT=None)
    forever.set("default", 1)
    assert left(forever, "default") is None
    # A default of the cache's own is none of Django's.
    expiring = another(cache, TIMEOUT=None, OPTIONS={"default_expire": 5})
    expiring.set("default", 1)
    assert left(expiring, "default") is None


@pytest.mark.parametrize("timeout", [0, -1, -100.5, 0.0])
def test_zero_and_less_is_expired_at_once(cache: YatagarasuCache, timeout: float) -> None:
    cache.set("key", 1)
    cache.set("key", 2, timeout)
    assert cache.get("key") is None and "key" not in cache
    assert cache.add("key", 3, timeout) is True and cache.get("key") is None
    cache.set_many({"a": 1, "b": 2})
    assert cache.set_many({"a": 1, "b": 2}, timeout) == [] and cache.get_many(["a", "b"]) == {}
    cache.set("key", 4)
    assert cache.add("key", 5, timeout) is False and cache.get("key") == 4
    assert cache.touch("key", timeout) is True and cache.get("key") is None
    assert cache.touch("key", timeout) is False
    zero = another(cache, TIMEOUT=timeout)
    zero.set("key", 1)
    assert zero.get("key") is None


def test_entries_expire_in_fractions_of_a_second_too(cache: YatagarasuCache) -> None:
    cache.set("key", "value", 0.05)
    cache.set("touched", "value", 0.05)
    assert cache.touch("touched")
    time.sleep(0.1)
    assert cache.get("key") is None and "key" not in cache and cache.add("key", "new")
    assert cache.get("touched") == "value" and cache.get("key") == "new"


def test_touch_gives_another_time(cache: YatagarasuCache) -> None:
    cache.set("key", 1, 10)
    assert cache.touch("key", None) is True
    entry = cache.cache.get_entry(cache.make_key("key"))
    assert entry is not None and entry.expires is None
    assert cache.touch("missing") is False


def test_keys_of_any_kind_of_text(cache: YatagarasuCache) -> None:
    data = {"ascii": "ascii", "unicode_ascii": "Iñtërnâtiônàlizætiøn1", "Iñtërnâtiônàlizætiøn": 2, "ascii2": {"x": 1}}
    for key, value in data.items():
        cache.delete(key)
        cache.add(key, value)
        assert cache.get(key) == value
    cache.delete_many(data)
    cache.set_many(data)
    assert cache.get_many(data) == data


def test_keys_that_memcached_refuses_are_warned_of(cache: YatagarasuCache) -> None:
    for key in ("key with spaces and 清", "a" * 251):
        with pytest.warns(CacheKeyWarning):
            cache.set(key, "value")
        for use in (
            cache.get, cache.delete, cache.touch, cache.has_key, lambda key: cache.add(key, 1), cache.incr,
            lambda key: cache.get_many([key]), lambda key: cache.set_many({key: 1}),
            lambda key: cache.delete_many([key]),
        ):  # fmt: skip
            with pytest.warns(CacheKeyWarning):
                try:
                    use(key)
                except ValueError as error:
                    assert "not found" in str(error)


def test_keys_are_validated_as_the_class_says(tmp_path: Path) -> None:
    class Strict(YatagarasuCache):
        def validate_key(self, key: str) -> None:
            raise InvalidCacheKey(key)

    cache = Strict(str(tmp_path / "cache"), {})
    for use in (
        cache.get, cache.delete, cache.touch, cache.has_key, cache.incr, cache.decr,
        lambda key: cache.set(key, 1), lambda key: cache.add(key, 1), lambda key: cache.get_many([key]),
        lambda key: cache.set_many({key: 1}), lambda key: cache.delete_many([key]),
    ):  # fmt: skip
        with pytest.raises(InvalidCacheKey, match=":1:key"):
            use("key")
    for use in (
        cache.aget, cache.adelete, cache.atouch, cache.ahas_key, cache.aincr, cache.adecr,
        lambda key: cache.aset(key, 1), lambda key: cache.aadd(key, 1), lambda key: cache.aget_many([key]),
        lambda key: cache.aset_many({key: 1}), lambda key: cache.adelete_many([key]),
    ):  # fmt: skip
        with pytest.raises(InvalidCacheKey, match=":1:key"):
            asyncio.run(use("key"))


def test_keys_that_are_stored_as_one(cache: YatagarasuCache) -> None:
    cache.set(1, "value")
    assert cache.get("1") == "value"
    assert cache.get_many([1, "1", 2]) == {1: "value", "1": "value"} == asyncio.run(cache.aget_many([1, "1"]))
    cache.delete_many([1, "1"])
    assert cache.get_many(iter(["1"])) == {}


def underlined(key: str, prefix: str, version: int) -> str:
    return f"CUSTOM-{prefix}-{version}-{key}"


def test_prefixes_versions_and_key_functions_keep_keys_apart(cache: YatagarasuCache) -> None:
    prefixed, second = another(cache, KEY_PREFIX="pre"), another(cache, VERSION=2)
    custom = another(cache, KEY_FUNCTION=underlined)
    named = another(cache, KEY_FUNCTION=f"{__name__}.underlined")
    for number, one in enumerate((cache, prefixed, second, custom)):
        one.set("key", number)
    assert [one.get("key") for one in (cache, prefixed, second, custom, named)] == [0, 1, 2, 3, 3]
    assert cache.get("key", version=2) == 2 and second.get("key", version=1) == 0
    assert custom.cache.get("CUSTOM--1-key") == 3
    cache.delete("key", version=2)
    assert second.get("key") is None and cache.get("key") == 0
    cache.set_many({"a": 1, "b": 2}, version=2)
    assert cache.get_many(["a", "b"]) == {} and cache.get_many(["a", "b"], version=2) == {"a": 1, "b": 2}
    assert second.incr("a") == 2 and cache.decr("a", version=2) == 1 and cache.has_key("a", version=2)
    cache.delete_many(["a"], version=2)
    assert second.get("a") is None and second.touch("b") and not cache.touch("b")
    assert cache.add("b", 5) and not cache.add("b", 6, version=2)


def test_versions_are_moved(cache: YatagarasuCache) -> None:
    cache.set("key", {"any": 1}, version=2)
    assert cache.incr_version("key", version=2) == 3
    assert cache.get("key", version=2) is None and cache.get("key", version=3) == {"any": 1}
    assert cache.decr_version("key", version=3) == 2 and cache.get("key", version=2) == {"any": 1}
    cache.set("null", None)
    assert cache.incr_version("null") == 2 and cache.get("null", "missing", version=2) is None
    for move in (cache.incr_version, cache.decr_version):
        with pytest.raises(ValueError):
            move("missing")
    assert asyncio.run(cache.aincr_version("key", version=2)) == 3


# -- what the methods do ------------------------------------------------------------------------


def test_simple_uses(cache: YatagarasuCache) -> None:
    assert cache.get("missing") is None and cache.get("missing", "default") == "default"
    assert cache.add("key", "value") is True and cache.add("key", "other") is False and cache.get("key") == "value"
    assert cache.delete("key") is True and cache.delete("key") is False and "key" not in cache
    cache.set_many({"a": "a", "b": "b", "c": "c", "d": "d"})
    assert cache.get_many(["a", "c", "d", "e"]) == {"a": "a", "c": "c", "d": "d"}
    assert cache.get_many([]) == {} and cache.set_many({}) == []
    cache.delete_many(["a", "b", "missing"])
    assert cache.get("a") is None and cache.get("c") == "c"
    cache.clear()
    assert cache.get_many("abcd") == {}


def test_get_or_set(cache: YatagarasuCache) -> None:
    assert cache.get_or_set("number", 42) == 42 == cache.get_or_set("number", 43)
    assert cache.get_or_set("called", lambda: "value") == "value"
    assert cache.get_or_set("null", lambda: None) is None and cache.get("null", "missing") is None
    assert cache.get_or_set("null", lambda: 5) is None
    assert cache.get_or_set("version", 1, version=2) == 1 and cache.get("version") is None
    with pytest.raises(TypeError):
        cache.get_or_set("brian")


def test_incr(cache: YatagarasuCache) -> None:
    cache.set("answer", 41, 60)
    assert cache.incr("answer") == 42 == cache.get("answer") and cache.incr("answer", 10) == 52
    assert cache.decr("answer") == 51 and cache.decr("answer", 10) == 41 and cache.incr("answer", -41) == 0
    entry = cache.cache.get_entry(cache.make_key("answer"))
    assert entry is not None and 0 < (entry.expires or 0) - time.time() <= 60
    for count in (cache.incr, cache.decr):
        with pytest.raises(ValueError, match="missing"):
            count("missing")
        with pytest.raises(ValueError, match="missing"):
            count("missing", 1.5)
    cache.set("gone", 1, 0.02)
    time.sleep(0.05)
    with pytest.raises(ValueError):
        cache.incr("gone")
    cache.set("float", 1.5)
    assert cache.incr("float") == 2.5 == cache.get("float") and cache.incr("answer", 0.5) == 0.5
    cache.set("true", True)
    assert cache.incr("true") == 2
    for value in ("text", None, [1]):
        cache.set("other", value)
        with pytest.raises(TypeError):
            cache.incr("other")
        assert cache.get("other", "missing") == value


def test_numbers_of_threads_add_up(cache: YatagarasuCache) -> None:
    cache.set_many({"int": 0, "float": 0.5})

    def count() -> None:
        for _ in range(50):
            cache.incr("int")
            cache.incr("float")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.get_many(["int", "float"]) == {"int": 200, "float": 200.5}


def test_the_same_for_coroutines(cache: YatagarasuCache) -> None:
    async def use() -> None:
        assert await cache.aget("key") is None and await cache.aget("key", 5) == 5
        assert await cache.aadd("key", {"a": 1}) is True and await cache.aadd("key", 2) is False
        assert await cache.aget("key") == {"a": 1} and await cache.ahas_key("key") and not await cache.ahas_key("x")
        assert await cache.atouch("key", None) is True and await cache.atouch("x") is False
        assert await cache.adelete("key") is True and await cache.adelete("key") is False
        for timeout in (0, -1):
            await cache.aset("key", 1)
            assert await cache.aadd("key", 1, timeout) is False and await cache.atouch("key", timeout) is True
            assert await cache.aadd("key", 1, timeout) is True and await cache.aget("key") is None
            await cache.aset("key", 1)
            await cache.aset("key", 1, timeout)
            assert await cache.aget("key") is None
            await cache.aset_many({"key": 1})
            assert await cache.aset_many({"key": 1}, timeout) == [] and await cache.aget("key") is None
        assert await cache.aset_many({"a": 1, "b": "two"}, timeout=None) == []
        assert await cache.aget_many(["a", "b", "c"]) == {"a": 1, "b": "two"}
        assert await cache.aincr("a") == 2 and await cache.adecr("a", 5) == -3 and await cache.aincr("a", 0.5) == -2.5
        for count in (cache.aincr, cache.adecr):
            with pytest.raises(ValueError):
                await count("missing")
        with pytest.raises(TypeError):
            await cache.aincr("b")
        assert await cache.aget_or_set("made", lambda: 7) == 7 == await cache.aget_or_set("made", 8)
        await cache.aset("version", 1, version=2)
        assert await cache.aincr_version("version", version=2) == 3 and await cache.aget("version", version=3) == 1
        assert await cache.adecr_version("version", version=3) == 2
        await cache.adelete_many(["a", "b"])
        assert await cache.aget_many(["a", "b"]) == {}
        await cache.aset("short", 1, 0.02)
        await asyncio.sleep(0.05)
        assert await cache.aget("short") is None
        await cache.aset("counted", 0)
        await asyncio.gather(*(cache.aincr("counted") for _ in range(50)))
        assert await cache.aget("counted") == 50
        await cache.aclose()
        assert await cache.aget("made") == 7
        await cache.aclear()
        assert await cache.aget("made") is None

    asyncio.run(use())
    cache.set("sync", 1)
    assert asyncio.run(cache.aget("sync")) == 1  # in another loop
    asyncio.run(cache.aset("async", 2))
    assert cache.get("async") == 2


# -- what cannot be read ----------------------------------------------------------------------


def test_what_was_not_signed_is_never_loaded(cache: YatagarasuCache, caplog: Any) -> None:
    numpy = pytest.importorskip("numpy")
    cache.set("right", Evil)
    evil, directory = pickle.dumps(Evil()), cache.cache.directory
    forged = [evil, b"", b"short", bytearray(evil), numpy.array(list(evil), "uint8"), "text", [1], 1.5, None]
    for value in [*forged, cache.cache[":1:right"]]:  # the last one is of another key
        cache.cache[":1:forged"] = value
        missed(cache)
    for unsigned in (PickleSerializer(), PickleSerializer(b"another secret")):
        with DiskCache(directory, serializer=unsigned) as other:
            other[":1:forged"] = Evil()
        missed(cache)
    assert not Evil.ran and "taken for a miss" in caplog.text


def missed(cache: YatagarasuCache) -> None:
    """All take "forged" for something that is not there, and "right" is right."""
    stored = cache.cache.get_entry(":1:forged")
    assert stored is not None
    assert cache.get("forged", "missing") == "missing" and "forged" not in cache
    assert cache.get_many(["forged", "right"]) == {"right": Evil}
    count: Any
    for count in (lambda: cache.incr("forged"), lambda: asyncio.run(cache.aincr("forged"))):
        with pytest.raises(ValueError, match="not found"):
            count()
    with pytest.raises(ValueError):
        cache.incr_version("forged")
    assert asyncio.run(cache.aget("forged", 5)) == 5 and not asyncio.run(cache.ahas_key("forged"))
    assert asyncio.run(cache.aget_many(["forged"])) == {}
    after = cache.cache.get_entry(":1:forged")
    assert after is not None and after.version == stored.version


def test_what_cannot_be_read_keeps_nobody_from_adding(cache: YatagarasuCache) -> None:
    for add in (cache.add, lambda *args: asyncio.run(cache.aadd(*args))):
        cache.cache[":1:key"] = pickle.dumps(Evil())
        assert add("key", "mine", 0) is True and add("key", "mine") is True and add("key", "yours") is False
        assert cache.get("key") == "mine"
        with DiskCache(cache.cache.directory, serializer="pickle") as other:
            other[":1:key"] = Evil()
        assert add("key", "mine") is True and cache.get("key") == "mine"
    cache.cache[":1:made"] = b"forged"
    assert cache.get_or_set("made", lambda: 5) == 5 == cache.get("made")
    assert not Evil.ran


def test_a_class_that_has_changed_is_a_miss(cache: YatagarasuCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.set("key", Touchy())
    assert type(cache.get("key")) is Touchy
    monkeypatch.setattr(Touchy, "broken", True)
    assert cache.get("key", "missing") == "missing"
    monkeypatch.delattr(sys.modules[__name__], "Touchy")
    assert cache.get("key", "missing") == "missing" and cache.get_many(["key"]) == {}


def test_secrets_are_replaced(cache: YatagarasuCache) -> None:
    cache.set("key", "signed with the old one")
    cache.set("number", 5)
    with override_settings(SECRET_KEY="new", SECRET_KEY_FALLBACKS=["older", "secret of the tests"]):
        assert another(cache).get("key") == "signed with the old one"
        another(cache).set("new", "signed with the new one")
    with override_settings(SECRET_KEY=b"new", SECRET_KEY_FALLBACKS=[]):
        new = another(cache)
        assert new.get("key") is None and new.get("new") == "signed with the new one" and new.get("number") == 5
    assert cache.get("new") is None and cache.get("key") == "signed with the old one"


def test_without_a_secret_key_the_users_own_secret_signs(cache: YatagarasuCache, tmp_path: Path) -> None:
    with override_settings(SECRET_KEY=""):
        another(cache).set("key", "value")
        assert another(cache).get("key") == "value"
    assert (tmp_path / "user-secret").exists() and cache.get("key") is None


# -- aliases, handles and settings --------------------------------------------------------------


def test_aliases_share_a_location(tmp_path: Path) -> None:
    location = str(tmp_path / "cache")
    names: dict[str, Any] = {
        "default": {"BACKEND": BACKEND, "LOCATION": location, "OPTIONS": {"size_limit": 1 << 26}},
        "pages": {
            "BACKEND": BACKEND, "LOCATION": tmp_path / "cache", "KEY_PREFIX": "pages", "TIMEOUT": 5,
            "OPTIONS": {"size_limit": 1 << 26, "MAX_ENTRIES": 5, "CULL_FREQUENCY": 2},
        },
    }  # fmt: skip
    given = copy.deepcopy(names)
    with override_settings(CACHES=names):
        first, pages = caches["default"], caches["pages"]
        assert isinstance(first, YatagarasuCache) and first.cache is pages.cache and pages.default_timeout == 5
        first.set("key", 1)
        pages.set("key", 2)
        assert (first.get("key"), pages.get("key")) == (1, 2)
        assert first.cache.settings.size_limit == 1 << 26
        request_finished.send(None)  # closes all
        assert caches["default"] is first and first.get("key") == 1
        pages.clear()
        assert first.get("key") is None
        in_thread: list[Any] = []
        thread = threading.Thread(target=lambda: in_thread.append(caches["default"]))
        thread.start()
        thread.join()
        assert in_thread[0] is not first and in_thread[0].cache is first.cache
    assert names == given


def test_instances_are_cheap(cache: YatagarasuCache) -> None:
    cache.set("key", 1)
    began = time.perf_counter()
    for _ in range(1000):
        assert another(cache).cache is cache.cache
    assert time.perf_counter() - began < 2


def test_a_setting_that_there_is_not_is_named(tmp_path: Path) -> None:
    for options in ({"size": 5}, {"size_limit": "much"}):
        with pytest.raises(ConfigurationError, match="size"):
            YatagarasuCache(str(tmp_path / "cache"), {"OPTIONS": options})
    with pytest.raises(ConfigurationError, match="directory"):
        YatagarasuCache("", {})


def test_a_failing_disk_is_told_of(cache: YatagarasuCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.set("key", 1)

    def fail(*_: Any, **__: Any) -> Any:
        raise CacheIOError(5, "the disk failed")

    for name in ("get", "set", "add", "delete", "incr", "get_many", "set_many"):
        monkeypatch.setattr(DiskCache, name, fail)
    for use in (
        lambda: cache.get("key"), lambda: cache.set("key", 2), lambda: cache.add("key", 2), lambda: "key" in cache,
        lambda: cache.incr("key"), lambda: cache.get_many(["key"]), lambda: cache.set_many({"key": 2}),
        lambda: cache.delete("key"), lambda: cache.get_or_set("key", 5),
    ):  # fmt: skip
        with pytest.raises(CacheIOError):
            use()
    monkeypatch.undo()
    assert cache.get("key") == 1


# -- Django's own users of caches ---------------------------------------------------------------

SITE = """
import sys, warnings
import django
from django.conf import settings
from django.urls import path
settings.configure(
    SECRET_KEY="s", ROOT_URLCONF="__main__", ALLOWED_HOSTS=["*"], USE_TZ=True, DEFAULT_AUTO_FIELD="django.db.models.AutoField",
    CACHES={"default": {"BACKEND": "yatagarasu_cache.integrations.django.YatagarasuCache", "LOCATION": sys.argv[1]}},
    SESSION_ENGINE="django.contrib.sessions.backends." + sys.argv[2],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1] + ".sqlite"}},
    INSTALLED_APPS=["django.contrib.sessions"],
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates"}],
    MIDDLEWARE=["django.contrib.sessions.middleware.SessionMiddleware"] + sys.argv[3:],
)
django.setup()
from django.core.cache import cache
from django.core.management import call_command
from django.http import HttpResponse
from django.template import Context, Template
from django.test import AsyncClient, Client
from django.views.decorators.cache import cache_page
from django.views.decorators.vary import vary_on_headers
calls = []
def visits(request):
    request.session["visits"] = request.session.get("visits", 0) + 1
    return HttpResponse(str(request.session["visits"]))
@cache_page(60)
@vary_on_headers("X-Kind")
def page(request):
    calls.append(request.path)
    return HttpResponse("page of " + request.headers.get("X-Kind", "none"))
def plain(request):
    calls.append(request.path)
    return HttpResponse("plain")
async def aplain(request):
    calls.append(request.path)
    await cache.aset("seen", 1)
    return HttpResponse(str(await cache.aget("seen")))
urlpatterns = [path("visits", visits), path("page", page), path("plain", plain), path("aplain", aplain)]
if sys.argv[2] == "cached_db":
    call_command("migrate", verbosity=0)
"""

SESSIONS = """
client = Client()
assert [client.get("/visits").content for _ in range(2)] == [b"1", b"2"]
cookie = client.cookies["sessionid"].value
session = client.session
session.set_expiry(300)
session["other"] = {"nested": [1]}
session.save()
assert client.session["other"] == {"nested": [1]} and client.get("/visits").content == b"3"
print(client.cookies["sessionid"].value)
gone = Client()
gone.get("/visits")
gone.session.flush()
assert gone.get("/visits").content in (b"1", b"2")
"""

GO_ON = """
client = Client()
client.cookies["sessionid"] = sys.stdin.read().strip()
assert client.get("/visits").content == b"4" and client.session["other"] == {"nested": [1]}
"""

PAGES = """
client = Client()
for _ in range(2):
    for kind in ("large", "small"):
        assert client.get("/page", headers={"x-kind": kind}).content == b"page of " + kind.encode()
assert calls == ["/page", "/page"], calls
assert client.head("/page", headers={"x-kind": "small"}).status_code == 200
del calls[:]
text = "{% load cache %}{% cache 60 part user %}{{ value }}{% endcache %}"
def render(user, value):
    return Template(text).render(Context({"user": user, "value": value}))
assert [render(1, "a"), render(1, "b"), render(2, "c")] == ["a", "a", "c"]
from django.core.cache.utils import make_template_fragment_key
cache.delete(make_template_fragment_key("part", [1]))
assert render(1, "b") == "b"
import asyncio
async def use():
    client = AsyncClient()
    assert [(await client.get("/aplain")).content for _ in range(2)] == [b"1", b"1"]
asyncio.run(use())
"""

WHOLE_SITE = """
client = Client()
first = client.get("/plain")
second = client.get("/plain")
assert first.content == second.content == b"plain" and calls == ["/plain"], calls
assert second["Expires"] == first["Expires"]
"""


def run(tmp_path: Path, program: str, engine: str = "cache", *middleware: str, given: str = "") -> str:
    env = {**environment(), "YATAGARASU_CACHE_SECRET_FILE": str(tmp_path / "user-secret")}
    command = [sys.executable, "-W", "error", "-c", SITE + program, str(tmp_path / "cache"), engine, *middleware]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("engine", ["cache", "cached_db"])
def test_sessions_which_go_on_in_another_process(tmp_path: Path, engine: str) -> None:
    cookie = run(tmp_path, SESSIONS, engine)
    if engine == "cache":
        run(tmp_path, GO_ON, engine, given=cookie)


def test_cached_pages_and_fragments(tmp_path: Path) -> None:
    run(tmp_path, PAGES)


def test_the_middleware_that_caches_the_whole_site(tmp_path: Path) -> None:
    names = ("django.middleware.cache.UpdateCacheMiddleware", "django.middleware.cache.FetchFromCacheMiddleware")
    run(tmp_path, WHOLE_SITE, "cache", *names)


COUNTER = """
import sys
from django.conf import settings
settings.configure(SECRET_KEY="secret of the tests")
from yatagarasu_cache.integrations.django import YatagarasuCache
cache = YatagarasuCache(sys.argv[1], {})
print("ready", flush=True)
sys.stdin.readline()
for _ in range(100):
    cache.incr("hits")
print(cache.add("first", 1))
"""


def test_numbers_of_processes_add_up(cache: YatagarasuCache) -> None:
    cache.set("hits", 0, None)
    command = [sys.executable, "-c", COUNTER, cache.cache.directory]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    said = [process.communicate("go\n", timeout=60)[0] for process in processes]
    assert cache.get("hits") == 400 and sorted(said) == ["False\n"] * 3 + ["True\n"]


KILLED = COUNTER.partition("for _")[0] + """
number = 0
while True:
    number += 1
    cache.set_many({"a": [number] * 100, "b": [number] * 100})
    cache.set("a", [number] * 2000)
"""


def test_a_writer_that_is_killed_leaves_whole_values(cache: YatagarasuCache) -> None:
    command = [sys.executable, "-c", KILLED, cache.cache.directory]
    for _ in range(2):
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
        time.sleep(0.2)
        process.kill()
        process.communicate(timeout=60)
        for value in cache.get_many(["a", "b"]).values():
            assert len(value) in (100, 2000) and len(set(value)) == 1
        cache.set("a", 1)
        assert cache.get("a") == 1


def test_nobody_is_warned_that_it_was_not_closed(tmp_path: Path) -> None:
    program = COUNTER.partition("print")[0] + """
import asyncio
cache.set("key", 1)
assert asyncio.run(cache.aget("key")) == 1
cache.close()
"""
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", program, str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = YatagarasuCache(str(tmp_path / "cache"), {})
        assert cache.get("key") == 1
