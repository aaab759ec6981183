"""The tag tables of an index alone: against a dict, killed at any store, swapped under a reader, damaged."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_index import IDENTITY, STEPS, TABLE, Killed, Stepped, create, some_digest, some_slot, stepped, view

from yatagarasu_cache.backends.threads import ThreadsBackend
from yatagarasu_cache.store import format as f
from yatagarasu_cache.store import tag_table
from yatagarasu_cache.store.format import PARTITIONS, SLOT_WORDS, UNTAGGED, Slot
from yatagarasu_cache.store.index import Index, IndexDamaged
from yatagarasu_cache.store.tag_table import TagTable

__all__ = ["stepped"]  # a fixture

HASHES = (0, 1, 5, 0xFFFFFFFF)  # of a table of 4 chains the last three are in one
Tagged = dict[tuple[int, int], tuple[Slot, int]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index"


@pytest.fixture
def index(path: Path) -> Iterator[Index]:
    made = create(path)
    yield made
    made.close()


def put(index: Index, model: Tagged, chosen: random.Random, digest: tuple[int, int], tag_hash: int) -> None:
    """A new version of an entry: stamps only grow."""
    slot = some_slot(chosen, digest)._replace(stamp=index.stamp())
    index.put(slot, index.find(*digest), tag_hash)
    model[digest] = slot, tag_hash


def found(index: Index, tag_hash: int) -> set[tuple[int, int]]:
    """The entries of a tag, as `Tags` finds them."""
    digests = []
    for part in range(PARTITIONS):
        cells = index.tagged(part, tag_hash)
        assert cells is not None
        for low, high, stamp, _ in cells:
            at = index.find(low, high)
            if at and index.words[at + f.S_STAMP] == stamp:
                digests.append((low, high))
    assert len(set(digests)) == len(digests)
    return set(digests)


def check(index: Index, model: Tagged) -> None:
    for tag_hash in HASHES[1:]:
        assert found(index, tag_hash) == {digest for digest, (_, hash_) in model.items() if hash_ == tag_hash}
    index.ensure_tags()
    index.validate()


def rooms(index: Index) -> list[int]:
    tables = [index._tag_table(part) for part in range(PARTITIONS)]
    return [table.room for table in tables if table is not None]


def change(index: Index, model: Tagged, chosen: random.Random, parts: int) -> None:
    what = chosen.random()
    digest = chosen.choice(list(model)) if model and chosen.random() < 0.7 else some_digest(chosen, parts)
    at = index.find(*digest)
    if what < 0.6 or not at:
        put(index, model, chosen, digest, chosen.choice(HASHES))
    elif what < 0.8:
        index.remove(at)
        del model[digest]
    elif what < 0.9:
        place = f.pack_place(3, 16 * chosen.randrange(1 << 20))
        index.move(at, place)
        model[digest] = model[digest][0]._replace(place=place), model[digest][1]
    elif what < 0.98:
        index.words[at + f.S_EXPIRES] = chosen.getrandbits(40)
    elif what < 0.99:
        index._grow(digest[1] % PARTITIONS)
    else:
        index.reset()
        model.clear()


@settings(max_examples=25)
@given(seed=st.integers(0, 1 << 32), steps=st.integers(1, 400), parts=st.sampled_from([1, 2, PARTITIONS]))
def test_like_a_dict(tmp_path_factory: Any, seed: int, steps: int, parts: int) -> None:
    chosen, model = random.Random(seed), Tagged()
    path = tmp_path_factory.mktemp("index") / "index"
    index, other = create(path), None
    try:
        for _ in range(steps):
            change(index, model, chosen, parts)
        check(index, model)
        other = view(path, writable=False)
        check(other, model)
        fresh = Index.create(ThreadsBackend(), f"{path}-2", IDENTITY, TABLE, 0o600)
        index.copied_to(fresh)
        check(fresh, model)
        counting = sum(hash_ > 0 for _, hash_ in model.values())
        cells = sum(table.count for part in range(PARTITIONS) if (table := fresh._tag_table(part)) is not None)
        assert cells == counting, "what does not count is left out"
        fresh.close()
    finally:
        index.close()
        if other is not None:
            other.close()


def test_an_untagged_index_has_no_tables(index: Index, path: Path) -> None:
    chosen, model = random.Random(1), Tagged()
    for _ in range(500):
        put(index, model, chosen, some_digest(chosen), 0)
    assert index.words[f.W_TAGS : f.W_TAGS + PARTITIONS].tolist() == [UNTAGGED] * PARTITIONS
    assert not index.has_tags and index.most_tagged() == 0
    put(index, model, chosen, some_digest(chosen), 7)
    assert index.has_tags and index.most_tagged() >= 1
    index.reset()
    assert not index.has_tags


def test_cells_that_do_not_count_are_collected(index: Index) -> None:
    chosen, model = random.Random(2), Tagged()
    digests = [some_digest(chosen, 1) for _ in range(50)]
    for digest in digests:
        put(index, model, chosen, digest, 9)
    size = index.words[f.W_INDEX_BYTES]
    for _ in range(5000):
        put(index, model, chosen, chosen.choice(digests), chosen.choice(HASHES))
        (room,) = rooms(index)
        assert room <= 2.25 * 51 + f.TAG_CELLS
    assert index.words[f.W_INDEX_BYTES] <= size + 4 * 4096  # places that were left are used again
    for digest in digests[1:]:
        index.remove(index.find(*digest))
    for _ in range(200):
        put(index, model, chosen, digests[0], 9)
    assert rooms(index) == [14]


def test_tables_grow_by_shares(index: Index) -> None:
    """One that is made anew has room for 1.75 to 2.25 times its cells, and they differ."""
    factors = [tag_table.growth(part) for part in range(PARTITIONS)]
    assert 1.75 <= min(factors) < max(factors) < 2.25 and len(set(factors)) == PARTITIONS
    for cells in (0, 1, 13, 14, 1000):
        for factor in factors:
            slots = tag_table.slots_for(cells, factor)
            assert slots % f.TAG_CELL_SLOTS == 0
            assert (cells + 1) * factor - 1 < slots // f.TAG_CELL_SLOTS * f.TAG_CELLS <= max(14, (cells + 1) * factor + 7)


# -- killed at any store -------------------------------------------------------------------------


def filled(path: Path, kind: type[Index], cells: int) -> tuple[Index, Tagged]:
    """One partition of five entries, whose table has so many cells."""
    chosen, model = random.Random(3), Tagged()
    index = create(path, kind)
    for _ in range(5):
        put(index, model, chosen, some_digest(chosen, 1), 0)
    for number in range(cells):
        put(index, model, chosen, list(model)[number % 5], 5)
    return index, model


Change = Callable[[Index, Tagged], None]
NEW = (7 << 2 | 2, 99 << 6)


def put_new(index: Index, model: Tagged) -> None:
    put(index, model, random.Random(4), NEW, 5)


def put_over(index: Index, model: Tagged) -> None:
    put(index, model, random.Random(5), list(model)[0], 1)


@pytest.mark.parametrize("cells", [0, 7, 14])  # the table is made, has room, is made anew
@pytest.mark.parametrize("work", [put_new, put_over])
@pytest.mark.usefixtures("stepped")
def test_a_process_killed_at_any_store(tmp_path: Path, work: Change, cells: int) -> None:
    """The entry is found by its tag as soon as it is shown, and not before; the next change is right."""
    killed = shown = 0
    while True:
        path = tmp_path / f"index{killed}"
        index, model = filled(path, Stepped, cells)
        after = dict(model)
        STEPS.left = killed
        try:
            work(index, after)
            break
        except Killed:
            killed += 1
        finally:
            STEPS.left = 1 << 60
        index.close()
        other = view(path)
        other.repair()
        slots = {slot[:2]: slot for slot in map(other.slot, list(other.live_slots()))}
        changed = [slot for digest, slot in slots.items() if digest not in model or slot != model[digest][0]]
        hash_ = 5 if work is put_new else 1
        for slot in changed:
            assert found(other, hash_) >= {slot[:2]}
            model[slot[:2]] = slot, hash_
        shown += bool(changed)
        check(other, model)
        for number in range(20):
            put(other, model, random.Random(number), list(model)[number % 5], 5)
            check(other, model)
        other.close()
    index.close()
    assert killed > 15 and 0 < shown < killed


# -- readers take no lock ------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 3, 100])
def test_another_table_comes_under_a_reader(index: Index, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """It begins again; if that never ends, it says so."""
    chosen, model = random.Random(6), Tagged()
    for _ in range(12):
        put(index, model, chosen, some_digest(chosen, 1), 5)
    whole, left = TagTable.of_hash, times

    def of_hash(self: TagTable, tag_hash: int) -> Any:
        nonlocal left
        cells = whole(self, tag_hash)
        if left:
            left -= 1
            index._renew_tags(0, None)
            return cells[:3]  # what it would make of the place of the one before
        return cells

    monkeypatch.setattr(TagTable, "of_hash", of_hash)
    cells = index.tagged(0, 5)
    if times == 100:
        assert cells is None
    else:
        assert cells is not None and {cell[:2] for cell in cells} == set(model)


def test_a_table_that_comes_to_the_place_of_another_is_told_apart(index: Index) -> None:
    chosen, model = random.Random(7), Tagged()
    for _ in range(5):
        put(index, model, chosen, some_digest(chosen, 1), 5)
    before = index._tag_table(0)
    assert before is not None and before.is_in_place
    while index.words[f.W_TAGS] != before._descriptor or before.is_in_place:
        index._renew_tags(0, None)
    assert not before.is_in_place


def test_a_superseded_index_says_so(index: Index) -> None:
    put(index, Tagged(), random.Random(8), NEW, 5)
    index.supersede()
    for part in (0, 1):
        with pytest.raises(IndexDamaged, match="superseded"):
            index.tagged(part, 5)


def test_no_cell_begins_like_a_slot(index: Index) -> None:
    """Who still searches the partition that was where a table is now does not take a cell for the entry's slot."""
    chosen, model = random.Random(9), Tagged()
    for _ in range(40):
        put(index, model, chosen, some_digest(chosen, 1), 5)
    descriptor = index.words[f.W_TAGS]
    first, slots = descriptor >> f.DESCRIPTOR_BITS, descriptor & f.CAPACITY_MASK
    words = set(index.words[first * SLOT_WORDS : (first + slots) * SLOT_WORDS : 4].tolist())
    assert not words & {low for low, _ in model} and words & {low ^ f.DIGEST_BIT for low, _ in model}


