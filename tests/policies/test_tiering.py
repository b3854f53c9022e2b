"""What policies with quantised tiers assign: thresholds, budgets in bytes, a second compression."""

from dataclasses import replace
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiering import (
    HEADS,
    KVS,
    LAYERS,
    SMALL,
    Held,
    a_prompt,
    assign,
    blocks_of,
    mixed,
    room_of,
)
from tiny import CONFIG, MODEL, prompt

from jaxkv import LLM, KVCompress, MaxBytes, MaxTokens, Ratio, SamplingParams, Unlimited
from jaxkv.cache import CacheConfig
from jaxkv.cache.home import GONE, HIGH, LOW
from jaxkv.compression.budget import Footprint, in_blocks
from jaxkv.policies import LeanKV, Mixed
from models.shapes import SHAPES

pytestmark = pytest.mark.once


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, KVS))
def test_a_prompt_is_classified_as_the_paper_says(seed, tokens):
    policy = LeanKV(high_threshold=1.0, low_threshold=0.1, **SMALL)
    held = a_prompt(seed, tokens)
    home = np.asarray(assign(policy, held).home)
    scores = np.asarray(held.scores, np.float64)
    for place in range(tokens):
        mean = scores[..., place] / min(tokens - place, 64) * tokens
        expected = np.where(mean >= 1.0, HIGH, np.where(mean >= 0.1, LOW, GONE))
        expected = np.full_like(expected, HIGH) if place >= tokens - 8 else expected
        clear = (np.abs(mean - 1.0) > 1e-4) & (np.abs(mean - 0.1) > 1e-5)
        assert (home[..., place] == expected)[clear].all()
    assert (home[..., tokens:] == GONE).all()
    np.testing.assert_array_equal(
        np.asarray(assign(policy, held).positions)[..., :tokens],
        np.broadcast_to(np.maximum(np.arange(tokens), tokens - 64), (LAYERS, 1, HEADS, tokens)),
    )


def test_higher_thresholds_keep_no_more():
    held = a_prompt(3, 200)
    counts = []
    for high, low in ((0.5, 0.1), (1.0, 0.1), (2.0, 0.1), (2.0, 0.5), (2.0, 2.0)):
        home = np.asarray(assign(LeanKV(high_threshold=high, low_threshold=low, **SMALL), held).home)
        counts.append(((home == HIGH).sum(), (home <= LOW).sum()))
    assert all(a[0] >= b[0] for a, b in pairwise(counts))
    assert counts[2][1] > counts[3][1] > counts[4][1]
    assert counts[4][0] == counts[4][1]  # one threshold: no low tier
    assert counts[0][1] == counts[1][1]  # the high one prunes nothing


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), ratio=st.sampled_from([2.0, 4.0, 8.0]), tokens=st.integers(150, KVS))
@pytest.mark.parametrize("kind", ["thresholds", "never prunes", "no thresholds", "mixed"])
def test_a_budget_in_bytes_is_never_passed(kind, seed, ratio, tokens):
    low = 0.1 if kind == "thresholds" else 0.0
    high = 0.0 if kind == "no thresholds" else 1.0
    policy = LeanKV(budget=Ratio(ratio=ratio), high_threshold=high, low_threshold=low, **SMALL)
    policy = mixed(ratio) if kind == "mixed" else policy
    home = np.asarray(assign(policy, a_prompt(seed, tokens)).home)
    full = LAYERS * HEADS * -(-tokens // 16) * 16 * (2 * 16 * 4 + 8)  # bytes of float32, scores and positions
    most = room_of(policy, tokens)
    assert most * policy.placement.layout(16).block_bytes <= max(full / ratio, LAYERS * HEADS * 1000)
    assert blocks_of(home, policy) <= most
    assert (home[..., tokens - 7 : tokens] == HIGH).all()
    if kind == "mixed":
        assert blocks_of(home, policy) == most or (home[..., :tokens] != GONE).all()


@pytest.mark.parametrize(("budget", "low"), [(Ratio(ratio=6), 0.0), (Ratio(ratio=6), 0.1), (None, 0.1)])
def test_a_budget_leaves_no_slot_of_its_blocks_empty(budget, low):
    """The least one, a block a head, keeps more than the window, and each the most significant of its head."""
    policy = LeanKV(high_threshold=1.0, low_threshold=low, block_tokens=8, protected_window=3)
    least = MaxBytes(size=LAYERS * HEADS * policy.placement.layout(16).block_bytes)
    policy = replace(policy, budget=budget or least)
    held = a_prompt(11, 250)
    home, wanted = (np.asarray(assign(each, held).home) for each in (policy, replace(policy, budget=Unlimited())))
    assert blocks_of(home, policy) <= room_of(policy, 250) < blocks_of(wanted, policy)
    tokens = [tier.tokens for tier in policy.placement.layout(16).tiers]
    gone = (home == GONE) & (wanted != GONE)
    for layer, head in np.ndindex(LAYERS, HEADS):
        for tier in (HIGH, LOW):
            assert (home[layer, 0, head] == tier).sum() % tokens[tier] == 0 or not gone[layer, 0, head].any()
        mean = np.asarray(held.scores)[layer, 0, head, :247] / np.minimum(250 - np.arange(247), 64)
        ranked = home[layer, 0, head, :247][np.argsort(-mean)]
        assert (np.diff(ranked) >= 0).all()  # first high ones, then low ones, then those that are gone
    if policy.budget is least:
        assert ((home == HIGH).sum(-1) == 8).all()
        assert not (home == LOW).any()


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800000, 0xFF800000])
def test_scores_that_are_no_numbers_keep_what_is_protected_and_the_budget(bits):
    held, rng = a_prompt(5, 250), np.random.default_rng(5)
    scores = np.where(rng.random(held.scores.shape) < 0.3, np.uint32(bits).view(np.float32), held.scores)
    for policy in mixed(4.0), LeanKV(budget=Ratio(ratio=4), high_threshold=1.0, low_threshold=0.1, **SMALL):
        home = np.asarray(assign(policy, replace(held, scores=jnp.asarray(scores))).home)
        assert (home[..., 243:250] == HIGH).all()
        assert blocks_of(home, policy) <= room_of(policy, 250)


