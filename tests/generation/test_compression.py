"""What compression does to a real cache and to what the model says afterwards (KV-Compress, section 4)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxkv.cache.stats import stats
from jaxkv.generation.compress import compress
from jaxkv.generation.decode import decode, decode_step, generate
from jaxkv.generation.prefill import prefill
from jaxkv.policies import KeepFraction, KVCompress, MaxBytes, MaxTokens, Ratio

HEADS = tiny.CONFIG.num_layers * tiny.CONFIG.num_kv_heads


@partial(jax.jit, static_argnames="policy", donate_argnums=0)
def read(cache, tokens, lengths, policy):
    return prefill(tiny.MODEL, cache, tokens, lengths, policy)


@partial(jax.jit, static_argnames="policy")
def compressed(cache, policy):
    return compress(cache, policy)


@partial(jax.jit, static_argnames="policy", donate_argnums=0)
def step(cache, tokens, active, policy=None):
    return decode_step(tiny.MODEL, cache, tokens, active, policy)


@partial(jax.jit, static_argnames=("steps", "policy"), donate_argnums=0)
def run(cache, tokens, limits, steps, policy=None):
    return decode(tiny.MODEL, cache, tokens, limits, steps=steps, policy=policy)


@partial(jax.jit, static_argnames=("max_tokens", "policy", "stop_tokens"), donate_argnums=0)
def answer(cache, tokens, lengths, max_tokens, policy=None, stop_tokens=()):
    return generate(tiny.MODEL, cache, tokens, lengths, max_tokens=max_tokens, policy=policy, stop_tokens=stop_tokens)


def kvs(cache, row=0):
    """{(layer, head): {position: (row of the pool, score)}}."""
    return {
        (layer, head): {
            p: (kv, tiny.by_position(cache, cache.raw.scores, layer, row, head)[p])
            for p, kv in tiny.by_position(cache, cache.raw.pool, layer, row, head).items()
        }
        for layer, head in np.ndindex(tiny.CONFIG.num_layers, tiny.CONFIG.num_kv_heads)
    }


def blocks(cache, row=0):
    return int(tiny.blocks_held(cache)[:, row].sum())


@pytest.mark.parametrize("tokens", [32, 48, 100, 112])
def test_blocks_held_are_the_budgets(tokens):
    policy = KVCompress(budget=MaxTokens(tokens=tokens))
    cache, _ = read(tiny.empty_cache(), *tiny.padded([tiny.prompt(200)]), policy)
    after = compressed(cache, policy)
    assert blocks(after) == HEADS * -(-tokens // 16)
    held = int(after.lengths.sum())
    assert held <= -(-tokens // 16) * 16 * HEADS
    given = tiny.blocks_held(cache) - tiny.blocks_held(after)
    assert (np.asarray(after.lengths)[given > 0] % 16 == 0).all()
    assert (np.asarray(after.lengths)[given == 0] == 200).all()
    assert int(after.raw.tables.free.count) == int(cache.raw.tables.free.count) + given.sum()


def test_heads_keep_different_shares():
    policy = KVCompress(budget=MaxTokens(tokens=64), protected_window=8)
    cache, _ = read(tiny.empty_cache(), *tiny.padded([tiny.prompt(250)]), policy)
    kept = tiny.blocks_held(compressed(cache, policy))
    assert kept.min() < kept.max()


@pytest.mark.parametrize("budget", [MaxTokens(tokens=96), Ratio(ratio=1), KeepFraction(fraction=1.0)])
def test_a_sequence_within_its_budget_is_untouched(budget):
    policy = KVCompress(budget=budget)
    cache, _ = read(tiny.empty_cache(), *tiny.padded([tiny.prompt(93)]), policy)
    after = compressed(cache, policy)
    kept, old = ((c.raw.tables, c.num_tokens) for c in (after, cache))
    jax.tree.map(np.testing.assert_array_equal, kept, old)
    np.testing.assert_array_equal(after.raw.pool[1:], cache.raw.pool[1:])


@pytest.mark.parametrize("budget", [Ratio(ratio=4), Ratio(ratio=64), MaxBytes(size=20_000), KeepFraction(fraction=0.1)])
def test_survivors_keep_key_value_score_and_position(budget):
    policy = KVCompress(budget=budget, protected_window=8)
    cache, _ = read(tiny.empty_cache(), *tiny.padded([tiny.prompt(137)]), policy)
    before, after = kvs(cache), kvs(compressed(cache, policy))
    for head, kept in after.items():
        assert 0 < len(kept) <= len(before[head])
        for position, (kv, score) in kept.items():
            np.testing.assert_array_equal(kv, before[head][position][0])
            assert score == before[head][position][1]


def test_the_newest_and_the_sinks_always_stay():
    policy = KVCompress(budget=Ratio(ratio=64), protected_window=20, sinks=3)
    length = 200
    cache, _ = read(tiny.empty_cache(), *tiny.padded([tiny.prompt(length)]), policy)
    after = kvs(compressed(cache, policy))
    must = {*range(3), *range(length - 19, length)}  # the window counts the token that is sampled but not yet cached
    for kept in after.values():
        assert must <= set(kept)


def test_of_what_is_not_protected_each_head_keeps_its_best():
    policy = KVCompress(budget=MaxTokens(tokens=64), protected_window=10)
    length = 200
    cache, _ = read(tiny.empty_cache(), *tiny.padded([tiny.prompt(length)]), policy)
    before, after = kvs(cache), kvs(compressed(cache, policy))
    for head, kept in after.items():
        old = [p for p in kept if p <= length - 10]
        gone = [p for p in before[head] if p not in kept]
        if old and gone:
            assert min(before[head][p][1] for p in old) >= max(before[head][p][1] for p in gone)


def test_compressing_together_or_alone_is_the_same():
    policy = KVCompress(budget=Ratio(ratio=4), protected_window=8)
    prompts = [tiny.prompt(200, 1), tiny.prompt(60, 2), tiny.prompt(133, 3)]
    together, _ = read(tiny.empty_cache(batch=3), *tiny.padded(prompts), policy)
    together = compressed(together, policy)
    for row, ids in enumerate(prompts):
        alone, _ = read(tiny.empty_cache(), *tiny.padded([ids]), policy)
        alone = compressed(alone, policy)
        for head, kept in kvs(alone).items():
            assert set(kept) == set(kvs(together, row)[head])


def test_only_selected_rows_are_compressed():
    policy = KVCompress(budget=Ratio(ratio=8), protected_window=8)
    cache, _ = read(tiny.empty_cache(batch=2), *tiny.padded([tiny.prompt(100, 1), tiny.prompt(100, 2)]), policy)
    after = jax.jit(lambda c: compress(c, policy, jnp.array([False, True])))(cache)
    assert blocks(after, 0) == blocks(cache, 0)
    assert blocks(after, 1) == HEADS  # a head never has less than a block


def test_after_eviction_the_model_attends_to_the_survivors_at_their_true_positions():
    """Cached keys stay rotated where they stood, and new tokens go on counting from the text's length."""
    policy = KVCompress(budget=Ratio(ratio=4), protected_window=8)
    ids, more = tiny.prompt(120, 5), tiny.prompt(20, 6)
    cache, _ = read(tiny.empty_cache(), *tiny.padded([ids]), policy)
    cache = compressed(cache, policy)
    survivors = kvs(cache)
    text = np.concatenate([ids, more])
    visible = np.broadcast_to(np.tril(np.ones((len(text),) * 2, bool)), (2, 2, len(text), len(text))).copy()
    for (layer, head), kept in survivors.items():
        gone = [p for p in range(len(ids)) if p not in kept]
        visible[layer, head, len(ids) :, gone] = False
    wanted, _ = tiny.dense_run(text, visible)
    for i, token in enumerate(more):
        cache, logits = step(cache, jnp.array([token]), jnp.array([True]))
        np.testing.assert_allclose(logits[0], wanted[len(ids) + i], atol=2e-3, rtol=1e-3)
    for head, kept in kvs(cache).items():
        assert set(kept) == {*survivors[head], *range(len(ids), len(text))}