# -- damage --------------------------------------------------------------------------------------


def chain_word(index: Index, tag_hash: int = 5) -> int:
    table = index._tag_table(0)
    assert table is not None
    return table._chain_of(tag_hash)


def cell_word(index: Index, number: int, field: str) -> int:
    table = index._tag_table(0)
    assert table is not None
    return table._first_cell + (number - 1) * f.TAG_CELL_WORDS + f.TagCell._fields.index(field)


def base(index: Index) -> int:
    return (index.words[f.W_TAGS] >> f.DESCRIPTOR_BITS) * SLOT_WORDS


DAMAGE: dict[str, Callable[[Index], tuple[int, int]]] = {
    "no chain": lambda i: (chain_word(i), 0),
    "a chain that is too long": lambda i: (chain_word(i), i.words[chain_word(i)] + (1 << 32)),
    "a chain that is too short": lambda i: (chain_word(i), i.words[chain_word(i)] - (1 << 32)),
    "a chain beyond all cells": lambda i: (chain_word(i), 99 << 32 | 1),
    "a chain that leads out": lambda i: (chain_word(i), 1 << 32 | 99),
    "a chain that leads nowhere": lambda i: (chain_word(i), 1 << 32 | f.NO_CELL),
    "a chain of no cells": lambda i: (chain_word(i), 3),
    "a circle": lambda i: (cell_word(i, 3, "link"), 5 << 32 | 3),
    "a link out of the table": lambda i: (cell_word(i, 3, "link"), 5 << 32 | 1 << 30),
    "no link": lambda i: (cell_word(i, 3, "link"), 0),
    "a cell of another chain": lambda i: (cell_word(i, 3, "link"), i.words[cell_word(i, 3, "link")] ^ 1 << 32),
    "a cell of another partition": lambda i: (cell_word(i, 3, "high"), 1),
    "a cell that begins like a slot": lambda i: (cell_word(i, 3, "low"), 2),
    "more cells than it has": lambda i: (base(i), 1 << 20),
    "no cells": lambda i: (base(i), 0),
    "another descriptor": lambda i: (base(i) + 1, i.words[base(i) + 1] ^ 4),
    "a descriptor of another length": lambda i: (f.W_TAGS, i.words[f.W_TAGS] ^ 4),
    "a descriptor of no slots": lambda i: (f.W_TAGS, i.words[f.W_TAGS] & ~f.CAPACITY_MASK),
    "a descriptor beyond the end": lambda i: (f.W_TAGS, 1 << 60 | 8),
    "a descriptor within the header": lambda i: (f.W_TAGS, 1 << f.DESCRIPTOR_BITS | 8),
    "a descriptor of another place": lambda i: (f.W_TAGS, i.words[f.W_TAGS] + (1 << f.DESCRIPTOR_BITS)),
    "no descriptor": lambda i: (f.W_TAGS, 0),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_told(index: Index, damage: Callable[[Index], tuple[int, int]]) -> None:
    chosen, model = random.Random(10), Tagged()
    for _ in range(6):
        put(index, model, chosen, some_digest(chosen, 1), 5)
    check(index, model)
    word, value = damage(index)
    index.words[word] = value
    with pytest.raises(IndexDamaged):
        index.tagged(0, 5)
    with pytest.raises(IndexDamaged):
        index.ensure_tags()


@pytest.mark.parametrize("seed", range(30))
def test_damaged_tables_raise_nothing_else(index: Index, seed: int) -> None:
    """Whatever the words are: each call comes to its end, and gives what can be or says that it is damaged."""
    chosen, model = random.Random(seed), Tagged()
    for _ in range(60):
        put(index, model, chosen, some_digest(chosen, 2), chosen.choice(HASHES))
    words = [
        word
        for part in range(2)
        for d in [index.words[f.W_TAGS + part]]
        for word in range((d >> 24) * SLOT_WORDS, ((d >> 24) + (d & f.CAPACITY_MASK)) * SLOT_WORDS)
    ]
    for _ in range(40):
        at = chosen.choice([*words, f.W_TAGS, f.W_TAGS + 1])
        before = index.words[at]
        index.words[at] = chosen.choice(
            (0, before ^ 1 << chosen.randrange(64), before + 1 & f.MASK64, chosen.getrandbits(64), f.MASK64)
        )
        for use in (
            lambda: [index.tagged(part, hash_) for part in range(2) for hash_ in HASHES[1:]],
            lambda: [index.live_tags(part) for part in range(2)],
            lambda: [index.tag_words(part) for part in range(2)],
            lambda: put(index, model, chosen, some_digest(chosen, 2), 5),
            index.ensure_tags, index.validate, index.most_tagged,
        ):  # fmt: skip
            try:
                use()
            except IndexDamaged:
                pass
        if chosen.random() < 0.7:
            index.words[at] = before
