"""Settings: validation, configuration files, and that docs/configuration.md tells the truth."""

from __future__ import annotations

import ast
import dataclasses
import enum
import json
import logging
import math
import os
import pathlib
import pickle
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from yatagarasu_cache import config
from yatagarasu_cache.config import (
    MIN_SIZE_LIMIT,
    RingSettings,
    Settings,
    from_mapping,
    is_enabled,
    load,
    make_settings,
    to_options,
)
from yatagarasu_cache.errors import CacheError, ConfigurationError

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "configuration.md"
HAS_TOML = sys.version_info >= (3, 11)
if not HAS_TOML:
    try:
        import tomli  # noqa: F401

        HAS_TOML = True
    except ImportError:
        pass


@pytest.fixture(autouse=True)
def _no_backend_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("YATAGARASU_BACKEND", raising=False)


class Codec:
    name = "mine"

    def dumps(self, value: object) -> bytes:
        return repr(value).encode()

    def loads(self, data: bytes) -> object:
        return ast.literal_eval(data.decode())


class NoName:
    dumps = loads = print


class EmptyName(Codec):
    name = ""


class NotCallable(Codec):
    loads = None  # type: ignore[assignment]


class BadRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class Policy(str, enum.Enum):
    FIFO = "fifo"


# -- defaults and accepted values -----------------------------------------------------------


def test_defaults() -> None:
    made = make_settings("/x")
    assert made == Settings(directory="/x")
    assert made.io_uring == RingSettings()
    assert made.io_uring.queue_depth == 128
    assert made.size_limit == 10 * 2**30
    assert made.backend == "auto"