def test_a_second_prompt_is_read_after_compression():
    """A question after its document was compressed: heads have unequal lengths and part-filled blocks."""
    policy = KVCompress(budget=Ratio(ratio=4), protected_window=8)
    ids, more = tiny.prompt(121, 5), tiny.prompt(37, 6)
    cache, _ = read(tiny.empty_cache(), *tiny.padded([ids]), policy)
    cache = compressed(cache, policy)
    one_by_one, chunked = jax.tree.map(jnp.copy, cache), cache
    for token in more:
        one_by_one, wanted = step(one_by_one, jnp.array([token]), jnp.array([True]))
    chunked, logits = read(chunked, *tiny.padded([more]), None)
    np.testing.assert_allclose(logits, wanted, atol=2e-3, rtol=1e-3)
    for head, kept in kvs(one_by_one).items():
        assert dict.fromkeys(kept).keys() == kvs(chunked)[head].keys()


def test_with_nothing_evicted_tokens_are_those_of_the_dense_model():
    prompts = [tiny.prompt(40, 1), tiny.prompt(7, 2), tiny.prompt(65, 3)]
    policy = KVCompress(budget=MaxTokens(tokens=512), compress_every=4)
    made = answer(tiny.empty_cache(batch=3), *tiny.padded(prompts), 24, policy)
    for row, ids in enumerate(prompts):
        assert made.tokens[row].tolist() == tiny.dense_greedy(ids, 24)


