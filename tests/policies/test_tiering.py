"""Quantised tiers: what the policies assign, budgets in bytes, conservation of blocks, reading on, the engine."""

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lean_kv import compressed, empty, read, shrink, step, tier_tokens
from tiny import CONFIG, MODEL, answers, assert_no_block_is_lost_or_shared, by_position, dense_run, padded, prompt

from jaxkv import LLM, KVCompress, MaxBytes, MaxTokens, Ratio, SamplingParams, Unlimited, stats
from jaxkv.cache import CacheConfig, init_cache
from jaxkv.cache.config import TierConfig
from jaxkv.cache.contents import Contents
from jaxkv.cache.home import GONE, HIGH, LOW, RAW
from jaxkv.compression.budget import Footprint, in_blocks
from jaxkv.generation.compress import compress
from jaxkv.generation.decode import decode_step, room_to_step
from jaxkv.generation.prefill import look_ahead, prefill
from jaxkv.policies import LeanKV, Mixed, StreamingLLM
from jaxkv.report import tier_mix
from models.shapes import SHAPES
from pallas_kernels.quantised_block import Format

pytestmark = pytest.mark.once

LAYERS, HEADS, KVS = 2, 2, 256
SMALL = {"block_tokens": 8, "protected_window": 8}
UNIFORM = LeanKV(high_threshold=0.0, low_threshold=0.0, high=Format.named("K8V8"), low=Format.named("K8V8"), **SMALL)


def mixed(ratio: float, **settings) -> Mixed:
    budget = Ratio(ratio=ratio)
    return Mixed(budget=budget, scoring=KVCompress(budget=budget, protected_window=8), block_tokens=8, **settings)


def cache_of(policy):
    """An empty one, of a single row."""
    tiers = TierConfig(layout=policy.placement.layout(16), num_blocks=400)
    sizes = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": 16, "batch": 1, "max_context": KVS}
    return init_cache(CacheConfig(**sizes, num_blocks=2, tiers=tiers))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Held(Contents):
    """What a sequence of so many tokens holds."""

    num_tokens: jax.Array


def a_prompt(seed: int, tokens: int) -> Held:
    """An uncompressed prompt whose KVs got random attention, some a thousand times more than others."""
    rng = np.random.default_rng(seed)
    shape = LAYERS, 1, HEADS, KVS
    place = np.broadcast_to(np.arange(KVS), shape)
    scores = np.exp(rng.normal(-3, 2, shape)) * np.minimum(tokens - place, 64).clip(0) / 64
    count = jnp.array([tokens], jnp.int32)
    return Held(
        home=jnp.where(place < tokens, RAW, GONE),
        index=jnp.asarray(place),
        scores=jnp.asarray(scores, jnp.float32),
        positions=jnp.asarray(place),
        num_tokens=count,
    )


def room_of(policy, tokens: int) -> int:
    """Quantised blocks that its budget leaves."""
    return int(jnp.maximum(policy.room(cache_of(policy), jnp.int32(tokens)), LAYERS * HEADS))


@partial(jax.jit, static_argnums=0)
def assign(policy, held):
    cache = replace(cache_of(policy), num_tokens=held.num_tokens)
    room = jnp.asarray(policy.room(cache, held.num_tokens[0]), jnp.int32)
    return policy.placement.goal(cache, held, policy.worth(cache, held), room)


def blocks_of(home, policy) -> int:
    tokens = [tier.tokens for tier in policy.placement.layout(16).tiers]
    return sum(int((-(-(home == tier).sum(-1) // tokens[tier])).sum()) for tier in (HIGH, LOW))


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


@pytest.mark.parametrize("policy", [mixed(4.0), LeanKV(budget=Ratio(ratio=4), **SMALL)], ids=["mixed", "leankv"])
def test_a_ratio_divides_what_the_same_cache_would_hold_uncompressed(policy):
    """In its own dtype, scores and positions included; tables come on top on both sides."""
    cache, _ = compressed(policy, [prompt(240, seed=2)])
    held = stats(cache)
    assert held.kvs_held == held.kvs_high + held.kvs_low
    quantised = held.blocks_held * cache.tiers.layout.block_bytes
    full = held.blocks_full * cache.raw.block_bytes
    assert 0.8 * full / 4 < quantised <= full / 4 < held.bytes_full / 4


def test_mixed_gives_the_best_to_the_high_tier():
    held = a_prompt(11, 250)
    home = np.asarray(assign(mixed(6.0), held).home)
    scores = np.asarray(held.scores)
    for layer in range(LAYERS):
        for head in range(HEADS):
            of = [scores[layer, 0, head, :242][home[layer, 0, head, :242] == tier] for tier in (HIGH, LOW, GONE)]
            kept = [part for part in of if len(part)]
            assert all(better.min() >= worse.max() for better, worse in pairwise(kept))


def conserved(cache) -> None:
    """Every quantised block is free or in one table, but the null block."""
    tiers = cache.tiers
    free = np.asarray(tiers.tables.free.blocks)[: int(tiers.tables.free.count)].tolist()
    table, held = np.asarray(tiers.tables.block_table), np.asarray(tiers.tables.blocks_held())
    width = table.shape[-1]
    taken = [
        block
        for at in np.ndindex(held.shape[:-1])
        for block in [*table[at][: held[at][HIGH]], *table[at][width - held[at][LOW] :]]
    ]
    assert sorted(free + taken) == list(range(1, tiers.pool.shape[0]))


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
