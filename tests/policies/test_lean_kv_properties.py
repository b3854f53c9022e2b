"""What LeanKV promises of every prompt and every decode step, whatever the model; blocks through random traces."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lean_kv import GROUP, POLICY, compressed, empty, read, shrink, step, tier_tokens
from tiering import UNIFORM, a_prompt, assign, conserved
from tiny import CONFIG, MODEL, answers, dense_run, padded, prompt

from jaxkv import LLM, SamplingParams, stats
from jaxkv.cache import CacheConfig, init_cache, release
from jaxkv.cache.home import HIGH, LOW
from jaxkv.engine.scheduler import Scheduler
from jaxkv.generation.decode import decode_step, generate
from jaxkv.generation.prefill import prefill_chunk
from jaxkv.generation.prompt import start_prompt
from jaxkv.policies import LeanKV

pytestmark = pytest.mark.once

HEADS = list(np.ndindex(CONFIG.num_layers, CONFIG.num_kv_heads))


def tiers_of(cache, row):
    """Of each head: what its tiers hold."""
    return [[tier_tokens(cache, layer, row, head, tier) for tier in (HIGH, LOW)] for layer, head in HEADS]


def test_a_prompts_logits_do_not_depend_on_the_policy():
    tokens = padded([prompt(90)])
    with_policy, without = (read(empty(POLICY, 1), *tokens, policy)[1] for policy in (POLICY, None))
    np.testing.assert_allclose(with_policy, without, rtol=1e-5, atol=1e-5)  # compiled apart: rounding may differ


@pytest.mark.parametrize("length", [30, 120])
def test_the_last_queries_alone_are_counted(length):
    tokens, lengths = padded([prompt(length)])
    cache = empty(POLICY, 1)
    state = start_prompt(MODEL, cache, lengths, POLICY)
    _, state = jax.jit(lambda c, s: prefill_chunk(MODEL, c, s, tokens, lengths, POLICY))(cache, state)
    np.testing.assert_allclose(state.mass.sum(-1), min(64, length), rtol=1e-4)


@given(seed=st.integers(0, 999), order=st.permutations(range(GROUP)))
def test_the_order_of_a_query_group_does_not_matter_and_its_highest_counts(seed, order):
    mass = np.random.default_rng(seed).random((2, 1, 2, GROUP, 50)).astype(np.float32)
    held = np.ones((2, 1, 2, 50), bool)
    scores = POLICY.scorer.score(jnp.asarray(mass), jnp.asarray(held))
    np.testing.assert_array_equal(
        scores, POLICY.scorer.score(jnp.asarray(mass[..., list(order), :]), jnp.asarray(held))
    )
    np.testing.assert_array_equal(scores, mass.max(-2))


def test_a_text_twice_as_long_with_the_same_profile_keeps_the_same_share():
    """Thresholds fall with the length, as the mean attention does."""
    policy = replace(POLICY, protected_window=1)
    short = a_prompt(5, 100)
    count = jnp.array([200], jnp.int32)
    long = replace(
        short,
        home=short.home.at[..., 100:200].set(short.home[..., :100]),
        scores=jnp.concatenate([short.scores[..., :100] / 2, short.scores[..., :100] / 2, short.scores[..., 200:]], -1),
        positions=jnp.zeros_like(short.positions),
        num_tokens=count,
    )
    short = replace(short, positions=jnp.zeros_like(short.positions))
    of_short, of_long = (np.asarray(assign(policy, held).home) for held in (short, long))
    np.testing.assert_array_equal(of_long[..., :100], of_short[..., :100])
    np.testing.assert_array_equal(of_long[..., 100:200], of_short[..., :100])
    assert len(np.unique(of_short[..., :100])) == 3


PRUNE_ONLY = replace(POLICY, high_threshold=3.0, low_threshold=3.0)


def test_thresholds_keep_more_attention_than_equal_shares_would():
    window = PRUNE_ONLY.protected_window
    for seed in range(3):
        tokens = prompt(200, seed=seed)
        held = [head[HIGH] for head in tiers_of(compressed(PRUNE_ONLY, [tokens])[0], 0)]
        kept = [len(head.scores) for head in held]
        assert max(kept) > 1.15 * min(kept)
        mass = dense_run(tokens)[1][:, :, -64:].sum(2).reshape(len(HEADS), GROUP, -1).max(1)
        mean = mass / np.minimum(200 - np.arange(200), 64)
        best = np.sort(mean[:, :-window])[:, ::-1][:, : sum(kept) // len(kept) - window]
        equal = best.sum() + mean[:, -window:].sum()
        assert sum((head.scores / (200 - head.positions)).sum() for head in held) > 1.002 * equal


def test_of_longer_prompts_a_smaller_share_is_kept():
    shares = []
    for length in (60, 120, 240):
        held = [stats(compressed(PRUNE_ONLY, [prompt(length, seed=seed)])[0]) for seed in range(4)]
        shares.append(sum(h.kvs_held for h in held) / (4 * length * len(HEADS)))
    assert shares[0] > shares[1] > shares[2]


def test_a_row_of_a_batch_is_classified_as_it_is_alone():
    prompts = [prompt(120, seed=5), prompt(77, seed=6)]
    together, _ = read(empty(POLICY, 2), *padded(prompts), POLICY)
    for row, ids in enumerate(prompts):
        part = shrink(together.rows(jnp.array([row])), POLICY)
        alone, _ = compressed(POLICY, [ids])
        for a, b in zip(tiers_of(part, 0), tiers_of(alone, 0), strict=True):
            for x, y in zip(a, b, strict=True):
                assert x.positions.tolist() == y.positions.tolist()
                np.testing.assert_allclose(x.scores, y.scores, rtol=1e-3, atol=1e-5)


def test_what_a_decode_step_may_do_to_a_head():
    """It grows one tier by one KV or none, never promotes, spares the window, and attention's mass is all counted."""
    cache, logits = compressed(POLICY, [prompt(120, seed=5)])
    token, seen = int(logits[0].argmax()), set()
    for position in range(120, 140):
        before, worth = tiers_of(cache, 0), cache.tiers.weakest
        cache, logits = step(cache, jnp.array([token]), POLICY)
        conserved(cache)
        for (layer, head), old, new in zip(HEADS, before, tiers_of(cache, 0), strict=True):
            grown = tuple(len(n.scores) - len(o.scores) for o, n in zip(old, new, strict=True))
            assert grown in ((1, 0), (0, 1), (0, 0))
            seen.add(grown)
            mass = sum(float(tier.scores.sum()) for tier in new) - sum(float(tier.scores.sum()) for tier in old)
            lost = grown != (1, 0)  # what went took its score with it
            assert lost or 1 - 1e-4 <= mass <= GROUP + 1e-4
            young = [p for tier in old for p in tier.positions if position - p < POLICY.protected_window]
            assert set(young) <= {int(p) for p in new[0].positions}
            assert position in new[0].positions
            for tier in (HIGH, LOW):
                least = float(worth.value[layer, 0, head, tier])
                assert not np.isfinite(least) or least >= 0
        token = int(logits[0].argmax())
    assert len(seen) > 1


