"""Attention over both tiers: the XLA reference against numpy, and the TPU kernel, in the interpreter, against it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import eager as eager
from interpreted import interpreter as interpreter
from oracles.tiers import attend
from tiered import LAYOUTS, SIGNIFICANCE, WINDOW, block_of, hold, layout_of, slots

from pallas_kernels import walk as blocks_walk
from pallas_kernels.tiered_attention import tiered_attention, tpu
from pallas_kernels.tpu_tiles import Tiling

GROUP = 3
SKEWED = np.array([[[70, 0, 1, 33, 5]], [[65, 0, 193, 2, 0]]])
"""High, then low tier: an empty head, heads of several tiles; three heads for one of a chip's two cores."""


def query_of(rng, held, layout, dtype=np.float32):
    batch, kv_heads = held.lengths.shape[1:]
    return jnp.asarray(rng.standard_normal((batch, kv_heads * GROUP, layout.head_dim)), dtype)


def arguments(held, query, layout):
    return query, jnp.asarray(held.pool), jnp.asarray(held.table), jnp.asarray(held.lengths), layout


def options(held, raw, significance):
    following = jnp.asarray(held.following, jnp.int32)
    observed = {"significance": SIGNIFICANCE, "next_position": following} if significance else {}
    return {"raw": held.raw if raw else None, **observed}


def check_against_numpy(held, layout, query, got, *, raw):
    """Output, scores, everything else of the pool, and the weakest KVs."""
    wanted_pool = held.pool.copy()
    for where in np.ndindex(held.lengths.shape[1:]):
        kvs = []
        for tier in range(2):
            places = slots(held, layout, where, tier)
            kvs += [block_of(held.pool, block, layout, tier).get(offset)[:2] for block, offset in places]
        counts = held.lengths[(slice(None), *where)]
        if raw:
            kvs += zip(*held.raw_kvs[where], strict=True)
        queries = np.asarray(query).reshape(*held.lengths.shape[1:], GROUP, -1)[where]
        out = np.asarray(got.output).reshape(*held.lengths.shape[1:], GROUP, -1)[where]
        if not kvs:
            assert (out == 0).all()
            assert (np.asarray(got.weakest.value)[(slice(None), *where)] == np.inf).all()
            continue
        wanted, p = attend(queries, *(np.stack(x) for x in zip(*kvs, strict=True)))
        np.testing.assert_allclose(out, wanted, atol=1e-5)
        for tier, gained in enumerate(np.split(p[:, : counts.sum()].max(0), [counts[0]], axis=-1)):
            kvs = held.tokens[(*where, tier)]
            scores = (kvs.scores + gained).astype(np.float32)
            for (block, offset), score in zip(slots(held, layout, where, tier), scores, strict=True):
                words = block_of(wanted_pool, block, layout, tier)
                words.words[words.scores + offset] = score.view(np.uint32)
            age = held.following[where[0]] - kvs.positions
            worth = np.where(age >= WINDOW, scores / np.maximum(age, 1), np.inf)
            least = np.asarray(got.weakest.value)[(tier, *where)]
            np.testing.assert_allclose(least, worth.min(initial=np.inf), rtol=1e-4)
            if np.isfinite(least):
                assert np.isclose(worth[np.asarray(got.weakest.index)[(tier, *where)]], least, rtol=1e-4)
    close(got.pool, wanted_pool, held, layout)


def close(got, wanted, held, layout):
    """Pools alike: in what held scores to rounding, else to the bit, but for the null block."""
    got, wanted = np.asarray(got).copy(), np.asarray(wanted).copy()
    for where in np.ndindex(held.lengths.shape[1:]):
        for tier in range(2):
            for block, offset in slots(held, layout, where, tier):
                one, other = (block_of(pool, block, layout, tier) for pool in (got, wanted))
                at = one.scores + offset
                np.testing.assert_allclose(one.words[at].view(np.float32), other.words[at].view(np.float32), rtol=1e-4)
                one.words[at] = other.words[at] = 0
            for block in {block for block, _ in slots(held, layout, where, tier)}:
                # Scores of slots without a KV may be anything.
                for pool in (got, wanted):
                    words = block_of(pool, block, layout, tier)
                    words.words[words.scores : words.scores + words.tokens] = 0
    np.testing.assert_array_equal(got[1:], wanted[1:])


@partial(jax.jit, static_argnames=("layout", "significance"))
def reference(query, pool, table, lengths, layout, **given):
    return tiered_attention(query, pool, table, lengths, layout, **given, implementation="xla")


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_reference_against_numpy(name, seed):
    rng, layout = np.random.default_rng(seed), LAYOUTS[name]
    most = [3 * tier.tokens for tier in layout.tiers]
    lengths = np.stack([rng.integers(0, n, (2, 2)) for n in most]) * (rng.random((2, 2, 2)) < 0.8)
    held = hold(rng, layout, lengths, max_blocks=7)
    query = query_of(rng, held, layout)
    given = options(held, True, True)
    got = reference(*arguments(held, query, layout), **given)
    check_against_numpy(held, layout, query, got, raw=True)