def test_the_first_token_comes_from_the_full_cache():
    policy = KVCompress(budget=Ratio(ratio=16), protected_window=4)
    ids = tiny.prompt(230, 9)
    made = answer(tiny.empty_cache(), *tiny.padded([ids]), 2, policy)
    assert int(made.tokens[0, 0]) == tiny.dense_greedy(ids, 1)[0]
    dense, _ = tiny.dense_run(ids)
    top = dense[-1] - np.logaddexp.reduce(dense[-1])
    assert float(made.logprobs[0, 0]) == pytest.approx(top.max(), abs=1e-3)


def test_a_batch_gives_what_each_prompt_alone_gives():
    policy = KVCompress(budget=Ratio(ratio=4), protected_window=8, compress_every=7)
    prompts = [tiny.prompt(150, 1), tiny.prompt(64, 2), tiny.prompt(17, 3)]
    tokens, lengths = tiny.padded(prompts)
    together = answer(tiny.empty_cache(batch=3), tokens, lengths, 40, policy)
    for row in range(3):
        alone = answer(tiny.empty_cache(), tokens[row : row + 1], lengths[row : row + 1], 40, policy)
        assert together.tokens[row].tolist() == alone.tokens[0].tolist()


def test_compressing_once_leaves_the_answer_to_grow():
    policy = KVCompress(budget=MaxTokens(tokens=48), protected_window=8)
    made = answer(tiny.empty_cache(), *tiny.padded([tiny.prompt(160)]), 33, policy)
    after_prompt = 48 * HEADS
    assert int(made.cache.lengths.sum()) == after_prompt + 32 * HEADS  # all heads were cut to whole blocks


def test_continual_compression_bounds_the_blocks_after_each_token():
    policy = KVCompress(budget=MaxTokens(tokens=48), protected_window=8, compress_every=1)
    budget = HEADS * 3
    cache, logits = read(tiny.empty_cache(), *tiny.padded([tiny.prompt(160)]), policy)
    cache = compressed(cache, policy)
    token = jnp.argmax(logits, -1)
    for _ in range(40):
        appended, logits = step(jax.tree.map(jnp.copy, cache), token, jnp.array([True]), policy)
        assert blocks(appended) <= budget + HEADS
        cache = run(cache, token, jnp.array([2]), 1, policy).cache
        assert blocks(cache) <= budget
        token = jnp.argmax(logits, -1)


def test_memory_falls_as_the_ratio_rises():
    held = []
    ids = tiny.padded([tiny.prompt(250)])
    for ratio in (1, 2, 4):
        policy = KVCompress(budget=Ratio(ratio=ratio), protected_window=8)
        cache, _ = read(tiny.empty_cache(), *ids, policy)
        held.append(stats(compressed(cache, policy)))
    assert [s.blocks_held for s in held] == [64, 32, 16]
    assert [s.blocks_free - held[0].blocks_free for s in held] == [0, 32, 48]
    assert held[0].bytes_held > 1.8 * held[1].bytes_held > 3.2 * held[2].bytes_held


def test_decoding_stops_before_the_pool_runs_dry():
    """Nothing is written past the pool, and what is there stays right."""
    ids = tiny.prompt(30)
    cache, logits = read(tiny.empty_cache(num_blocks=1 + HEADS * 3), *tiny.padded([ids]), None)
    made = run(cache, jnp.argmax(logits, -1), jnp.array([100]), 64)
    assert made.counts.tolist() == [48 - 30]
    assert made.active.tolist() == [True]
    assert int(made.cache.raw.tables.free.count) == 0
    assert made.tokens[0, :18].tolist() == tiny.dense_greedy(ids, 19)[1:]
    _, refused = step(jax.tree.map(jnp.copy, made.cache), jnp.array([1]), jnp.array([True]))
    assert np.isnan(refused).all()


def test_decoding_stops_before_the_table_ends():
    """With free blocks left, and for all rows: none gets a token that nothing was read for."""
    prompts = [tiny.prompt(28), tiny.prompt(10, 1)]
    cache = tiny.empty_cache(batch=2, max_context=32, num_blocks=200)
    made = answer(cache, *tiny.padded(prompts), 12)
    assert made.counts.tolist() == [1 + 32 - 28] * 2
    assert made.active.tolist() == [True, True]
    for row, ids in enumerate(prompts):
        assert made.tokens[row, :5].tolist() == tiny.dense_greedy(ids, 5)
    assert np.isfinite(made.logprobs).all()


def test_no_tokens_is_no_answer():
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        answer(tiny.empty_cache(), *tiny.padded([tiny.prompt(20)]), 0)


