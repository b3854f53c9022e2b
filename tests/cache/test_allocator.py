"""Blocks are never lost, shared or handed out twice, after any history."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from hypothesis import given
from hypothesis import strategies as st

from jaxkv.cache.allocator import grow, has_room, release, release_sequences

LAYERS, BATCH, HEADS, SIZE, BLOCKS, CAPACITY = 2, 3, 2, 16, 40, 160
MOST = 48

grown = jax.jit(lambda cache, lengths: grow(cache, lengths, most=MOST))
cut = jax.jit(release)
ended = jax.jit(release_sequences)
roomy = jax.jit(has_room)


def new_cache():
    return tiny.empty_cache(batch=BATCH, max_context=CAPACITY, num_blocks=BLOCKS)


def check(cache):
    """Every block but the null block is in exactly one place: the free stack or one table row."""
    lengths, table = np.asarray(cache.lengths), np.asarray(cache.block_table)
    free = np.asarray(cache.free_blocks)[: int(cache.num_free)].tolist()
    held = [int(b) for row in np.ndindex(lengths.shape) for b in table[row][: -(-lengths[row] // SIZE)]]
    assert sorted(free + held) == list(range(1, BLOCKS))


def poisoned(cache, rng):
    """Garbage in every table entry past a head's last block."""
    place = np.arange(cache.block_table.shape[-1])
    past = place >= np.asarray(cache.blocks_held())[..., None]
    garbage = rng.integers(0, BLOCKS, past.shape)
    return replace(cache, block_table=jnp.asarray(np.where(past, garbage, cache.block_table), jnp.int32))


actions = st.lists(
    st.tuples(st.sampled_from(["grow", "grow", "grow", "cut", "end"]), st.integers(0, 2**31)), max_size=25
)


@given(actions=actions)
def test_conservation_after_any_history(actions):
    cache = new_cache()
    for action, seed in actions:
        rng = np.random.default_rng(seed)
        cache = poisoned(cache, rng)
        lengths = np.asarray(cache.lengths)
        if action == "grow":
            more = rng.integers(0, MOST + 1, lengths.shape) * rng.integers(0, 2, BATCH)[:, None]
            wanted = lengths + more
            extra = int((-(-wanted // SIZE) - -(-lengths // SIZE)).sum())
            free = int(cache.num_free)
            after, granted = grown(cache, jnp.asarray(wanted, jnp.int32))
            assert bool(granted) == (extra <= free and (wanted <= CAPACITY).all())
            assert bool(granted) == bool(roomy(cache, jnp.asarray(wanted, jnp.int32)))
            if granted:
                assert int(after.num_free) == free - extra
                np.testing.assert_array_equal(after.lengths, wanted)
                for row in np.ndindex(lengths.shape):  # what a head had, it keeps
                    n = -(-lengths[row] // SIZE)
                    np.testing.assert_array_equal(after.block_table[row][:n], cache.block_table[row][:n])
            else:
                jax.tree.map(np.testing.assert_array_equal, after, cache)
            cache = after
        elif action == "cut":
            shorter = rng.integers(0, lengths + 1)
            cache = cut(cache, jnp.asarray(shorter, jnp.int32))
            np.testing.assert_array_equal(cache.lengths, shorter)
        else:
            finished = rng.integers(0, 2, BATCH).astype(bool)
            cache = ended(cache, jnp.asarray(finished))
            assert (np.asarray(cache.lengths)[:, finished] == 0).all()
        check(cache)


def test_exactly_full_and_exactly_empty():
    cache = new_cache()
    lengths = np.zeros((LAYERS, BATCH, HEADS), np.int32)
    lengths.flat[:] = SIZE * 3
    lengths.flat[0] = SIZE * 6  # 11 * 3 + 6 = 39 = all
    part, granted = grown(cache, jnp.minimum(jnp.asarray(lengths), MOST))
    full, also = grown(part, jnp.asarray(lengths))
    assert granted
    assert also
    assert int(full.num_free) == 0
    check(full)
    more = jnp.asarray(lengths).at[0, 0, 0].add(1)
    refused, granted = grown(full, more)
    assert not granted
    jax.tree.map(np.testing.assert_array_equal, refused, full)
    empty = ended(full, jnp.ones(BATCH, bool))
    assert int(empty.num_free) == BLOCKS - 1
    check(empty)


def test_a_row_longer_than_the_table_is_refused():
    cache = new_cache()
    lengths = jnp.zeros((LAYERS, BATCH, HEADS), jnp.int32).at[0, 0, 0].set(CAPACITY)
    for at in range(MOST, CAPACITY, MOST):
        cache, granted = grown(cache, jnp.minimum(lengths, at))
        assert granted
    cache, granted = grown(cache, lengths)
    assert granted
    after, granted = grown(cache, lengths + (lengths > 0))
    assert not granted
    jax.tree.map(np.testing.assert_array_equal, after, cache)