def test_without_thresholds_attention_is_over_all_dequantised_kvs():
    """The plain model, with each KV replaced by what the high tier makes of it once it is read."""
    tokens = prompt(60, seed=4)
    cache, logits = compressed(UNIFORM, [tokens])
    token = int(logits[0].argmax())
    held = tiers_of(cache, 0)
    new, after = step(cache, jnp.array([token]), UNIFORM)
    own = tiers_of(new, 0)

    def attend(state, layer, query, key, value):
        first = layer * CONFIG.num_kv_heads
        of_heads = [own[first + head][HIGH] for head in range(CONFIG.num_kv_heads)]
        k, v = (jnp.stack([getattr(tokens, name) for tokens in of_heads]) for name in ("key", "value"))
        q = query[0, 0].reshape(CONFIG.num_kv_heads, GROUP, -1)
        weights = jax.nn.softmax(jnp.einsum("hgd,htd->hgt", q, k) / np.sqrt(q.shape[-1]))
        return state, jnp.einsum("hgt,htd->hgd", weights, v).reshape(1, 1, CONFIG.num_heads, -1)

    assert all(len(head[HIGH].positions) == 60 and not len(head[LOW].positions) for head in held)
    assert all(len(head[HIGH].positions) == 61 for head in own)
    _, hidden = MODEL(jnp.array([[token]]), jnp.array([[60]]), attend, None)
    np.testing.assert_allclose(after[0], MODEL.logits(hidden)[0, 0], rtol=1e-4, atol=1e-4)


