"""The quantiser's own properties: what it rounds to, by how much it may be wrong, and that lowering loses nothing."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import tiers as oracle

from pallas_kernels.quantised_block import quantizer

quantize = jax.jit(quantizer.quantize, static_argnums=(1, 2))
dequantize = jax.jit(quantizer.dequantize)
pack = jax.jit(quantizer.pack, static_argnums=(1, 2))
unpack = jax.jit(quantizer.unpack, static_argnums=(1, 2))

BITS = pytest.mark.parametrize("bits", [8, 4, 2, 1])
seeds = given(seed=st.integers(0, 2**32 - 1))


def vectors(seed, count=256, head_dim=64):
    """Vectors of many sizes, some of them constant or zero."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, head_dim)) * 10.0 ** rng.uniform(-3, 3, (count, 1)) + rng.normal(size=(count, 1))
    x[0], x[1] = 0, 3.7
    return x.astype(np.float32)


@BITS
@pytest.mark.parametrize("groups", [1, 4])
@seeds
def test_codes_and_their_meta_are_those_of_numpy(bits, groups, seed):
    x = vectors(seed, 12)
    got = quantize(x, bits, groups)
    scale, low = quantizer.unpack_meta(got.meta)
    values = dequantize(got)
    for i, vector in enumerate(x):
        codes, scales, minima = oracle.quantize(vector, bits, groups)
        np.testing.assert_array_equal(got.codes[i], codes)
        np.testing.assert_array_equal(scale[i], scales.astype(np.float32))
        np.testing.assert_array_equal(low[i], minima.astype(np.float32))
        np.testing.assert_array_equal(values[i], oracle.dequantize(codes, scales, minima))


@BITS
@seeds
def test_a_groups_ends_are_the_first_and_the_last_code(bits, seed):
    x = vectors(seed)[2:]
    codes = np.asarray(quantize(x, bits, 1).codes)
    rows = np.arange(len(x))
    assert (codes[rows, x.argmin(-1)] == 0).all()
    assert (codes[rows, x.argmax(-1)] == 2**bits - 1).all()
    assert codes.max() < 2**bits


@BITS
@seeds
def test_no_value_is_further_off_than_half_a_step_and_its_meta_rounded(bits, seed):
    x = vectors(seed)
    error = np.abs(np.asarray(dequantize(quantize(x, bits, 1)), np.float64) - x)
    low = x.min(-1, keepdims=True).astype(np.float64)
    step = (x.max(-1, keepdims=True) - low) / (2**bits - 1)
    rounding = 2.0**-11 * (np.abs(low) + (2**bits - 1) * step) + 2.0**bits * 2.0**-25  # the last: half's subnormals
    assert (error <= (step / 2 + rounding) * (1 + 1e-5)).all()


@BITS
def test_equal_values_decode_to_themselves_in_half_precision(bits):
    x = np.array([0, 1.1, -3.3e-5, 6e4], np.float32)[:, None].repeat(64, 1)
    np.testing.assert_array_equal(dequantize(quantize(x, bits, 1)), x.astype(np.float16).astype(np.float32))


@BITS
@pytest.mark.parametrize("sides", [1, 2])
@seeds
def test_packing_loses_no_code(bits, sides, seed):
    tokens = 64
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, tokens, 16), dtype=np.uint32)
    words = pack(codes, bits, sides)
    assert words.shape == (3, tokens * bits // 32, 16)
    np.testing.assert_array_equal(unpack(words, bits, sides), codes)
    np.testing.assert_array_equal(np.asarray(words)[:, 0] & (2**bits - 1), codes[:, 0])  # the first in the low bits


@pytest.mark.parametrize(("high", "low"), [(8, 4), (4, 2)])
def test_lowering_equals_quantising_the_original(high, low):
    """Steps of the one are multiples of the other's (255 = 17 * 15, 15 = 5 * 3); half precision may break a tie."""
    x = vectors(7, 20_000)[2:]
    direct = np.asarray(quantize(x, low, 1).codes)
    lowered = np.asarray(quantize(dequantize(quantize(x, high, 1)), low, 1).codes)
    assert (direct != lowered).mean() < 1e-5
    assert np.abs(direct.astype(int) - lowered).max() <= 1


@seeds
def test_a_token_knows_nothing_of_the_others(seed):
    x = vectors(seed)
    other = x.copy()
    other[1:] = np.roll(other[1:], 1, axis=0) * 3
    for a, b in zip(quantize(x, 4, 1), quantize(other, 4, 1), strict=True):
        np.testing.assert_array_equal(a[0], b[0])
