"""GPU kernels of quantised blocks, in the interpreter, against the XLA references, which are tested against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_gpu_kernels import in_place
from test_gpu_kernels import run as run
from test_quantised_writes import garbage, lower, lowered, new_kvs, write
from test_tiered_attention import SQUARES, check_alike, check_all_observed, observing, query_of, reference, tiers_of
from tiered import hold, layout_of

from pallas_kernels.paged_attention import gpu_tiers, gpu_tiers_codes, gpu_tiers_softmax, paged_attention
from pallas_kernels.quantised_block import blocks
from pallas_kernels.quantised_writes import gpu as writes_gpu
from pallas_kernels.quantised_writes import write_kvs

SKEWED = np.stack([[[70, 0, 1]], [[97, 0, 130]]], axis=-1)
"""High and low tier: an empty head, blocks that are part-filled and full."""
LAYOUTS = {
    "plain": layout_of("K8V4", "K4V2", tile=1),
    "whole": layout_of("K8V4", "K4V2", head_dim=128, tile=1, low_step=64),
    "groups": layout_of("K8V4/1,2", "K4V2/2,4", head_dim=128, tile=1),
    "other way round": layout_of("K4V8", "K1V2/4,1", tile=1),
    "far apart": layout_of("K8V8", "K1V1", head_dim=128, tile=1),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_tiles_hold_every_token_once_where_its_codes_are(name):
    for tier in LAYOUTS[name].tiers:
        row = np.arange(64 * gpu_tiers_codes.tiles(tier))
        token = gpu_tiers_codes.token_of(row, tier)
        held = token < tier.tokens
        np.testing.assert_array_equal(np.sort(token[held]), np.arange(tier.tokens))
        place = gpu_tiers_codes.place_of(row[held] % 64, tier)
        for bits in (tier.format.key_bits, tier.format.value_bits):
            vector, shift = gpu_tiers_codes.locate(place, tier, bits)
            vector = vector + row[held] // 64 * gpu_tiers_codes.tile_vectors(tier)
            wanted = blocks.locate(jnp.asarray(token[held]), tier, bits)
            for got, other in zip((vector, shift + place.half * 16), wanted, strict=True):
                np.testing.assert_array_equal(got, other)


@given(st.floats(1.0, 2.0, width=32), st.integers(-60, 60), st.sampled_from([-1, 1]))
def test_three_numbers_of_16_bits_are_one_of_32(fraction, exponent, sign):
    x = jnp.float32(sign * fraction * 2.0**exponent)
    assert sum(np.float64(part) for part in gpu_tiers_softmax.split(x, 3)) == np.float64(x)


def check_attention(run, layout, *, lengths=SKEWED, dtype=np.float32, raw=False, significance=True):
    rng = np.random.default_rng()
    held = hold(rng, layout, lengths, dtype=dtype)
    query = query_of(rng, held, layout, dtype)
    beside, tiers = (held.raw if raw else None), tiers_of(held, layout)
    observed = observing(held) if significance else {}
    got = run(gpu_tiers.paged_attention, query, beside, tiers, **observed)
    wanted = reference(query.astype(jnp.float32), beside, tiers, **observed)
    check_alike(got, wanted, held, layout, dtype)


@pytest.mark.parametrize("name", ["plain", "whole", "other way round"])
def test_attention(run, name):
    check_attention(run, LAYOUTS[name])


def test_attention_with_groups_beside_unquantised_kvs(run):
    check_attention(run, LAYOUTS["groups"], raw=True)


def test_attention_that_observes_all_kvs(run):
    rng, layout = np.random.default_rng(), LAYOUTS["plain"]
    held = hold(rng, layout, SKEWED)
    query = query_of(rng, held, layout)
    got = run(gpu_tiers.paged_attention, query, held.raw, tiers_of(held, layout), observe=SQUARES.observe)
    check_all_observed(held, layout, query, *got)


def test_attention_of_bfloat16_that_nobody_observes(run):
    check_attention(run, LAYOUTS["far apart"], dtype=jnp.bfloat16, raw=True, significance=False)


@pytest.mark.parametrize(
    ("layout", "heads", "message"),
    [
        (layout_of("K8V4", "K4V2", head_dim=96), 1, r"heads of \(64, 128\) values, not 96"),
        (layout_of("K8V4", "K4V2", tokens=1024), 1, "at most 73728 bytes, not 114688: give the layout fewer tokens"),
        (layout_of("K8V4/16,1", "K4V2"), 1, "at most 8 groups, not K8V4/16,1 and K4V2"),
        (LAYOUTS["plain"], 9, "1 to 8 query heads a KV head, not group=9"),
    ],
)
def test_what_attention_cannot_take_is_refused(layout, heads, message):
    held = hold(np.random.default_rng(), layout, np.ones((1, 1, 2), int))
    query = jnp.ones((1, heads, layout.head_dim))
    with pytest.raises(ValueError, match=message):
        paged_attention(query, None, tiers=tiers_of(held, layout), implementation="mosaic_gpu")


@in_place
@pytest.mark.parametrize("name", ["plain", "groups"])
def test_writes(run, name):
    """Both operations, to the bit."""
    rng, layout = np.random.default_rng(), LAYOUTS[name]
    new, old = (garbage(rng, layout), *new_kvs(rng, layout)), lowered(rng, layout)
    for kernel, reference_of, case in ((writes_gpu.write_kvs, write, new), (writes_gpu.lower_kvs, lower, old)):
        case = *map(jnp.asarray, case), layout
        got = run(jax.jit(kernel, static_argnames=("layout", "interpret")), *case)
        np.testing.assert_array_equal(np.asarray(got)[1:], np.asarray(reference_of(*case))[1:])


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (layout_of("K8V4", "K4V2", head_dim=96), "divide a row of 128 words, not 96; use 'xla'"),
        pytest.param(
            LAYOUTS["plain"],
            r"needs jax >= 0\.11 .*upgrade",
            marks=pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="jax 0.11 updates in place"),
        ),
    ],
)
def test_what_writes_cannot_take_is_refused(layout, message):
    rng = np.random.default_rng()
    with pytest.raises(ValueError, match=message):
        write_kvs(jnp.asarray(garbage(rng, layout)), *new_kvs(rng, layout), layout, implementation="mosaic_gpu")