free_row = jax.jit(release)


@jax.jit
def read_row(cache, row, tokens, length):
    part, _ = read(cache.rows(row), tokens, length, POLICY)
    return cache.with_rows(shrink(part, POLICY), row)


@settings(max_examples=8)
@given(st.lists(st.tuples(st.sampled_from(["read", "decode", "finish"]), st.integers(0, 1)), min_size=4, max_size=14))
def test_no_trace_of_prompts_steps_and_ends_loses_a_block(trace):
    cache, busy = empty(POLICY, 2), [False, False]
    total = int(cache.tiers.tables.free.count)
    for i, (action, row) in enumerate(trace):
        if action == "read" and not busy[row]:
            tokens, lengths = padded([prompt(40 + 30 * (i % 3), seed=i)])
            tokens = jnp.zeros((1, 128), jnp.int32).at[:, : tokens.shape[1]].set(tokens)
            cache, busy[row] = read_row(cache, jnp.array([row]), tokens, lengths), True
        elif action == "finish":
            cache, busy[row] = free_row(cache, jnp.arange(2) == row), False
        elif action == "decode" and any(busy):
            stepped, _ = step(cache, jnp.array([3, 4]), POLICY)
            cache = free_row(stepped, ~jnp.array(busy))
        conserved(cache)
        assert not np.asarray(cache.raw.lengths).any()  # nothing stays unquantised
    cache = free_row(cache, jnp.ones(2, bool))
    assert int(cache.tiers.tables.free.count) == total


def test_where_a_prompt_cannot_be_quantised_nothing_is_decoded_from_it():
    """A step of the policy attends to quantised KVs alone, so it would answer as if there had been no prompt."""
    policy = LeanKV(high_threshold=0.0, low_threshold=0.0, block_tokens=8, protected_window=8)
    sizes = CacheConfig.for_model(CONFIG, batch=1, max_context=256, layout=policy.placement.layout(CONFIG.head_dim))
    sizes = replace(sizes, tiers=replace(sizes.tiers, num_blocks=12))
    made = generate(MODEL, init_cache(sizes), *padded([prompt(100)]), max_tokens=6, policy=policy)
    assert made.counts.tolist() == [1]
    assert made.active.tolist() == [True]
    _, logits = decode_step(MODEL, made.cache, made.tokens[:, 0], made.active, policy)
    assert np.isnan(logits).all()


def test_a_prompt_of_no_more_than_the_window_is_all_high():
    cache, _ = compressed(POLICY, [prompt(POLICY.protected_window)])
    held = stats(cache)
    assert held.kvs_high == held.kvs_held == POLICY.protected_window * len(HEADS)
    assert held.kvs_low == 0


def test_where_quantised_blocks_run_out_the_youngest_is_put_back(monkeypatch):
    monkeypatch.setattr(Scheduler, "expected", lambda self, sequence: 1)  # so rash that they do run out
    policy = LeanKV(high_threshold=0.0, low_threshold=0.0, block_tokens=8, protected_window=8)
    prompts, params = [prompt(60, seed=n) for n in range(3)], SamplingParams(max_tokens=60, ignore_eos=True)
    llm = LLM(MODEL, compression=policy, cache_memory=200_000, max_batch=3)

    together = answers(llm, prompts, params)
    assert llm.engine.preemptions > 0
    conserved(llm.engine.cache)
    assert together == {i: answers(llm, [p], params)[0] for i, p in enumerate(prompts)}