def test_settings_are_frozen() -> None:
    made = make_settings("/x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.size_limit = 1  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.io_uring.queue_depth = 1  # type: ignore[misc]


def test_configuration_error_is_a_value_error_and_a_cache_error() -> None:
    assert issubclass(ConfigurationError, ValueError) and issubclass(ConfigurationError, CacheError)


GOOD: list[tuple[str, Any, Any]] = [
    ("size_limit", MIN_SIZE_LIMIT, MIN_SIZE_LIMIT),
    ("size_limit", 2**63 - 1, 2**63 - 1),
    ("eviction", "none", "none"),
    ("eviction", Policy.FIFO, "fifo"),
    ("backend", None, "auto"),
    ("backend", "uring", "uring"),
    ("durability", "sync", "sync"),
    ("serializer", "pickle", "pickle"),
    ("on_unreadable", "miss", "miss"),
    ("compression", "lz4", "lz4"),
    ("compression", None, None),
    ("compression_level", None, None),
    ("compression_min_size", 0, 0),
    ("max_value_size", 1, 1),
    ("max_value_size", 10 * 2**30, 10 * 2**30),
    ("max_stream_size", 1, 1),
    ("max_stream_size", None, None),
    ("default_expire", 60, 60.0),
    ("default_expire", 0.001, 0.001),
    ("default_expire", None, None),
    ("read_only", True, True),
    ("segment_size", 4096, 4096),
    ("segment_size", 2**30, 2**30),
    ("large_value_size", 1, 1),
    ("headroom", 0.02, 0.02),
    ("headroom", 0.9, 0.9),
    ("max_open_files", 8, 8),
    ("max_in_flight", 1, 1),
    ("lock_timeout", 0.5, 0.5),
    ("lock_timeout", None, None),
    ("workers", 1, 1),
    ("workers", 256, 256),
    ("workers", None, None),
    ("allow_network_fs", True, True),
    ("directory_mode", 0o750, 0o750),
    ("directory_mode", "0o755", 0o755),
    ("file_mode", "0640", 0o640),
    ("file_mode", 0o666, 0o666),
]


@pytest.mark.parametrize(("name", "value", "expected"), GOOD)
def test_accepted(name: str, value: Any, expected: Any) -> None:
    got = getattr(make_settings("/x", **{name: value}), name)
    assert got == expected and type(got) is type(expected)


RING_GOOD: list[tuple[str, Any, Any]] = [
    ("enabled", True, True),
    ("enabled", False, False),
    ("enabled", "auto", "auto"),
    ("queue_depth", 1, 1),
    ("queue_depth", 100, 100),
    ("queue_depth", 4096, 4096),
    ("use_registered_buffers", False, False),
    ("use_fixed_files", True, True),
    ("direct", False, False),
    ("sqpoll", True, True),
    ("cpu_affinity", 0, (0,)),
    ("cpu_affinity", [3, 1], (1, 3)),
    ("cpu_affinity", range(2), (0, 1)),
    ("cpu_affinity", None, None),
    ("max_workers", 1, 1),
    ("max_workers", None, None),
]


@pytest.mark.parametrize(("name", "value", "expected"), RING_GOOD)
def test_ring_accepted(name: str, value: Any, expected: Any) -> None:
    for given_as in ({name: value}, RingSettings(**{name: value})):
        got = getattr(make_settings("/x", io_uring=given_as).io_uring, name)
        assert got == expected and type(got) is type(expected)


def test_a_serializer_object_is_kept() -> None:
    codec = Codec()
    assert make_settings("/x", serializer=codec).serializer is codec


# -- directory ------------------------------------------------------------------------------


def test_directory_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert make_settings("a/../b").directory == os.path.join(os.getcwd(), "b")
    assert make_settings("~/c").directory == str(tmp_path / "home" / "c")
    assert make_settings(tmp_path / "d").directory == str(tmp_path / "d")


@pytest.mark.parametrize(
    "value", ["", "  ", "a\0b", "~\0", None, 7, True, b"/x", "~no-such-user-here/x", ["x"], BadRepr()]
)
def test_bad_directory(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="directory"):
        make_settings(value)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows file names may hold surrogates")
def test_directory_that_no_file_system_can_hold() -> None:
    with pytest.raises(ConfigurationError, match="directory.*encoding"):
        make_settings("/x/\ud800")


@pytest.mark.skipif(sys.platform != "linux", reason="a working directory can be removed on Linux")
def test_relative_directory_without_a_working_directory(tmp_path: pathlib.Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    before = os.getcwd()
    os.chdir(gone)
    try:
        gone.rmdir()
        with pytest.raises(ConfigurationError, match="directory.*absolute path"):
            make_settings("cache")
        assert make_settings("/x").directory == "/x"
    finally:
        os.chdir(before)


# -- refused values -------------------------------------------------------------------------

NOT_INT: list[Any] = [True, False, 1.0, math.nan, "4096", b"1", [1], {}, object(), BadRepr(), 10**5000]
NOT_BOOL: list[Any] = [0, 1, "true", "yes", None, [], 1.0]
NOT_CHOICE: list[Any] = ["", "LRU", "bogus", 1, True, ["lru"], {}, b"none", BadRepr()]
BAD: dict[str, list[Any]] = {
    "size_limit": [None, 0, -1, MIN_SIZE_LIMIT - 1, 2**63, *NOT_INT],
    "eviction": [None, *NOT_CHOICE],
    "backend": ["io_uring", "Threads", *NOT_CHOICE],
    "durability": [None, "fsync", *NOT_CHOICE],
    "serializer": [None, "json", 1, b"pickle", NoName(), EmptyName(), NotCallable(), Codec, json, {}],
    "on_unreadable": [None, "raise", *NOT_CHOICE],
    "compression": ["gzip", "ZSTD", *NOT_CHOICE],
    "compression_level": [0, -1, 23, *NOT_INT],
    "compression_min_size": [None, -1, 2**63, *NOT_INT],
    "max_value_size": [0, -1, 2**63, *NOT_INT],
    "max_stream_size": [0, -1, 2**63, *NOT_INT],
    "default_expire": [0, -1, -0.0, math.nan, math.inf, -math.inf, True, "60", 10**400, [1], 1j],
    "read_only": NOT_BOOL,
    "segment_size": [0, 4095, 2**30 + 1, *NOT_INT],
    "large_value_size": [0, -1, *NOT_INT],
    "headroom": [None, 0, 1, 0.0199, 0.91, math.nan, math.inf, True, "0.1", 10**400],
    "max_open_files": [None, 0, 7, 2**20 + 1, *NOT_INT],
    "max_in_flight": [None, 0, -1, 2**31, *NOT_INT],
    "lock_timeout": [0, -1, math.nan, math.inf, True, "60"],
    "workers": [0, -1, 257, *NOT_INT],
    "allow_network_fs": NOT_BOOL,
    "directory_mode": [None, 0, -1, 700, 0o600, 0o1777, True, 448.0, "700x", "rwx", "0o7777", "٧٠٠"],
    "file_mode": [None, 0, -1, 600, 0o400, 0o1600, True, 384.0, "", "0b11", "0o60", []],
    "io_uring": [None, True, "auto", 1, [], [("enabled", True)]],
}
RING_BAD: dict[str, list[Any]] = {
    "enabled": [None, 0, 1, "true", "on", "", b"auto"],
    "queue_depth": [None, 0, -1, 4097, 32768, 32769, *NOT_INT],
    "use_registered_buffers": NOT_BOOL,
    "use_fixed_files": NOT_BOOL,
    "direct": [None, 0, "always", "true"],
    "sqpoll": NOT_BOOL,
    "cpu_affinity": [-1, 8192, True, 1.0, "0", "0-3", b"01", [], [0, 0], [0, True], [None], {0: 1}, [[1]]],
    "max_workers": [0, -1, 65536, *NOT_INT],
}


def pairs(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}-{number}")
        for name, values in table.items()
        for number, value in enumerate(values)
    ]


def test_the_matrices_cover_every_field() -> None:
    assert {"directory", *BAD} == {one.name for one in dataclasses.fields(Settings)}
    assert set(RING_BAD) == {one.name for one in dataclasses.fields(RingSettings)}
    assert set(config._CHECKS) == {"directory", *BAD} and set(config._RING_CHECKS) == set(RING_BAD)


@pytest.mark.parametrize(("name", "value"), pairs(BAD))
def test_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_settings("/x", **{name: value})
    text = str(caught.value)
    assert text.startswith(name + " is ") and "must be" in text and len(text) < 400


@pytest.mark.parametrize(("name", "value"), pairs(RING_BAD))
def test_ring_refused(name: str, value: Any) -> None:
    for given_as in ({name: value}, RingSettings(**{name: value})):
        with pytest.raises(ConfigurationError) as caught:
            make_settings("/x", io_uring=given_as)
        text = str(caught.value)
        assert text.startswith(f"io_uring.{name} is ") and "must be" in text and len(text) < 400


def test_messages_give_value_type_range_and_unit() -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_settings("/x", size_limit="10GB")
    assert str(caught.value) == (
        "size_limit is '10GB' (str); it must be a whole number from 262144 to 9223372036854775807 (bytes)"
    )
    with pytest.raises(ConfigurationError, match=r'did you mean "lru"\?'):
        make_settings("/x", eviction="LRU")
    with pytest.raises(ConfigurationError, match="32768"):
        make_settings("/x", io_uring={"queue_depth": 8192})
    with pytest.raises(ConfigurationError, match="or None"):
        make_settings("/x", workers=0)
    with pytest.raises(ConfigurationError, match='one of "auto", "uring", "threads"$'):
        make_settings("/x", backend="other")
    assert make_settings("/x", backend=None).backend == make_settings("/x").backend


def test_an_endless_affinity_is_refused_at_once() -> None:
    with pytest.raises(ConfigurationError, match="cpu_affinity"):
        make_settings("/x", io_uring={"cpu_affinity": range(10**30)})


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("size_limt", "size_limit"), ("evicton", "eviction"), ("eviction_policy", "eviction"),
        ("max_size", "size_limit"), ("maxsize", "size_limit"), ("size", "size_limit"),
        ("limit", "size_limit"), ("MaxSize", "size_limit"), ("timeout", "lock_timeout"),
        ("ttl", "default_expire"), ("disk_min_file_size", "large_value_size"),
    ],
)  # fmt: skip
def test_unknown_option_names_the_closest(name: str, close: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{name} .*did you mean {close}\?"):
        make_settings("/x", **{name: 1})


def test_unknown_option_without_a_close_one_lists_all() -> None:
    with pytest.raises(ConfigurationError, match="zzzz.*known: allow_network_fs, backend, .*workers"):
        make_settings("/x", zzzz=1)


def test_unknown_ring_option() -> None:
    with pytest.raises(ConfigurationError, match=r"io_uring\.queue_dept .*mean io_uring\.queue_depth"):
        make_settings("/x", io_uring={"queue_dept": 1})
    with pytest.raises(ConfigurationError, match=r"io_uring\.1 "):
        make_settings("/x", io_uring={1: 1})
    with pytest.raises(ConfigurationError, match=r"io_uring\.max_size (?!.*size_limit)"):
        make_settings("/x", io_uring={"max_size": 1})


def test_sizes_must_fit_each_other() -> None:
    limit = 2**20
    for name in ("max_value_size", "max_stream_size"):
        with pytest.raises(ConfigurationError, match=f"{name}.*size_limit"):
            make_settings("/x", size_limit=limit, **{name: limit + 1})
    with pytest.raises(ConfigurationError, match="segment_size.*quarter of size_limit"):
        make_settings("/x", size_limit=limit, segment_size=limit // 4 + 1)
    made = make_settings("/x", size_limit=limit, max_value_size=limit, segment_size=limit // 4)
    assert made.max_value_size == limit


# -- the backend ----------------------------------------------------------------------------

BACKENDS = [
    # backend, io_uring.enabled, environment -> result
    (None, "auto", None, "auto"),
    ("auto", "auto", "", "auto"),
    ("auto", "auto", " \t", "auto"),
    ("auto", "auto", "threads", "threads"),
    (None, "auto", " Uring ", "uring"),
    ("auto", "auto", "auto", "auto"),
    ("uring", "auto", "threads", "uring"),
    ("threads", "auto", "uring", "threads"),
    ("auto", True, "threads", "uring"),
    (None, False, "uring", "threads"),
    ("uring", True, None, "uring"),
    ("threads", False, None, "threads"),
    ("threads", "auto", "nonsense", "threads"),
]


@pytest.mark.parametrize(("backend", "enabled", "variable", "expected"), BACKENDS)
def test_backend_precedence(
    monkeypatch: pytest.MonkeyPatch, backend: Any, enabled: Any, variable: str | None, expected: str
) -> None:
    if variable is not None:
        monkeypatch.setenv("YATAGARASU_BACKEND", variable)
    made = make_settings("/x", backend=backend, io_uring={"enabled": enabled})
    assert made.backend == expected and made.io_uring.enabled is enabled or enabled == "auto"
    mapping = {"disk": {"backend": backend, "io_uring": {"enabled": enabled}}}
    assert from_mapping(mapping).backend == expected


@pytest.mark.parametrize("value", ["io_uring", "thread", "1"])
def test_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("YATAGARASU_BACKEND", value)
    with pytest.raises(ConfigurationError, match=f"environment variable YATAGARASU_BACKEND is '{value}'"):
        make_settings("/x")


@pytest.mark.parametrize(("backend", "enabled"), [("uring", False), ("threads", True)])
def test_contradicting_backend(backend: str, enabled: bool) -> None:
    with pytest.raises(ConfigurationError, match=r"backend is .* but io_uring\.enabled is"):
        make_settings("/x", backend=backend, io_uring={"enabled": enabled})
    with pytest.raises(ConfigurationError, match=r"cache\.disk\.backend .*cache\.disk\.io_uring\.enabled"):
        from_mapping({"cache": {"disk": {"backend": backend, "io_uring": {"enabled": enabled}}}})


# -- fuzz -----------------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=0, max_value=2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.complex_numbers()
    | st.builds(BadRepr)
    | st.sampled_from([Codec(), object(), Codec, len, 10**400, RingSettings(), "lfu", "auto"])
)
ring_names = st.sampled_from(sorted(RING_BAD)) | st.text(max_size=8) | st.integers()
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(ring_names, scalars, max_size=3)
names = st.sampled_from(sorted(BAD)) | st.text(max_size=8).filter(lambda name: name != "directory")


def consistent(made: Settings) -> None:
    """What `make_settings` lets through is in range, and rebuilds to the same settings."""
    assert os.path.isabs(made.directory) and made.size_limit >= MIN_SIZE_LIMIT
    assert 1 <= made.io_uring.queue_depth <= 4096
    assert type(made.io_uring.sqpoll) is bool
    assert made.default_expire is None or 0 < made.default_expire < math.inf
    assert make_settings(**to_options(made)) == made


@given(st.dictionaries(names, values, max_size=3))
@hypothesis_settings(max_examples=150, deadline=None)
def test_fuzz_options(options: dict[str, Any]) -> None:
    try:
        made = make_settings("/x", **options)
    except ConfigurationError as error:
        assert str(error)
    else:
        consistent(made)


@given(st.sampled_from(sorted(BAD)), values)
@hypothesis_settings(max_examples=150, deadline=None)
def test_fuzz_one_option(name: str, value: Any) -> None:
    try:
        made = make_settings("/x", **{name: value})
    except ConfigurationError as error:
        assert name in str(error)
    else:
        consistent(made)


@given(values | st.text())
@hypothesis_settings(max_examples=100, deadline=None)
def test_fuzz_directory(value: Any) -> None:
    try:
        made = make_settings(value)
    except ConfigurationError as error:
        assert "directory" in str(error)
    else:
        consistent(made)


file_keys = st.sampled_from(
    ["cache", "disk", "enabled", "io_uring", "cache_dir", "max_disk_cache_size_mb", "memory", *BAD]
)
trees = st.recursive(
    scalars, lambda below: st.dictionaries(file_keys | st.text() | st.none(), below, max_size=4), max_leaves=8
)


@given(trees)
@hypothesis_settings(max_examples=100, deadline=None)
def test_fuzz_mapping(tree: Any) -> None:
    for mapping in (tree, {"cache": tree}, {"cache": {"disk": tree}}, {"disk": {"io_uring": tree}}):
        try:
            consistent(from_mapping(mapping))
        except ConfigurationError as error:
            assert str(error)
        try:
            is_enabled(mapping)
        except ConfigurationError as error:
            assert str(error)


# -- to_options -----------------------------------------------------------------------------


def test_to_options_round_trip() -> None:
    made = make_settings(
        "/x",
        backend="threads",
        default_expire=5,
        workers=3,
        io_uring={"cpu_affinity": [2, 1], "sqpoll": True},
    )
    options = pickle.loads(pickle.dumps(to_options(made)))
    assert make_settings(**options) == made
    assert set(options) == made.named == {"directory", "backend", "default_expire", "workers", "io_uring"}
    assert options["io_uring"]["cpu_affinity"] == (1, 2)


def test_options_are_what_was_named_or_is_no_default() -> None:
    assert set(to_options(make_settings("/x"))) == {"directory"}
    defaults = {one.name: getattr(make_settings("/x"), one.name) for one in dataclasses.fields(Settings)}
    assert set(to_options(make_settings(**defaults))) == set(defaults)
    assert set(to_options(Settings("/x", eviction="lfu"))) == {"directory", "eviction"}
    assert set(to_options(from_mapping(disk(directory="/x", headroom=0.2)))) == {"directory", "headroom"}
    assert set(to_options(from_mapping({"disk": None}))) == {"directory"}
    copied = pickle.loads(pickle.dumps(make_settings("/x", size_limit=10 * 2**30)))
    assert set(to_options(copied)) == {"directory", "size_limit"}


def test_sizes_are_compared_with_a_named_limit_only() -> None:
    """A cache may have a larger one than the default, or a smaller one."""
    assert make_settings("/x", max_value_size=11 * 2**30).max_value_size == 11 * 2**30


def test_settings_pickle_and_the_backend_stays_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YATAGARASU_BACKEND", "threads")
    made = make_settings("/x")
    monkeypatch.setenv("YATAGARASU_BACKEND", "uring")
    assert make_settings(**to_options(made)).backend == "threads"
    assert pickle.loads(pickle.dumps(made)) == made


# -- mappings -------------------------------------------------------------------------------

PLAN: dict[str, Any] = {
    "cache": {
        "enabled": True,
        "disk": {
            "enabled": True,
            "cache_dir": "/var/cache/other",
            "max_disk_cache_size_mb": 100,
            "io_uring": {
                "enabled": "auto",
                "queue_depth": 256,
                "use_registered_buffers": True,
                "use_fixed_files": False,
            },
        },
    }
}


def disk(**options: Any) -> dict[str, Any]:
    return {"cache": {"disk": options}}


def test_the_plans_shape() -> None:
    made = from_mapping(PLAN)
    assert made == make_settings("/var/cache/other", size_limit=100 * 2**20, io_uring={"queue_depth": 256})
    assert from_mapping(PLAN["cache"]) == made


@pytest.mark.parametrize("mapping", [{"cache": {}}, {"cache": None}, {"disk": None}, {"cache": {"disk": {}}}])
def test_defaults_of_the_file(mapping: Any) -> None:
    made = from_mapping(mapping)
    assert made == make_settings("/var/cache/yatagarasu", size_limit=10240 * 2**20)
    assert made.size_limit == Settings.size_limit


def test_settings_by_their_own_name() -> None:
    made = from_mapping(
        disk(directory="/y", size_limit=2**20, eviction="lfu", file_mode="0o640", io_uring=None)
    )
    assert made == make_settings("/y", size_limit=2**20, eviction="lfu", file_mode=0o640)


def test_the_mapping_is_left_alone() -> None:
    before = json.dumps(PLAN)
    from_mapping(PLAN)
    assert json.dumps(PLAN) == before


@pytest.mark.parametrize(
    ("options", "path", "close"),
    [
        (
            {"io_uring": {"queue_dept": 1}},
            "cache.disk.io_uring.queue_dept",
            "cache.disk.io_uring.queue_depth",
        ),
        ({"cachedir": "/x"}, "cache.disk.cachedir", "cache.disk.cache_dir"),
        ({"max_disk_cache_size": 1}, "cache.disk.max_disk_cache_size", "cache.disk.max_disk_cache_size_mb"),
        ({"evicton": 1}, "cache.disk.evicton", "cache.disk.eviction"),
    ],
)
def test_unknown_key_gives_its_full_path(options: Any, path: str, close: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        from_mapping(disk(**options))
    assert str(caught.value).startswith(path + " ") and f"did you mean {close}?" in str(caught.value)
    with pytest.raises(ConfigurationError, match="^" + re.escape(path.replace("cache.", "", 1)) + " "):
        from_mapping({"disk": options})


@pytest.mark.parametrize(
    ("mapping", "path"),
    [
        (disk(max_disk_cache_size_mb=0), "cache.disk.max_disk_cache_size_mb"),
        (disk(max_disk_cache_size_mb=1.5), "cache.disk.max_disk_cache_size_mb"),
        (disk(max_disk_cache_size_mb=None), "cache.disk.max_disk_cache_size_mb"),
        (disk(max_disk_cache_size_mb=2**43), "cache.disk.max_disk_cache_size_mb"),
        (disk(cache_dir=""), "cache.disk.cache_dir"),
        (disk(cache_dir=None), "cache.disk.cache_dir"),
        (disk(workers=0), "cache.disk.workers"),
        (disk(io_uring={"queue_depth": 0}), "cache.disk.io_uring.queue_depth"),
        (disk(io_uring={"queue_depth": True}), "cache.disk.io_uring.queue_depth"),
        (disk(io_uring=True), "cache.disk.io_uring"),
        (disk(max_disk_cache_size_mb=1, max_value_size=2**21), "cache.disk.max_value_size"),
        (disk(size_limit=2**20, segment_size=2**20), "cache.disk.segment_size"),
        ({"cache": {"disk": []}}, "cache.disk"),
        ({"cache": {"disk": True}}, "cache.disk"),
        ({"cache": "yes"}, "cache"),
        ({"cache": {"enabled": "yes"}}, "cache.enabled"),
        ({"cache": {"disk": {"enabled": 1}}}, "cache.disk.enabled"),
        ({"disk": {"enabled": None}}, "disk.enabled"),
        ({"cache": {"size": 5}}, "cache.size"),
        ({"cache": {"dsik": {}}}, "cache.dsik"),
        ({"cache": {"Disk": {}}}, "cache.Disk"),
        ({"cache": {"memory": [1]}}, "cache.memory"),
        ({"cache": {1: {}}}, "cache.1"),
        ({"cache": {"disk": {1: 1}}}, "cache.disk.1"),
        ([], "the configuration"),
        ("text", "the configuration"),
    ],
)
def test_refused_in_a_file(mapping: Any, path: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        from_mapping(mapping)
    assert str(caught.value).startswith(path + " ")


@pytest.mark.parametrize("mapping", [{}, None, {"cahce": {"disk": {}}}, {1: 2, "cache_dir": "/x"}])
def test_no_cache_section(mapping: Any) -> None:
    for read in (from_mapping, is_enabled):
        with pytest.raises(ConfigurationError, match="neither a cache section nor a disk section"):
            read(mapping)


@pytest.mark.parametrize(
    "options", [{"cache_dir": "/x", "directory": "/x"}, {"max_disk_cache_size_mb": 1, "size_limit": 2**20}]
)
def test_two_names_of_one_setting(options: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        from_mapping(disk(**options))
    assert all(f"cache.disk.{name}" in str(caught.value) for name in options)


@pytest.mark.parametrize(
    ("mapping", "name"),
    [
        ({"cache": {"enabled": False}}, "cache.enabled"),
        ({"cache": {"enabled": False, "disk": {"enabled": False}}}, "cache.enabled"),
        ({"cache": {"disk": {"enabled": False}}}, "cache.disk.enabled"),
        ({"enabled": False, "disk": {}}, "enabled"),
        ({"disk": {"enabled": False, "nonsense": 1}}, "disk.enabled"),
    ],
)
def test_switched_off(mapping: Any, name: str) -> None:
    assert is_enabled(mapping) is False
    with pytest.raises(ConfigurationError, match=rf"switched off in the configuration \({name} is false"):
        from_mapping(mapping)


def test_is_enabled_looks_at_nothing_else() -> None:
    assert is_enabled(PLAN) is True
    assert is_enabled({"cache": None}) is True
    assert is_enabled({"cache": {"disk": {"nonsense": 1}}, "server": 1}) is True
    with pytest.raises(ConfigurationError, match=r"cache\.enabled"):
        is_enabled({"cache": {"enabled": "no"}})


def test_other_sections_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    others = {"memory": {"size": 1}, "redis": None}
    with caplog.at_level(logging.INFO, "yatagarasu_cache"):
        made = from_mapping({"cache": {"disk": {}, **others}, "server": {"port": 1}})
    assert made == from_mapping({"cache": {}})
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "cache.memory, cache.redis" in record.getMessage()


def test_an_unused_ring_section_is_checked() -> None:
    """That it is not used is logged where the backend is chosen: see test_fallback."""
    made = from_mapping(disk(io_uring={"enabled": False, "queue_depth": 64}))
    assert made.backend == "threads" and made.io_uring.queue_depth == 64
    with pytest.raises(ConfigurationError, match="queue_depth"):
        from_mapping(disk(io_uring={"enabled": False, "queue_depth": 0}))


# -- files ----------------------------------------------------------------------------------

TOML = '[cache.disk]\ncache_dir = "/t"\nfile_mode = 0o640\n[cache.disk.io_uring]\nenabled = "auto"\n'
YAML = "cache:\n  disk:\n    cache_dir: /t\n    file_mode: 0o640\n    io_uring: {enabled: auto}\n"
JSON = '{"cache": {"disk": {"cache_dir": "/t", "file_mode": "0o640", "io_uring": {"enabled": "auto"}}}}'
needs_toml = pytest.mark.skipif(not HAS_TOML, reason="tomli is not installed")


def file_name_only(value: Any) -> str:
    """Short test ids: the file's name, not its content."""
    return value if isinstance(value, str) and re.fullmatch(r"\w+\.?\w+", value) else "_"


def write(folder: pathlib.Path, name: str, content: str | bytes) -> pathlib.Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.yaml", YAML),
        ("c.yml", YAML),
        ("C.YML", YAML),
        ("bom.yaml", "\ufeff" + YAML),
        ("c.json", JSON),
        ("bom.json", "\ufeff" + JSON),
        pytest.param("c.toml", TOML, marks=needs_toml),
        pytest.param("bom.toml", "\ufeff" + TOML, marks=needs_toml),
    ],
    ids=file_name_only,
)
def test_load(tmp_path: pathlib.Path, name: str, content: str) -> None:
    if ".y" in name.lower():
        pytest.importorskip("yaml")
    path = write(tmp_path, name, content)
    expected = make_settings("/t", file_mode=0o640)
    assert load(path) == expected and load(str(path)) == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bad.yaml", "cache:\n  disk: [1,\n", "not valid YAML: line 3"),
        ("two.yaml", "cache: {}\n---\ncache: {}\n", "not valid YAML: line 2"),
        ("tag.yaml", "cache: !!python/object:os.system {}\n", "not valid YAML: line 1"),
        ("odd.yaml", "cache: !!timestamp x\n", "not valid YAML"),
        ("date.yaml", "cache: 2020-99-99\n", "not valid YAML"),
        ("key.yaml", "? [1]\n: 2\n", "not valid YAML"),
        ("deep.yaml", "[" * 5000, "not valid YAML"),
        ("twice.yaml", "cache:\n  disk:\n    workers: 1\n    workers: 2\n", "line 4: workers is given twice"),
        ("empty.yaml", "", "neither a cache section"),
        ("list.yaml", "- 1\n", "the configuration is"),
        ("range.yaml", "cache: {disk: {workers: 0}}", "cache.disk.workers is 0"),
        ("loop.yaml", "cache: &a\n  disk: *a\n", "cache.disk.disk is not a known"),
        ("octal.yaml", "cache: {disk: {directory_mode: 700}}", "cache.disk.directory_mode is 700"),
        ("off.yaml", "cache: {enabled: off}", "switched off"),
        ("bad.json", '{"cache":\n  {,}}', "not valid JSON"),
        ("line.json", '{"cache":\n  {,}}', "line 2"),
        ("deep.json", "[" * 200_000, "not valid JSON"),
        ("twice.json", '{"cache": {"disk": {"workers": 1, "workers": 2}}}', "workers is given twice"),
        ("nan.json", '{"disk": {"default_expire": NaN}}', "disk.default_expire is nan"),
        ("latin.json", '{"cache": {"disk": "\xe9"}}'.encode("latin-1"), "not UTF-8 text (byte 20)"),
        pytest.param("bad.toml", "[cache]\nenabled = yes\n", "line 2", marks=needs_toml),
        pytest.param(
            "twice.toml", "[cache]\nenabled = true\nenabled = true\n", "not valid TOML", marks=needs_toml
        ),
        ("c.ini", "[cache]\n", "the suffix '.ini' names no known format; use one of .yaml"),
        ("cache", "", "the suffix '' names no known format"),
    ],
    ids=file_name_only,
)
def test_load_refuses(tmp_path: pathlib.Path, name: str, content: str | bytes, words: str) -> None:
    if name.endswith(".yaml"):
        pytest.importorskip("yaml")
    path = write(tmp_path, name, content)
    with pytest.raises(ConfigurationError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ") and words in str(caught.value)
    assert len(str(caught.value)) < 600


def test_merge_keys_and_anchors_are_no_duplicates(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("yaml")
    text = (
        "base: &base {enabled: auto, queue_depth: 64}\nother: &o {<<: *base, queue_depth: 65}\n"
        "cache:\n  disk:\n    cache_dir: /t\n    io_uring:\n      <<: *o\n      queue_depth: 66\n"
    )
    assert load(write(tmp_path, "m.yaml", text)).io_uring.queue_depth == 66


def test_missing_file_and_directory(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path / "none.json", tmp_path / "dir.json"):
        if path.name.startswith("dir"):
            path.mkdir()
        with pytest.raises(ConfigurationError, match="cannot read it") as caught:
            load(path)
        assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("path", ["", "a\0.json", None, 3])
def test_bad_path(path: Any) -> None:
    with pytest.raises(ConfigurationError, match="the configuration file"):
        load(path)


@pytest.mark.parametrize(
    ("name", "module", "words"),
    [
        ("c.yaml", "yaml", r'PyYAML: pip install "yatagarasu_cache\[yaml\]"'),
        ("c.toml", "tomllib", r'tomli: pip install "yatagarasu_cache\[toml\]"'),
    ],
)
def test_missing_parser_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, name: str, module: str, words: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(ConfigurationError, match=words):
        load(write(tmp_path, name, ""))


def test_import_needs_no_parser() -> None:
    code = "import sys, yatagarasu_cache.config\nprint({'yaml', 'tomllib', 'tomli'} & set(sys.modules))"
    root = pathlib.Path(config.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# -- documentation --------------------------------------------------------------------------


def blocks() -> list[tuple[str, str]]:
    return re.findall(r"^```(yaml|toml)\n(.*?)^```", DOCS.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_every_example_in_the_docs_loads(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("yaml")
    made = {}
    for number, (kind, text) in enumerate(blocks()):
        if kind == "yaml" or HAS_TOML:
            made[number] = load(write(tmp_path, f"{number}.{kind}", text))
    assert [kind for kind, _ in blocks()] == ["yaml"] * 4 + ["toml"]
    assert [made[number].backend for number in range(4)] == ["threads", "uring", "auto", "auto"]
    assert all(one.directory == "/var/cache/yatagarasu" for one in made.values())


def table(heading: str) -> dict[str, str]:
    """Name to default of the first table after `heading`."""
    text = DOCS.read_text("utf-8").split(f"\n{heading}\n", 1)[1]
    rows = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert rows is not None
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in rows[0].splitlines()]
    assert cells[0] == ["Name", "Type", "Unit", "Default", "Allowed", "Meaning"]
    assert all(len(row) == 6 and row[5] for row in cells)
    return {row[0].strip("`"): row[3].strip("`") for row in cells[2:]}


@pytest.mark.parametrize(("heading", "kind"), [("## Settings", Settings), ("### `io_uring`", RingSettings)])
def test_the_tables_list_exactly_the_fields(heading: str, kind: Any) -> None:
    documented = table(heading)
    fields = dataclasses.fields(kind)
    assert list(documented) == [one.name for one in fields]
    for one in fields:
        text = documented[one.name]
        if one.name == "directory":
            assert text == "required"
        elif one.name == "io_uring":
            assert text == "RingSettings()"
        else:
            value = ast.literal_eval(text)
            assert value == one.default and type(value) is type(one.default)
