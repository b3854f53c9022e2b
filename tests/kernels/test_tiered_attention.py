"""Attention over both tiers: the XLA reference against numpy, and the TPU kernel, in the interpreter, against it."""

from dataclasses import replace
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
from pallas_kernels.paged_attention import Significance, TieredKVs, paged_attention, tpu_tiers
from pallas_kernels.tpu_tiles import Tiling

GROUP = 3
SKEWED = np.stack([[[70, 0, 1, 33, 5]], [[65, 0, 193, 2, 0]]], axis=-1)
"""High and low tier: an empty head, heads of several tiles; three heads for one of a chip's two cores."""


def query_of(rng, held, layout, dtype=np.float32):
    batch, kv_heads = held.lengths.shape[:-1]
    return jnp.asarray(rng.standard_normal((batch, kv_heads * GROUP, layout.head_dim)), dtype)


def tiers_of(held, layout):
    parts = {"pool": held.pool, "block_table": held.table, "lengths": held.lengths}
    return TieredKVs(**{name: jnp.asarray(part) for name, part in parts.items()}, layout=layout)


def observing(held):
    return {"observe": SIGNIFICANCE, "next_position": jnp.asarray(held.following, jnp.int32)}


def check_against_numpy(held, layout, query, output, significant):
    """Output, scores, everything else of the pool, and the weakest KVs."""
    wanted_pool = held.pool.copy()
    values, indices = np.asarray(significant.weakest.value), np.asarray(significant.weakest.index)
    for where in np.ndindex(held.lengths.shape[:-1]):
        kvs = []
        for tier in range(2):
            places = slots(held, layout, where, tier)
            kvs += [block_of(held.pool, block, layout, tier).get(offset)[:2] for block, offset in places]
        counts = held.lengths[where]
        kvs += zip(*held.raw_kvs[where], strict=True)
        queries, out = (np.asarray(x).reshape(*held.lengths.shape[:-1], GROUP, -1)[where] for x in (query, output))
        if not kvs:
            assert (out == 0).all()
            assert (values[where] == np.inf).all()
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
            least = values[where][tier]
            np.testing.assert_allclose(least, worth.min(initial=np.inf), rtol=1e-4)
            if np.isfinite(least):
                assert np.isclose(worth[indices[where][tier]], least, rtol=1e-4)
    close(significant.pool, wanted_pool, held, layout)


SQUARES = Significance(observe=lambda p: (p * p).sum(-2), value=lambda scores, *_: jnp.full_like(scores, jnp.inf))


def check_all_observed(held, layout, query, output, observed):
    """By the sum of squares over the group, of quantised and unquantised KVs in one softmax."""
    wanted_pool, masses = held.pool.copy(), np.asarray(observed.masses)
    for where in np.ndindex(held.lengths.shape[:-1]):
        kvs, quantised = [], []
        for tier in range(2):
            quantised += [(block_of(wanted_pool, b, layout, tier), o) for b, o in slots(held, layout, where, tier)]
        kvs += [block.get(offset)[:2] for block, offset in quantised]
        kvs += zip(*held.raw_kvs[where], strict=True)
        if not kvs:
            continue
        queries, out = (np.asarray(x).reshape(*held.lengths.shape[:-1], GROUP, -1)[where] for x in (query, output))
        wanted, p = attend(queries, *(np.stack(x) for x in zip(*kvs, strict=True)))
        np.testing.assert_allclose(out, wanted, atol=1e-5)
        gains = (p * p).sum(0).astype(np.float32)
        for (block, offset), gain in zip(quantised, gains, strict=False):
            at = block.scores + offset
            block.words[at] = (block.words[at].view(np.float32) + gain).view(np.uint32)
        raw = gains[len(quantised) :]
        np.testing.assert_allclose(masses[where][: len(raw)], raw, rtol=1e-4, atol=1e-8)
    close(observed.pool, wanted_pool, held, layout)


def close(got, wanted, held, layout):
    """Pools alike: in what held scores to rounding, else to the bit, but for the null block."""
    got, wanted = np.asarray(got).copy(), np.asarray(wanted).copy()
    for where in np.ndindex(held.lengths.shape[:-1]):
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


