"""What `top` makes of two looks and a sample: arithmetic, without a cache and without a clock."""

from __future__ import annotations

import pytest

from yatagarasu_cache.cli.rates import (
    BLOCKS,
    Figures,
    Group,
    History,
    Rates,
    bar,
    groups,
    prefix_of,
    rates,
    sparkline,
    tag_of,
)


def test_rates_are_differences_by_the_second() -> None:
    before = Figures(10.0, hits=100, misses=10, sets=5, disk=1000)
    found = rates(before, Figures(12.0, hits=130, misses=20, sets=9, deletes=2, evictions=1, expirations=6, disk=600))
    assert found == Rates(2.0, 15.0, 5.0, 2.0, 1.0, 0.5, 3.0, -200.0)
    assert found.gets == 20.0 and found.hit_ratio == 0.75


def test_counters_that_began_anew_count_from_zero() -> None:
    assert rates(Figures(0.0, hits=1000), Figures(2.0, hits=10)).hits == 5.0


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_no_time_is_no_rate(seconds: float) -> None:
    assert rates(Figures(5.0), Figures(5.0 + seconds, hits=7)) == Rates()


def test_without_gets_there_is_no_hit_ratio() -> None:
    assert Rates(seconds=1.0, sets=5.0).hit_ratio is None


def test_the_course_of_a_minute_is_in_parts() -> None:
    history = History()
    assert history.course(lambda one: one.gets, 3) == [None, None, None]
    for at, hits in ((100.0, 1.0), (150.0, 2.0), (155.0, 4.0), (159.0, 10.0), (160.0, 20.0)):
        history.add(at, Rates(hits=hits))
    # The look at 100 is a minute old, and forgotten.
    assert history.course(lambda one: one.gets, 6) == [None, None, None, None, 2.0, 34 / 3]
    history.forget()
    assert history.course(lambda one: one.gets, 1) == [None]


def test_sparklines() -> None:
    assert sparkline([]) == ""
    assert sparkline([None, 0, 0]) == " ▁▁"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == BLOCKS
    assert sparkline([None, 7.0], "ab") == " b"


@pytest.mark.parametrize(
    ("part", "whole", "shown"),
    [(0, 10, "...."), (5, 10, "##.."), (10, 10, "####"), (99, 10, "####"), (1, 0, "...."), (-1, 10, "....")],
)
def test_bars(part: float, whole: float, shown: str) -> None:
    assert bar(part, whole, 4, "#", ".") == shown


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        ("img/a/b.png", "img/"), ("user:7", "user:"), ("a.b/c", "a."), ("plain", "<str>"), ("", "<str>"),
        ("x" * 50 + "/y", "<str>"), (b"img/a", "b'img/'"), (b"\xff:", "b'\\xff:'"), (b"plain", "<bytes>"),
        (("img", 7), "('img', ...)"), (("x" * 50, 7), "<tuple>"), ((1,), "<tuple>"), (7, "<int>"),
        (None, "<NoneType>"),
    ],
)  # fmt: skip
def test_prefixes(key: object, prefix: str) -> None:
    assert prefix_of(key) == prefix


def test_tags() -> None:
    assert [tag_of(tag) for tag in (None, "img", 7, b"x")] == ["<none>", "img", "7", "b'x'"]


def test_groups_are_the_largest_first_and_scaled_to_all_entries() -> None:
    assert groups([], 100, 5) == []
    assert groups(["b", "a", "a", "c"], 1000, 2) == [Group("a", 0.5, 500), Group("b", 0.25, 250)]
