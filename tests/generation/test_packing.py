"""Prompts that are read in one pass are read as if each were alone: caches, scores, first tokens, second readings."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkv import H2O, ExpectedAttention, KVCompress, KVzip, LeanKV, Ratio
from jaxkv.generation.packing import Packing
from jaxkv.generation.prefill import finish_prompt, prefill_chunk, reread_chunk
from jaxkv.generation.prompt import start_prompt

TOKENS, LENGTH = 128, 64
LENGTHS = [40, 0, 23, 64, 1]
"""Together exactly 128, and a row of which nothing is read."""


@settings(max_examples=15)
@given(counts=st.lists(st.integers(0, 7), min_size=1, max_size=6), spare=st.integers(0, 5))
def test_rows_come_apart_and_together_again(counts, spare):
    tokens = max(sum(counts) + spare, 1)
    packed = np.arange(tokens)[None]
    packing = Packing(jnp.array(counts), tokens, 7)
    rows = np.asarray(packing.unpack(jnp.asarray(packed)))
    assert rows.shape == (len(counts), 7)
    ends = np.cumsum(counts)
    for row, count, end in zip(rows, counts, ends, strict=True):
        assert row[:count].tolist() == list(range(end - count, end))
    again = np.asarray(packing.pack(jnp.asarray(rows)))[0, : sum(counts)]
    assert again.tolist() == list(range(sum(counts)))


@partial(jax.jit, static_argnums=(3, 4))
def read(cache, tokens, counts, policy, length):
    prompt = start_prompt(tiny.MODEL, cache, counts, policy)
    cache, prompt = prefill_chunk(tiny.MODEL, cache, prompt, tokens, counts, policy, length=length)
    if policy is not None and policy.scorer.observes.rereads:
        prompt = reread_chunk(tiny.MODEL, cache, prompt, tokens, counts, policy, length=length)
    return finish_prompt(tiny.MODEL, cache, prompt, policy)


def real_blocks(cache):
    """The cache but for its null block, to which padding goes."""
    return replace(cache, raw=replace(cache.raw, pool=cache.raw.pool[1:]))


POLICIES = [
    None,
    KVCompress(budget=Ratio(ratio=2), window=8),
    H2O(budget=Ratio(ratio=2)),
    ExpectedAttention(budget=Ratio(ratio=2)),
    KVzip(budget=Ratio(ratio=2)),
    LeanKV(),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_together_is_as_alone(policy):
    prompts = [tiny.prompt(length, seed=at) if length else np.zeros(0, np.int32) for at, length in enumerate(LENGTHS)]
    packed = np.concatenate(prompts)[None]
    layout = policy and policy.placement.layout(16)
    empty = partial(tiny.empty_cache, batch=len(prompts), max_context=64, layout=layout)
    together, logits = read(empty(), packed, jnp.array(LENGTHS), policy, LENGTH)
    padded = np.zeros((len(prompts), LENGTH), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    apart, wanted = read(empty(), padded, jnp.array(LENGTHS), policy, None)
    real = np.array(LENGTHS) > 0
    np.testing.assert_allclose(logits[real], wanted[real], rtol=1e-5, atol=1e-5)
    assert together.num_tokens.tolist() == LENGTHS
    for got, expected in zip(jax.tree.leaves(real_blocks(together)), jax.tree.leaves(real_blocks(apart)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-5)