def test_mixed_keeps_to_its_budget_where_some_kvs_are_low_already():
    policy, rng = mixed(2.0), np.random.default_rng(0)
    for seed in range(20):
        held = a_prompt(seed, 250)
        low = rng.random(held.home.shape) < rng.choice([0.1, 0.3, 0.5])
        before = np.where(np.asarray(held.home) == GONE, GONE, np.where(low, LOW, HIGH))
        after = np.asarray(assign(policy, replace(held, home=jnp.asarray(before))).home)
        assert (after >= before).all()
        most = room_of(policy, 250)
        assert blocks_of(after, policy) == most or (after[before < GONE] != GONE).all()
        assert blocks_of(after, policy) <= most


@given(count=st.integers(0, 2**22), sizes=st.tuples(st.integers(100, 70_000), st.integers(1000, 70_000)))
def test_blocks_of_one_size_are_counted_exactly_in_blocks_of_another(count, sizes):
    """Beyond what float32 can tell apart."""
    from_bytes, to_bytes = sizes
    count = min(count, (2**31 - 1) * to_bytes // from_bytes)
    assert int(in_blocks(jnp.int32(count), from_bytes, to_bytes)) == count * from_bytes // to_bytes


@pytest.mark.parametrize("less", [0, 1, 64])
@pytest.mark.parametrize("blocks", [7000, 70_001, 70_004])
def test_a_budget_of_bytes_is_counted_exactly(blocks, less):
    size = LeanKV().placement.layout(128).block_bytes
    of = Footprint(tokens=9, kvs=9, blocks=9, heads=4, block_size=16, block_bytes=30_000, protected_window=8)
    assert MaxBytes(size=blocks * size - less).blocks(of, size) == blocks - (less > 0)


def test_mixed_gives_the_best_to_the_high_tier():
    held = a_prompt(11, 250)
    home = np.asarray(assign(mixed(6.0), held).home)
    scores = np.asarray(held.scores)
    for layer in range(LAYERS):
        for head in range(HEADS):
            of = [scores[layer, 0, head, :242][home[layer, 0, head, :242] == tier] for tier in (HIGH, LOW, GONE)]
            kept = [part for part in of if len(part)]
            assert all(better.min() >= worse.max() for better, worse in pairwise(kept))


def quantised(held: Held, policy: LeanKV) -> Held:
    """What a sequence holds once it is compressed."""
    goal = assign(policy, held)
    return replace(held, home=goal.home, positions=goal.positions)


@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_a_second_compression_promotes_nothing_and_keeps_to_the_budget(ratio):
    """At the default window, within which the stored positions of all of a prompt's KVs lie."""
    policy = LeanKV(high_threshold=1.0, low_threshold=0.1, block_tokens=8, budget=Ratio(ratio=ratio))
    once = quantised(a_prompt(7, 250), policy)
    before = np.asarray(once.home)
    assert (before == LOW).any()
    for _ in range(2):
        once = quantised(once, policy)
        after = np.asarray(once.home)
        assert (after >= before).all()
        assert blocks_of(after, policy) <= room_of(policy, 250)
        assert (after != before)[..., :186].sum() == 0  # older than the window: judged as before
        before = after


def test_mixed_protects_what_its_scoring_does():
    scoring = KVCompress(budget=Ratio(ratio=2), protected_window=100, sinks=5)
    policy = Mixed(budget=Ratio(ratio=2), scoring=scoring, unquantised_window=True, block_tokens=8)
    assert (policy.protected_window, policy.sinks) == (100, 5)
    assert replace(policy, scoring=replace(scoring, sinks=0)).sinks == 0
    with pytest.raises(ValueError, match="protected_window"):
        replace(policy, protected_window=8)
    [answer] = LLM(MODEL, compression=policy).generate([prompt(200).tolist()], SamplingParams(max_tokens=2))
    assert answer.cache.kvs_held > answer.cache.kvs_high + answer.cache.kvs_low


def test_thresholds_are_the_models_own_where_they_are_not_given():
    llama, unknown = SHAPES["llama-3.1-8b"], CONFIG
    assert LeanKV().for_model(SHAPES["qwen2.5-7b"]).thresholds == (0.04, 0.04)
    assert LeanKV().for_model(llama).thresholds == LeanKV().for_model(unknown).thresholds == (1.0, 0.02)
    assert LeanKV().thresholds == (1.0, 0.02)
    assert LeanKV(high_threshold=3.0).for_model(llama).thresholds == (3.0, 0.02)
    assert LeanKV(high_threshold=0.01).for_model(llama).thresholds == (0.01, 0.01)
    assert LeanKV(low_threshold=0.0).for_model(SHAPES["qwen2.5-7b"]).thresholds == (0.04, 0.0)
    assert LLM(MODEL, compression=LeanKV()).compression == LeanKV(high_threshold=1.0, low_threshold=0.02)
    with pytest.raises(ValueError, match=r"0 <= low_threshold <= high_threshold, got low_threshold=2\.0"):
        LeanKV(low_threshold=2.0)


@pytest.mark.parametrize("window", [64, 65])
def test_a_budget_is_checked_with_the_quantised_sizes(window):
    """A window of 64 takes a block of each of SmolLM2's 90 heads, one of 65 two."""
    leankv = LeanKV(protected_window=window)
    mixed = Mixed.over(KVCompress, budget=leankv.budget, protected_window=window + 1)
    layout = leankv.placement.layout(64)
    config = CacheConfig.for_model(SHAPES["smollm2-135m"], batch=4, max_context=2048, layout=layout)
    need = 90 * (1 + (window > 64)) * layout.block_bytes
    assert need < 2_000_000
    for policy in (leankv, mixed):
        replace(policy, budget=MaxBytes(size=need)).check(config)
        with pytest.raises(ValueError, match=rf"max_cache_bytes={need - 1} leaves .* take {need}; give more"):
            replace(policy, budget=MaxBytes(size=need - 1)).check(config)
    with pytest.raises(ValueError, match=r"max_cache_tokens=8 leaves"):
        replace(leankv, budget=MaxTokens(tokens=8)).check(replace(config, dtype=jnp.bfloat16))
    replace(leankv, budget=Ratio(ratio=100)).check(config)  # what that leaves depends on the text


def test_a_budget_pays_for_an_unquantised_window():
    policy = mixed(1.0, unquantised_window=True)
    config = CacheConfig.for_model(CONFIG, batch=1, max_context=256, layout=policy.placement.layout(16))
    need = 4 * (policy.placement.layout(16).block_bytes + config.block_bytes)
    replace(policy, budget=MaxBytes(size=need)).check(config)
    with pytest.raises(ValueError, match=f"take {need}"):
        replace(policy, budget=MaxBytes(size=need - 1)).check(config)
