"""Quantised tiers in a cache: what is held, in how many bytes, reading on, the engine, what is refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_lean_kv import compressed, empty, read, shrink, step, tier_tokens
from tiering import HEADS, LAYERS, SMALL, UNIFORM, conserved, mixed
from tiny import CONFIG, MODEL, answers, assert_no_block_is_lost_or_shared, by_position, dense_run, padded, prompt

from jaxkv import LLM, MaxBytes, MaxTokens, Ratio, SamplingParams, stats
from jaxkv.cache import CacheConfig, init_cache
from jaxkv.cache.config import TierConfig
from jaxkv.cache.home import HIGH, LOW
from jaxkv.generation.compress import compress
from jaxkv.generation.decode import decode_step, room_to_step
from jaxkv.generation.prefill import look_ahead, prefill
from jaxkv.policies import LeanKV, Mixed, StreamingLLM
from jaxkv.report import tier_mix

pytestmark = pytest.mark.once


@pytest.mark.parametrize("policy", [mixed(4.0), LeanKV(budget=Ratio(ratio=4), **SMALL)], ids=["mixed", "leankv"])
def test_a_ratio_divides_what_the_same_cache_would_hold_uncompressed(policy):
    """In its own dtype, scores and positions included; tables come on top on both sides."""
    cache, _ = compressed(policy, [prompt(240, seed=2)])
    held = stats(cache)
    assert held.kvs_held == held.kvs_high + held.kvs_low
    quantised = held.blocks_held * cache.tiers.layout.block_bytes
    full = held.blocks_full * cache.raw.block_bytes
    assert 0.8 * full / 4 < quantised <= full / 4 < held.bytes_full / 4


def test_blocks_are_conserved_and_a_second_compression_changes_nothing():
    policy = LeanKV(high_threshold=1.2, low_threshold=0.3, **SMALL)
    cache, _ = compressed(policy, [prompt(120, seed=5), prompt(77, seed=6)])
    conserved(cache)
    assert not np.asarray(cache.raw.lengths).any()
    before = [tier_tokens(cache, 1, row, 0, tier) for row in (0, 1) for tier in (HIGH, LOW)]
    again = shrink(jax.tree.map(jnp.copy, cache), policy)
    conserved(again)
    after = [tier_tokens(again, 1, row, 0, tier) for row in (0, 1) for tier in (HIGH, LOW)]
    for a, b in zip(before, after, strict=True):
        stay = np.isin(a.positions, b.positions) if len(a.positions) != len(b.positions) else slice(None)
        np.testing.assert_allclose(a.key[stay][: len(b.key)], b.key, atol=1e-3)


@pytest.mark.parametrize("ratio", [2.0, 4.0])
def test_sinks_and_window_may_stay_unquantised(ratio):
    """To the bit, and within the same bytes; what is decoded then joins them, and a later compression quantises it."""
    policy = mixed(ratio, unquantised_window=True)
    policy = replace(policy, scoring=replace(policy.scoring, sinks=3))
    tokens = prompt(230, seed=4)
    before, logits = read(empty(policy, 1), *padded([tokens]), policy)
    cache = shrink(jax.tree.map(jnp.copy, before), policy)
    conserved(cache)
    assert_no_block_is_lost_or_shared(cache)
    held = stats(cache)
    tables = held.bytes_full - held.blocks_full * before.raw.block_bytes + cache.tiers.row_bytes
    most = held.blocks_full * before.raw.block_bytes / ratio
    assert 0.75 * most < held.bytes_held - tables <= most
    wanted = {*range(3), *range(223, 230)}  # of the window of 8, one is not cached yet
    for layer, head in np.ndindex(LAYERS, HEADS):
        kept, whole = (by_position(c, c.raw.pool, layer, 0, head) for c in (cache, before))
        assert set(kept) == wanted
        for position, kv in kept.items():
            np.testing.assert_array_equal(kv, whole[position])
        tiers = [tier_tokens(cache, layer, 0, head, tier).positions.tolist() for tier in (HIGH, LOW)]
        assert not wanted & {*tiers[0], *tiers[1]}
    token = logits.argmax(-1).astype(jnp.int32)
    for _ in range(12):
        cache, logits = step(cache, token, policy)
        assert np.isfinite(logits).all()
        token = logits.argmax(-1).astype(jnp.int32)
    cache = shrink(cache, policy)
    conserved(cache)
    assert_no_block_is_lost_or_shared(cache)
    assert set(by_position(cache, cache.raw.pool, 0, 0, 0)) == {*range(3), *range(235, 242)}


def test_where_blocks_are_short_the_prompt_stays_as_it_is():
    cache = empty(UNIFORM, 1)
    tables = replace(cache.tiers.tables, free=replace(cache.tiers.tables.free, count=jnp.int32(3)))
    cache = replace(cache, quantised=replace(cache.tiers, tables=tables))
    cache, _ = read(cache, *padded([prompt(100)]), UNIFORM)
    after = shrink(cache, UNIFORM)
    assert (np.asarray(after.raw.lengths) == 100).all()
    assert not np.asarray(after.tiers.tables.lengths).any()
    assert int(after.tiers.tables.free.count) == 3


@pytest.mark.parametrize("policy", [UNIFORM, replace(mixed(1.0), budget=MaxBytes(size=10**6))], ids=["leankv", "mixed"])
def test_a_head_grows_to_the_context_and_not_beyond(policy):
    """Though blocks are free: what lay beyond it would be lost when the sequence is compressed again."""
    layout = policy.placement.layout(CONFIG.head_dim)
    cache = init_cache(CacheConfig.for_model(CONFIG, batch=2, max_context=32, layout=layout))
    tokens, _ = padded([prompt(30, seed=1), prompt(30, seed=2)])
    cache, _ = read(cache, tokens, jnp.array([30, 0]), policy)
    cache = shrink(cache, policy)
    active = jnp.array([True, False])
    advance = jax.jit(lambda c: decode_step(MODEL, c, jnp.array([3, 4]), active, policy))
    room = jax.jit(lambda c: room_to_step(c, active, policy))
    for _ in range(2):
        assert room(cache)
        cache, logits = advance(cache)
        assert np.isfinite(logits[0]).all()
    assert not room(cache)
    full = np.asarray(cache.lengths)
    assert (full[:, 0] == 32).all()
    refused, logits = advance(jax.tree.map(jnp.copy, cache))
    assert np.isnan(logits[0]).all()
    later, logits = read(jax.tree.map(jnp.copy, cache), tokens, jnp.array([1, 0]), policy)
    assert np.isnan(logits[0]).all()
    for after in (refused, later, shrink(cache, policy)):
        np.testing.assert_array_equal(after.lengths, full)
        assert int(after.num_tokens[0]) == 32
        conserved(after)


def test_tokens_read_later_see_what_is_quantised():
    tokens, later = prompt(120, seed=8), prompt(20, seed=9)
    expected = dense_run(np.concatenate([tokens, later]))[0]
    cache, _ = compressed(UNIFORM, [tokens])
    ahead = MODEL.logits(jax.jit(lambda c: look_ahead(MODEL, c, jnp.asarray(later)[None]))(cache))
    np.testing.assert_allclose(ahead[0], expected[120:], atol=0.15)
    several = jax.jit(lambda c: look_ahead(MODEL, c, jnp.stack([later[::-1], later])))(cache)
    np.testing.assert_allclose(MODEL.logits(several[1]), ahead[0], rtol=1e-4, atol=1e-4)
    cache, logits = jax.jit(lambda c: prefill(MODEL, c, *padded([later]), UNIFORM, chunk=16))(cache)
    np.testing.assert_allclose(logits[0], expected[-1], atol=0.15)
    assert (np.asarray(cache.raw.lengths) == 20).all()
    held = stats(shrink(cache, UNIFORM))
    assert (held.kvs_high, held.kvs_held) == (140 * CONFIG.num_layers * CONFIG.num_kv_heads,) * 2


@pytest.mark.parametrize(
    ("head_dim", "mix", "most"),
    [
        (64, (1.0, 0.0), 0.5),
        (128, (1.0, 0.0), 0.45),
        (64, (0.123, 0.556), 0.4),  # the mix that LeanKV's defaults leave of SmolLM2's prompts (docs/measurements.md)
        (128, (0.123, 0.556), 0.37),
    ],
)
def test_bytes_of_4000_tokens_beside_16_bits(head_dim, mix, most):
    """Codes, scales, scores, positions, part-filled blocks and tables."""
    layout = LeanKV().placement.layout(head_dim)
    sizes = {"num_layers": 2, "num_kv_heads": 3, "head_dim": head_dim, "batch": 1, "max_context": 4096}
    tiers = TierConfig(layout=layout, num_blocks=600)
    cache = init_cache(CacheConfig(**sizes, num_blocks=2, tiers=tiers))
    lengths = jnp.broadcast_to(jnp.array([round(4000 * part) for part in mix], jnp.int32), (2, 1, 3, 2))
    tables, granted = cache.tiers.tables.grow(lengths, most=4000)
    assert granted
    held = stats(replace(cache, quantised=replace(cache.tiers, tables=tables), num_tokens=jnp.array([4000])))
    assert held.bytes_full_16bit == 4000 * 6 * 4 * head_dim
    assert held.nominal_share < held.bytes_held / held.bytes_full_16bit <= most
    assert tier_mix(held).startswith(
        f"{100 * mix[0]:.1f} % of the KVs high, {100 * mix[1]:.1f} % low; of the full cache"
    )


@pytest.mark.parametrize(
    "policy",
    [
        LeanKV(budget=MaxTokens(tokens=40), **SMALL),
        Mixed.over(StreamingLLM, budget=Ratio(ratio=3), compress_every=16, **SMALL),
        Mixed.over(StreamingLLM, budget=Ratio(ratio=3), compress_every=16, unquantised_window=True, **SMALL),
    ],
    ids=["leankv", "mixed", "mixed, unquantised window"],
)
def test_the_engine_answers_as_if_each_were_alone(policy):
    prompts = [prompt(n, seed=n) for n in (150, 40, 120)]
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    llm = LLM(MODEL, compression=policy, max_batch=2)

    together = answers(llm, prompts, params)
    assert together == {i: answers(llm, [p], params)[0] for i, p in enumerate(prompts)}
    assert llm.engine.counts.free == llm.engine.counts.total
    conserved(llm.engine.cache)


def test_a_window_beyond_the_budget_is_refused():
    llm = LLM(MODEL, compression=LeanKV(budget=MaxBytes(size=15_000), block_tokens=8))
    with pytest.raises(ValueError, match="max_cache_bytes=15000 leaves a sequence 15000 bytes"):
        llm.generate(prompt(200), SamplingParams(max_tokens=8))


def test_a_cache_without_the_policys_blocks_is_refused():
    with pytest.raises(ValueError, match="this cache has no quantised blocks, and LeanKV needs BlockLayout"):
        compress(tiny.empty_cache(), UNIFORM)


def test_a_memory_that_holds_no_quantised_block_is_refused():
    with pytest.raises(ValueError, match="give at least"):
        LLM(MODEL, compression=UNIFORM, cache_memory=100_000).generate(prompt(200), SamplingParams(max_tokens=8))
