"""Chunk attention over cached blocks and the chunk's own keys, against dense attention in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_paged_attention import paged

from pallas_kernels.block_writes import write_blocks
from pallas_kernels.prefill_attention import ObservedQueries, RawKVs, prefill_attention

GROUP, D = 3, 16


def square(p):
    return p * p


@jax.jit
def attend(query, key, value, pool, table, lengths, observed=None):
    return prefill_attention(query, key, value, RawKVs(pool, table, lengths), observe=observed)


def chunk(rng, batch, length, kv_heads):
    shape = (batch, length, kv_heads, D)
    query = rng.standard_normal((batch, length, kv_heads * GROUP, D)).astype(np.float32)
    return query, rng.standard_normal(shape).astype(np.float32), rng.standard_normal(shape).astype(np.float32)


def oracle(query, cached, key, value):
    """One KV head: queries ``[t, group, d]``, cached ``[n, 2d]``, own ``[t, d]`` -> output, p ``[group, t, n + t]``."""
    n, t = len(cached), len(key)
    k = np.concatenate([cached[:, :D], key]).astype(np.float64)
    v = np.concatenate([cached[:, D:], value]).astype(np.float64)
    s = np.einsum("tgd,kd->gtk", query.astype(np.float64), k) / np.sqrt(D)
    s = np.where(np.arange(n + t) <= n + np.arange(t)[:, None], s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return np.einsum("gtk,kd->tgd", p, v), p


CACHED = np.array([[0, 40], [513, 16], [1100, 1]])


@pytest.mark.parametrize("length", [1, 5, 300])
def test_output_over_ragged_caches(length):
    rng = np.random.default_rng(length)
    pool, table, kvs = paged(rng, CACHED, max_blocks=80)
    query, key, value = chunk(rng, 3, length, 2)
    out, none = attend(query, key, value, pool, table, jnp.asarray(CACHED))
    assert none is None
    for b, h in np.ndindex(CACHED.shape):
        heads = slice(h * GROUP, (h + 1) * GROUP)
        wanted, _ = oracle(query[b, :, heads], kvs[b, h], key[b, :, h], value[b, :, h])
        np.testing.assert_allclose(out[b, :, heads], wanted, atol=1e-5)


@pytest.mark.parametrize("buffer", [0, 12])
def test_masses_of_the_observed_queries(buffer):
    rng = np.random.default_rng(buffer)
    length = 40
    pool, table, kvs = paged(rng, CACHED, max_blocks=80)
    query, key, value = chunk(rng, 3, length, 2)
    begins = np.array([50, 600, 2000])  # after an eviction: more text than KVs, with gaps
    cached_positions = np.full((3, 2, 80 * 16), 10**6, np.int32)
    for b, h in np.ndindex(CACHED.shape):
        cached_positions[b, h, : CACHED[b, h]] = rng.permutation(begins[b])[: CACHED[b, h]]
    rows = np.array([[0, 7, 39, -1], [-1, -1, -1, -1], [3, 38, 39, 1]], np.int32)
    positions = begins[:, None] + np.arange(length)
    observed = ObservedQueries(
        rows=jnp.asarray(rows),
        positions=jnp.asarray(positions),
        cached_positions=jnp.asarray(cached_positions),
        function=square,
        buffer=buffer,
    )
    out, masses = attend(query, key, value, pool, table, jnp.asarray(CACHED), observed)
    on_cached, on_own = masses
    plain, _ = attend(query, key, value, pool, table, jnp.asarray(CACHED))
    np.testing.assert_array_equal(out, plain)
    for b, h in np.ndindex(CACHED.shape):
        heads, n = slice(h * GROUP, (h + 1) * GROUP), CACHED[b, h]
        _, p = oracle(query[b, :, heads], kvs[b, h], key[b, :, h], value[b, :, h])
        key_positions = np.concatenate([cached_positions[b, h, :n], positions[b]])
        wanted = np.zeros((GROUP, n + length))
        for row in rows[b][rows[b] >= 0]:
            wanted += p[:, row] ** 2 * (key_positions <= positions[b, row] - buffer)
        np.testing.assert_allclose(on_cached[b, heads, :n], wanted[:, :n], atol=1e-5)
        np.testing.assert_allclose(on_own[b, heads], wanted[:, n:], atol=1e-5)
        assert (np.asarray(on_cached[b, heads, n:]) == 0).all()


def test_chunks_in_turn_equal_one_chunk():
    rng = np.random.default_rng(3)
    length, size = 96, 16
    query, key, value = chunk(rng, 2, length, 2)
    table = jnp.asarray((1 + rng.permutation(2 * 2 * 6)).reshape(2, 2, 6), jnp.int32)
    pool = jnp.full((25, size, 2 * D), jnp.nan)
    whole, _ = attend(query, key, value, pool, table, jnp.zeros((2, 2), jnp.int32))
    write = jax.jit(partial(write_blocks))
    parts, counts = [], jnp.array([20, 20])
    for at in range(0, 80, 20):
        starts = jnp.full((2, 2), at, jnp.int32)
        part = [x[:, at : at + 20] for x in (query, key, value)]
        parts.append(attend(*part, pool, table, starts)[0])
        pool = write(pool, part[1], part[2], table, starts, counts)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole[:, :80], atol=1e-5)


def test_shapes_that_do_not_belong_together_are_refused():
    raw = RawKVs(jnp.zeros((9, 16, 2 * D)), jnp.zeros((1, 2, 4), int), jnp.zeros((1, 2), int))
    good, bad = jnp.zeros((1, 5, 2, D)), jnp.zeros((1, 4, 2, D))
    with pytest.raises(ValueError, match="keys and values must match"):
        prefill_attention(jnp.zeros((1, 5, 6, D)), bad, bad, raw)
    with pytest.raises(ValueError, match="multiple of KV heads"):
        prefill_attention(jnp.zeros((1, 5, 5, D)), good, good, raw)
    with pytest.raises(ValueError, match="disagree"):
        prefill_attention(jnp.zeros((1, 5, 6, D)), good, good, raw._replace(lengths=jnp.zeros((2, 2), int)))