def test_what_follows_a_chunk_that_finds_no_room_is_not_read():
    policy = KVCompress(budget=Ratio(ratio=4), protected_window=8)
    tokens, lengths = tiny.padded([tiny.prompt(140)])
    cache, logits = prefill(tiny.MODEL, tiny.empty_cache(num_blocks=1 + HEADS * 6), tokens, lengths, policy, chunk=64)
    assert np.isnan(logits).all()
    assert cache.num_tokens.tolist() == [64]
    assert (np.asarray(cache.lengths) == 64).all()


def test_a_row_without_a_prompt_stays_as_it_is():
    policy = KVCompress(budget=Ratio(ratio=4), protected_window=8)
    prompts = tiny.padded([tiny.prompt(60), tiny.prompt(40, 1)])
    before, _ = read(tiny.empty_cache(batch=2), *prompts, policy)
    before = jax.tree.map(jnp.copy, before)
    after, _ = read(jax.tree.map(jnp.copy, before), *tiny.padded([tiny.prompt(0), tiny.prompt(50, 2)]), policy)
    assert after.num_tokens.tolist() == [60, 90]
    for layer, head in np.ndindex(tiny.CONFIG.num_layers, tiny.CONFIG.num_kv_heads):
        now, then = (tiny.by_position(c, c.raw.scores, layer, 0, head) for c in (after, before))
        assert now == then
        assert sum(then.values()) > 0


def test_a_prompt_that_finds_no_room_writes_nothing():
    cache, logits = read(tiny.empty_cache(num_blocks=5), *tiny.padded([tiny.prompt(100)]), None)
    assert np.isnan(logits).all()
    assert int(cache.lengths.sum()) == 0
    assert int(cache.raw.tables.free.count) == 4
    assert (np.asarray(cache.raw.pool[1:]) == 0).all()
    made = answer(tiny.empty_cache(num_blocks=5), *tiny.padded([tiny.prompt(100)]), 4)
    assert made.counts.tolist() == [0]
    assert made.active.tolist() == [True]


def test_a_stop_token_ends_a_row_and_not_its_neighbours():
    prompts = [tiny.prompt(40, 1), tiny.prompt(40, 2)]
    free = answer(tiny.empty_cache(batch=2), *tiny.padded(prompts), 20)
    stop = int(free.tokens[0, 6])
    first = free.tokens[0].tolist().index(stop)
    made = answer(tiny.empty_cache(batch=2), *tiny.padded(prompts), 20, None, (stop,))
    assert made.counts[0] == first + 1
    assert made.tokens[0, : first + 1].tolist() == free.tokens[0, : first + 1].tolist()
    assert (np.asarray(made.tokens[0, first + 1 :]) == 0).all()
    other = free.tokens[1].tolist()
    until = other.index(stop) + 1 if stop in other else 20
    assert made.tokens[1, :until].tolist() == other[:until]


@pytest.mark.parametrize(
    ("lengths", "changed"),
    [([121, 0], {}), ([2**31 - 1, 5], {}), ([60, -1], {}), ([60, 5], {(0, 59): 101}), ([60, 5], {(1, 0): -1})],
)
def test_prompts_that_are_none_give_nan_and_no_tokens(lengths, changed):
    """Lengths beyond the tokens' width, and tokens that the model hasn't."""
    tokens, _ = tiny.padded([tiny.prompt(120), tiny.prompt(5)])
    for at, token in changed.items():
        tokens = tokens.at[at].set(token)
    lengths = jnp.array(lengths, jnp.int32)
    cache, logits = read(tiny.empty_cache(batch=2), tokens, lengths, None)
    assert np.isnan(np.asarray(logits)).all()
    assert int(cache.lengths.sum()) == int(cache.num_tokens.sum()) == 0
    assert answer(tiny.empty_cache(batch=2), tokens, lengths, 4).counts.tolist() == [0, 0]


def test_padding_may_be_anything():
    tokens, lengths = tiny.padded([tiny.prompt(120), tiny.prompt(5)])
    odd = jnp.where(jnp.arange(120) < lengths[:, None], tokens, -7)
    made = [answer(tiny.empty_cache(batch=2), each, lengths, 4).tokens.tolist() for each in (tokens, odd)]
    assert made[0] == made[1]


@pytest.mark.parametrize(("tokens", "lengths"), [((2, 8), (1,)), ((1, 8), (2,)), ((8,), (2,)), ((2, 0), (2,))])
def test_shapes_that_do_not_belong_together_are_refused(tokens, lengths):
    with pytest.raises(ValueError, match=r"for a cache of 2 sequences expected tokens \[2, length\]"):
        read(tiny.empty_cache(batch=2), jnp.zeros(tokens, jnp.int32), jnp.ones(lengths, jnp.int32), None)