@partial(jax.jit, static_argnames="observe")
def reference(query, raw, tiers, **observing):
    return paged_attention(query, raw, tiers=tiers, **observing, implementation="xla")


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_reference_against_numpy(name, seed):
    rng, layout = np.random.default_rng(seed), LAYOUTS[name]
    most = [3 * tier.tokens for tier in layout.tiers]
    lengths = rng.integers(0, most, (2, 2, 2)) * (rng.random((2, 2, 2)) < 0.8)
    held = hold(rng, layout, lengths, max_blocks=7)
    query = query_of(rng, held, layout)
    check_against_numpy(held, layout, query, *reference(query, held.raw, tiers_of(held, layout), **observing(held)))


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_reference_observes_all_kvs_against_numpy(seed):
    rng, layout = np.random.default_rng(seed), LAYOUTS["plain"]
    lengths = rng.integers(0, 90, (2, 2, 2)) * (rng.random((2, 2, 2)) < 0.8)
    held = hold(rng, layout, lengths, max_blocks=7)
    query = query_of(rng, held, layout)
    got = reference(query, held.raw, tiers_of(held, layout), observe=SQUARES.observe)
    check_all_observed(held, layout, query, *got)


def test_the_reference_in_many_steps(monkeypatch):
    """Of two blocks each; heads begin and end within them."""
    monkeypatch.setattr(blocks_walk, "FEW_KVS", 64)
    rng, layout = np.random.default_rng(), LAYOUTS["plain"]
    held = hold(rng, layout, SKEWED)
    query = query_of(rng, held, layout)
    options = {**observing(held), "implementation": "xla"}
    check_against_numpy(held, layout, query, *paged_attention(query, held.raw, tiers=tiers_of(held, layout), **options))


def check_alike(got, wanted, held, layout, dtype):
    """Outputs of that dtype and what was observed, as ``paged_attention`` gives them."""
    (output, significant), (wanted_output, wanted_significant) = got, wanted
    assert output.dtype == dtype
    tolerance = 1e-5 if dtype == np.float32 else 2e-2
    np.testing.assert_allclose(np.asarray(output, np.float32), wanted_output, atol=tolerance, rtol=tolerance)
    if wanted_significant is None:
        assert significant is None
    elif dtype == np.float32:
        close(significant.pool, wanted_significant.pool, held, layout)
        weakest, wanted_weakest = significant.weakest, wanted_significant.weakest
        np.testing.assert_allclose(weakest.value, wanted_weakest.value, rtol=1e-4)
        finite = np.isfinite(np.asarray(wanted_weakest.value))
        np.testing.assert_array_equal(np.asarray(weakest.index)[finite], np.asarray(wanted_weakest.index)[finite])


def check_tpu(
    interpreter, layout, *, lengths=SKEWED, dtype=np.float32, raw=False, significance=True, max_blocks=None, **more
):
    rng = np.random.default_rng()
    held = hold(rng, layout, lengths, dtype=dtype, max_blocks=max_blocks)
    query = query_of(rng, held, layout, dtype)
    beside, tiers = (held.raw if raw else None), tiers_of(held, layout)
    observed = observing(held) if significance else {}
    more = {"tiles": Tiling(block_size=layout.rows, blocks=2, max_blocks=held.table.shape[-1], buffers=3), **more}
    got = interpreter.run(tpu_tiers.paged_attention, query, beside, tiers, **observed, **more)
    wanted = reference(query.astype(jnp.float32), beside, tiers, **observed)
    check_alike(got, wanted, held, layout, dtype)


def test_tpu(interpreter):
    check_tpu(interpreter, LAYOUTS["plain"])


def test_tpu_with_groups_beside_unquantised_kvs(eager):
    check_tpu(eager, LAYOUTS["groups"], raw=True)


def test_tpu_observes_all_kvs(eager):
    rng, layout = np.random.default_rng(), LAYOUTS["plain"]
    held = hold(rng, layout, SKEWED)
    query, tiers = query_of(rng, held, layout), tiers_of(held, layout)
    tiles = Tiling(block_size=layout.rows, blocks=2, max_blocks=held.table.shape[-1], buffers=3)
    got = eager.run(tpu_tiers.paged_attention, query, held.raw, tiers, observe=SQUARES.observe, tiles=tiles)
    check_all_observed(held, layout, query, *got)


