"""Blocks are never lost, shared or handed out twice, after any history, of one tier as of two."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import assert_the_free_list_is_right

from jaxkv.cache.tables import HeadTables

LAYERS, BATCH, HEADS, BLOCKS, WIDTH = 2, 3, 2, 40, 10
MOST = 48
KINDS = {"unquantised": (16,), "quantised": (16, 24)}

grown = jax.jit(lambda tables, lengths: tables.grow(lengths, most=MOST))
cut = jax.jit(lambda tables, lengths: tables.shrink(lengths))
reordered = jax.jit(lambda tables, rows: tables.reorder(rows))
roomy = jax.jit(lambda tables, lengths: tables.has_room(lengths))


def new_tables(sizes):
    return HeadTables.empty((LAYERS, BATCH, HEADS), max_blocks=WIDTH, num_blocks=BLOCKS, kvs_a_block=sizes)


def held_by(tables):
    """Block ids of each head and tier, in the tier's order."""
    table, lengths = np.asarray(tables.block_table), np.asarray(tables.lengths)
    counts = -(-lengths // np.array(tables.kvs_a_block))
    return {
        (*head, tier): (table[head] if tier == 0 else table[head][::-1])[: counts[(*head, tier)]].tolist()
        for head in np.ndindex(lengths.shape[:3])
        for tier in range(lengths.shape[3])
    }


def check(tables):
    """Every block but the null block is in exactly one place: the free stack or one table row."""
    free = np.asarray(tables.free.blocks)[: int(tables.free.count)].tolist()
    held = [block for blocks in held_by(tables).values() for block in blocks]
    assert sorted(free + held) == list(range(1, BLOCKS))


def poisoned(tables, rng):
    """Garbage in every table entry that is no head's."""
    place, counts = np.arange(WIDTH), np.asarray(tables.blocks_held())
    mine = place < counts[..., :1]
    if len(tables.kvs_a_block) == 2:
        mine = mine | (place >= WIDTH - counts[..., 1:])
    garbage = rng.integers(0, BLOCKS, mine.shape)
    return replace(tables, block_table=jnp.asarray(np.where(mine, tables.block_table, garbage), jnp.int32))


actions = st.lists(
    st.tuples(st.sampled_from(["grow", "grow", "grow", "cut", "end"]), st.integers(0, 2**31)), max_size=25
)


@pytest.mark.parametrize("kind", KINDS)
@given(actions=actions)
def test_conservation_after_any_history(kind, actions):
    sizes = np.array(KINDS[kind])
    tables = new_tables(KINDS[kind])
    for action, seed in actions:
        rng = np.random.default_rng(seed)
        tables = poisoned(tables, rng)
        lengths, before = np.asarray(tables.lengths), held_by(tables)
        free = int(tables.free.count)
        if action == "grow":
            more = rng.integers(0, MOST + 1, lengths.shape) * rng.integers(0, 2, BATCH)[:, None, None]
            wanted = lengths + more
            blocks = -(-wanted // sizes)
            extra = int((blocks - -(-lengths // sizes)).sum())
            after, granted = grown(tables, jnp.asarray(wanted, jnp.int32))
            assert bool(granted) == (extra <= free and bool((blocks.sum(-1) <= WIDTH).all()))
            assert bool(granted) == bool(roomy(tables, jnp.asarray(wanted, jnp.int32)))
            if granted:
                assert int(after.free.count) == free - extra
                np.testing.assert_array_equal(after.lengths, wanted)
                now = held_by(after)
                assert all(now[head][: len(old)] == old for head, old in before.items())  # what it had, it keeps
            else:
                jax.tree.map(np.testing.assert_array_equal, after, tables)
            tables = after
        else:
            shorter = rng.integers(0, lengths + 1)
            if action == "end":
                shorter = lengths * rng.integers(0, 2, BATCH)[:, None, None]
            tables = cut(tables, jnp.asarray(shorter, jnp.int32))
            np.testing.assert_array_equal(tables.lengths, shorter)
        check(tables)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**31), orders=st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), max_size=4))
def test_a_block_is_free_once_its_last_holder_has_given_it_back(kind, seed, orders):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, MOST // 2, (LAYERS, BATCH, HEADS, len(KINDS[kind])))
    tables, granted = grown(new_tables(KINDS[kind]), jnp.asarray(lengths, jnp.int32))
    assert granted
    for order in orders:
        before = held_by(tables)
        tables = reordered(poisoned(tables, rng), jnp.array(order))
        for (layer, row, head, tier), blocks in held_by(tables).items():
            assert blocks == before[layer, order[row], head, tier]
        assert_the_free_list_is_right(tables.free, held_by(tables).values())
    tables = cut(tables, jnp.zeros_like(tables.lengths))
    assert int(tables.free.count) == BLOCKS - 1
    assert_the_free_list_is_right(tables.free, [])


def test_exactly_full_and_exactly_empty():
    size = 16
    tables = new_tables((size,))
    lengths = np.full((LAYERS, BATCH, HEADS, 1), size * 3, np.int32)
    lengths.flat[0] = size * 6  # 11 * 3 + 6 = 39 = all
    part, granted = grown(tables, jnp.minimum(jnp.asarray(lengths), MOST))
    full, also = grown(part, jnp.asarray(lengths))
    assert granted
    assert also
    assert int(full.free.count) == 0
    check(full)
    refused, granted = grown(full, jnp.asarray(lengths).at[0, 0, 0].add(1))
    assert not granted
    jax.tree.map(np.testing.assert_array_equal, refused, full)
    empty = cut(full, jnp.zeros_like(full.lengths))
    assert int(empty.free.count) == BLOCKS - 1
    check(empty)


def test_a_row_longer_than_the_table_is_refused():
    tables = new_tables((16,))
    lengths = jnp.zeros_like(tables.lengths).at[0, 0, 0].set(WIDTH * 16)
    for at in (*range(MOST, WIDTH * 16, MOST), WIDTH * 16):
        tables, granted = grown(tables, jnp.minimum(lengths, at))
        assert granted
    after, granted = grown(tables, lengths + (lengths > 0))
    assert not granted
    jax.tree.map(np.testing.assert_array_equal, after, tables)


@pytest.mark.parametrize("kind", KINDS)
def test_slots_are_those_of_the_tier(kind):
    rng = np.random.default_rng(1)
    tables = new_tables(KINDS[kind])
    lengths = jnp.asarray(rng.integers(1, 40, tables.lengths.shape), jnp.int32)
    tables, granted = grown(tables, lengths)
    assert granted
    held = held_by(tables)
    for tier, size in enumerate(KINDS[kind]):
        index = lengths[..., tier] - 1
        block, offset = tables.slots(tier, index)
        for head in np.ndindex(index.shape):
            at = int(index[head])
            assert int(block[head]) == held[(*head, tier)][at // size]
            assert int(offset[head]) == at % size