def test_the_reference_in_many_steps(monkeypatch):
    """Of two blocks each; heads begin and end within them."""
    monkeypatch.setattr(blocks_walk, "FEW_KVS", 64)
    rng, layout = np.random.default_rng(), LAYOUTS["plain"]
    held = hold(rng, layout, SKEWED)
    query = query_of(rng, held, layout)
    given = options(held, True, True)
    got = tiered_attention(*arguments(held, query, layout), **given, implementation="xla")
    check_against_numpy(held, layout, query, got, raw=True)


def check_tpu(interpreter, layout, *, lengths=SKEWED, dtype=np.float32, raw=False, significance=True, **more):
    rng = np.random.default_rng()
    held = hold(rng, layout, lengths, dtype=dtype)
    query = query_of(rng, held, layout, dtype)
    given = options(held, raw, significance)
    more = {"tiles": Tiling(block_size=layout.rows, blocks=2, max_blocks=held.table.shape[-1], buffers=3), **more}
    got = interpreter.run(tpu.tiered_attention, *arguments(held, query, layout), **given, **more)
    wanted = reference(*arguments(held, query.astype(jnp.float32), layout), **given)
    assert got.output.dtype == dtype
    tolerance = 1e-5 if dtype == np.float32 else 2e-2
    np.testing.assert_allclose(np.asarray(got.output, np.float32), wanted.output, atol=tolerance, rtol=tolerance)
    if not significance:
        assert got.weakest is None
        np.testing.assert_array_equal(got.pool, held.pool)
    elif dtype == np.float32:
        close(got.pool, wanted.pool, held, layout)
        np.testing.assert_allclose(got.weakest.value, wanted.weakest.value, rtol=1e-4)
        finite = np.isfinite(np.asarray(wanted.weakest.value))
        np.testing.assert_array_equal(np.asarray(got.weakest.index)[finite], np.asarray(wanted.weakest.index)[finite])


def test_tpu(interpreter):
    check_tpu(interpreter, LAYOUTS["plain"])


def test_tpu_with_groups_beside_unquantised_kvs(eager):
    check_tpu(eager, LAYOUTS["groups"], raw=True)


def test_tpu_of_bfloat16_that_nobody_observes(eager):
    check_tpu(eager, LAYOUTS["plain"], dtype=jnp.bfloat16, significance=False)


def test_tpu_with_blocks_as_a_tpu_likes_them(eager):
    """Positions of the low tier begin in the middle of a row; tiles as the kernel chooses them."""
    layout = layout_of("K8V4", "K4V2", tokens=256)
    assert layout.rows == 56
    assert layout.tiers[1].positions % 128
    check_tpu(eager, layout, lengths=np.array([[[300]], [[500]]]), tiles=None)


def test_tpu_over_a_table_too_large_for_one_call(eager):
    """Two rows of 5 entries, and 3 numbers each, where SMEM is said to hold 9."""
    check_tpu(eager, LAYOUTS["plain"], lengths=np.array([[[40, 0]], [[65, 3]]]), smem_entries=9)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (layout_of("K8V4", "K4V2", head_dim=96), "64 or 128 values, not 96"),
        (layout_of("K8V4", "K4V2", tile=1), "tiles of 8 rows, not 14: give the layout tile=8"),
    ],
)
def test_what_a_tpu_cannot_take_is_refused(layout, message):
    held = hold(np.random.default_rng(), layout, np.ones((2, 1, 1), int))
    query = jnp.ones((1, 1, layout.head_dim))
    with pytest.raises(ValueError, match=message):
        tiered_attention(*arguments(held, query, layout), implementation="mosaic_tpu")


def test_what_does_not_belong_together_is_refused():
    layout = LAYOUTS["plain"]
    held = hold(np.random.default_rng(), layout, np.ones((2, 1, 1), int))
    good = list(arguments(held, jnp.ones((1, 2, 64)), layout))
    for at, wrong, message in (
        (0, jnp.ones((1, 2, 32)), "not of this layout"),
        (1, jnp.zeros((4, 3, 128), jnp.uint32), "not of this layout"),
        (3, jnp.zeros((2, 2, 1), jnp.int32), "batch and KV heads disagree"),
    ):
        with pytest.raises(ValueError, match=message):
            tiered_attention(*good[:at], wrong, *good[at + 1 :])
    with pytest.raises(ValueError, match="go together"):
        tiered_attention(*good, significance=SIGNIFICANCE)


def test_the_pool_is_updated_in_place():
    layout = LAYOUTS["plain"]
    held = hold(np.random.default_rng(), layout, SKEWED)
    query = query_of(np.random.default_rng(), held, layout)
    given = options(held, False, True)

    def step(pool, query, table, lengths):
        return tiered_attention(query, pool, table, lengths, layout, **given, implementation="xla").pool

    rest = query, jnp.asarray(held.table), jnp.asarray(held.lengths)
    memory = jax.jit(step, donate_argnums=0).lower(jnp.asarray(held.pool), *rest).compile().memory_analysis()
    assert memory.alias_size_in_bytes == held.pool.nbytes