def test_tpu_of_bfloat16_that_nobody_observes(eager):
    check_tpu(eager, LAYOUTS["plain"], dtype=jnp.bfloat16, significance=False)


def test_tpu_with_blocks_as_a_tpu_likes_them(eager):
    """Positions of the low tier begin in the middle of a row; tiles as the kernel chooses them."""
    layout = layout_of("K8V4", "K4V2", tokens=256)
    assert layout.rows == 56
    assert layout.tiers[1].positions % 128
    check_tpu(eager, layout, lengths=np.array([[[300, 500]]]), tiles=None)


def test_tpu_with_low_blocks_of_whole_lanes(eager):
    """Two tiles of several chunks, the second of them part-filled, in bfloat16."""
    layout = layout_of("K8V4", "K4V2", tokens=256, low_step=256)
    tiles = Tiling(block_size=layout.rows, blocks=16, max_blocks=20, buffers=3)
    lengths = np.array([[[19 * 256 - 7, 40]]])
    check_tpu(eager, layout, lengths=lengths, tiles=tiles, max_blocks=20, dtype=jnp.bfloat16)


def test_tpu_over_a_table_too_large_for_one_call(eager):
    """Two rows of 5 entries, and 3 numbers each, where SMEM is said to hold 9."""
    check_tpu(eager, LAYOUTS["plain"], lengths=np.array([[[40, 65], [0, 3]]]), smem_entries=9)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (layout_of("K8V4", "K4V2", head_dim=96), "64 or 128 values, not 96"),
        (layout_of("K8V4", "K4V2", tile=1), "tiles of 8 rows, not 14: give the layout tile=8"),
    ],
)
def test_what_a_tpu_cannot_take_is_refused(layout, message):
    held = hold(np.random.default_rng(), layout, np.ones((1, 1, 2), int))
    query = jnp.ones((1, 1, layout.head_dim))
    with pytest.raises(ValueError, match=message):
        paged_attention(query, None, tiers=tiers_of(held, layout), implementation="mosaic_tpu")


def test_what_does_not_belong_together_is_refused():
    layout = LAYOUTS["plain"]
    held = hold(np.random.default_rng(), layout, np.ones((1, 1, 2), int))
    query, tiers = jnp.ones((1, 2, 64)), tiers_of(held, layout)
    following = jnp.zeros(1, jnp.int32)
    for raw, changes, message in (
        (None, {"tiers": None}, "nothing to attend to: give raw KVs, tiers, or both"),
        (None, {"tiers": replace(tiers, pool=jnp.zeros((4, 3, 128), jnp.uint32))}, "not of this layout"),
        (None, {"tiers": replace(tiers, lengths=jnp.zeros((2, 1, 2), jnp.int32))}, "batch and KV heads disagree"),
        (None, {"tiers": replace(tiers, lengths=jnp.zeros((1, 1, 3), jnp.int32))}, "the high and of the low tier"),
        (None, {"observe": SIGNIFICANCE}, "go together"),
        (None, {"next_position": following}, "go together"),
        (None, {"observe": lambda p: p.sum(-2)}, "give raw, or a Significance"),
        (held.raw, {"observe": lambda p: p.sum(-2), "next_position": following}, "go together"),
        (held.raw, {"tiers": None, "observe": SIGNIFICANCE, "next_position": following}, "give tiers"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_attention(query, raw, **{"tiers": tiers, **changes})
    with pytest.raises(ValueError, match="not of this layout"):
        paged_attention(jnp.ones((1, 2, 32)), None, tiers=tiers)


def test_the_pool_is_updated_in_place():
    layout = LAYOUTS["plain"]
    held = hold(np.random.default_rng(), layout, SKEWED)
    query = query_of(np.random.default_rng(), held, layout)

    def step(pool, query, tiers):
        tiers = replace(tiers, pool=pool)
        return paged_attention(query, None, tiers=tiers, **observing(held), implementation="xla")[1].pool

    tiers = tiers_of(held, layout)
    rest = query, replace(tiers, pool=jnp.zeros((1, *tiers.pool.shape[1:]), jnp.uint32))
    memory = jax.jit(step, donate_argnums=0).lower(tiers.pool, *rest).compile().memory_analysis()
    assert memory.alias_size_in_bytes == held.pool.nbytes
