"""Sizes, bytes and views of the cache."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxkv.cache import CacheConfig, init_cache
from jaxkv.cache.stats import stats
from pallas_kernels.block_writes import write_blocks
from pallas_kernels.paged_attention import RawKVs, paged_attention
from pallas_kernels.prefill_attention import prefill_attention


def allocated(cache):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize("memory", [60_000, 1_000_000, 3_333_333])
@pytest.mark.parametrize("block_size", [16, 64])
def test_a_cache_fills_the_memory_it_is_given(memory, block_size):
    config = CacheConfig.for_model(tiny.CONFIG, batch=2, max_context=300, memory=memory, block_size=block_size)
    held = allocated(init_cache(config))
    assert held == config.bytes_with(config.num_blocks) <= memory
    assert config.bytes_with(config.num_blocks + 1) > memory


def test_without_a_size_every_row_can_be_full():
    config = CacheConfig.for_model(tiny.CONFIG, batch=3, max_context=100)
    assert config.max_blocks == 7
    assert config.num_blocks == 1 + 3 * 4 * 7


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_dtype_that_was_asked_for_is_held(dtype):
    cache = init_cache(CacheConfig.for_model(tiny.CONFIG, batch=2, max_context=64, dtype=dtype))
    size = jnp.dtype(dtype).itemsize
    assert cache.raw.pool.nbytes == cache.raw.pool.shape[0] * 16 * 2 * 16 * size
    assert cache.raw.block_bytes == 16 * (2 * 16 * size + 8)  # a score and a position each
    assert stats(cache).bytes_allocated == allocated(cache)


def test_a_cache_of_bfloat16_keeps_what_bfloat16_keeps():
    """Also where it is kept as bits (``pallas_kernels.pool_values``)."""
    config = CacheConfig.for_model(tiny.CONFIG, batch=1, max_context=64, dtype=jnp.bfloat16)
    cache = init_cache(config)
    assert allocated(cache) == config.bytes_with(config.num_blocks)
    rng = np.random.default_rng(1)
    query, key, value = (
        jnp.asarray(rng.standard_normal((1, n, heads, 16)), jnp.float32) for n, heads in ((1, 4), (40, 2), (40, 2))
    )
    table, lengths = jnp.arange(1, 9, dtype=jnp.int32).reshape(1, 2, 4), jnp.full((1, 2), 40)

    def attention(pool, key, value):
        pool = write_blocks(pool, key, value, table, jnp.zeros_like(lengths), jnp.array([40]))
        raw = RawKVs(pool, table, lengths)
        decoded = paged_attention(query[:, 0], raw)[0]
        return decoded, prefill_attention(query, query[:, :, :2], query[:, :, 2:], raw)[0]

    got = attention(cache.raw.pool, key, value)
    rounded = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (key, value))
    expected = attention(jnp.zeros(cache.raw.pool.shape, jnp.float32), *rounded)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": 100}, "cache memory of 100 bytes holds no block"),
        ({"memory": 10**6, "num_blocks": 5}, "not both"),
        ({"num_blocks": 1}, "null block"),
        ({"block_size": 24}, "block_size must divide 128, got 24"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"max_context": 0}, "max_context must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig.for_model(tiny.CONFIG, **{"batch": 1, "max_context": 64, **settings})


def test_stats_are_of_bytes_really_held():
    cache = tiny.empty_cache(batch=2, max_context=64)
    lengths = jnp.zeros_like(cache.lengths).at[0, 0, 0].set(17).at[1, 1, 1].set(16)
    cache = replace(tiny.with_tables(cache, lengths=lengths), num_tokens=jnp.array([33, 16]))
    got = stats(cache)
    block = 16 * (2 * 16 * 4 + 4 + 4)
    tables = sum(a.nbytes for a in (cache.raw.tables.block_table, cache.raw.lengths, cache.num_tokens))
    assert got.bytes_allocated == allocated(cache)
    assert got.blocks_held == 3
    assert got.bytes_held == 3 * block + tables
    assert got.blocks_full == 4 * (3 + 1)
    assert got.bytes_full == 16 * block + tables
    assert got.kvs_held == 33
    assert got.kvs_full == 4 * 49
    assert got.blocks_per_head.tolist() == [[2, 0], [0, 1]]
    assert got.fragmentation == pytest.approx(1 - 33 / 48)


def test_full_bytes_at_16_bits_count_no_padding():
    config = replace(CacheConfig.for_model(tiny.CONFIG, batch=1, max_context=64), padded_head_dim=64)
    cache = replace(init_cache(config), num_tokens=jnp.array([10]))
    assert stats(cache).bytes_full_16bit == 10 * 4 * 2 * 16 * 2


def test_rows_taken_out_and_put_back():
    cache = tiny.empty_cache(batch=4, max_context=64)
    rng = np.random.default_rng(0)
    cache = tiny.with_tables(
        replace(cache, num_tokens=jnp.arange(4)),
        block_table=jnp.asarray(rng.integers(0, 9, cache.raw.tables.block_table.shape), jnp.int32),
        lengths=rng.integers(0, 60, cache.lengths.shape),
    )
    rows = jnp.array([2, 0])
    part = cache.rows(rows)
    assert part.num_tokens.tolist() == [2, 0]
    back = cache.with_rows(part, rows)
    jax.tree.map(np.testing.assert_array_equal, back, cache)
