"""Rows that hold the same blocks: what each reads is as if it alone were there, and no block is lost."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkv import H2O, Auto, KVCompress, LeanKV, compress, decode, fork, prefill, release, reorder, room_to_step
from jaxkv.cache import own

BATCH, CONTEXT = 4, 128
POLICIES = {
    "full cache": None,
    "evicted": KVCompress(ratio=3, window=8, protected_window=8),
    "compressed again": H2O(ratio=3, protected_window=8, compress_every=8),
    "two precisions": Auto(ratio=3),
    "leankv": LeanKV(ratio=3, protected_window=8),
}


def layout_of(policy):
    return None if policy is None else policy.placement.layout(tiny.CONFIG.head_dim)


def empty(policy, batch=BATCH, **sizes):
    return tiny.empty_cache(batch=batch, max_context=CONTEXT, layout=layout_of(policy), **sizes)


@partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def read(cache, tokens, lengths, policy, then):
    cache, logits = prefill(tiny.MODEL, cache, tokens, lengths, policy, chunk=32)
    cache = compress(cache, then, lengths > 0) if then is not None else cache
    return cache, jnp.argmax(logits, -1)


@partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def write(cache, last, limits, steps, policy):
    made = decode(tiny.MODEL, cache, last, limits, steps=steps, policy=policy)
    return made.cache, made.tokens, made.counts


split = jax.jit(fork, donate_argnums=0)
ordered = jax.jit(reorder, donate_argnums=0)
let_go = jax.jit(release, donate_argnums=0)


def row(ids, at, batch=BATCH):
    tokens = jnp.zeros((batch, 64), jnp.int32).at[at, : len(ids)].set(jnp.asarray(ids))
    return tokens, jnp.zeros(batch, jnp.int32).at[at].set(len(ids))


def assert_nothing_is_lost(cache):
    for store in [cache.raw] if cache.layout is None else [cache.raw, cache.tiers]:
        tables = store.tables
        occupied = np.asarray(tables.occupied())
        tiny.assert_the_free_list_is_right(tables.free, [np.asarray(tables.block_table)[occupied]])


def free_blocks(cache):
    stores = [cache.raw] if cache.layout is None else [cache.raw, cache.tiers]
    return [int(store.tables.free.count) for store in stores]


@pytest.mark.parametrize("name", POLICIES)
def test_a_fork_goes_on_as_the_row_would_have(name):
    """Each with a question of its own; what they share isn't changed by one for the other."""
    policy = POLICIES[name]
    acts = policy if policy is not None and policy.acts_in_decoding else None
    context = tiny.prompt(57, 3)
    questions = [tiny.prompt(7 + i, 20 + i) for i in range(3)]

    def answered(cache, at, question):
        """A question alone after what its row holds; where each token is quantised at once, it is quantised, too."""
        quantises = policy if name == "leankv" else None
        cache, first = read(cache, *row(question, at), quantises, quantises)
        here = jnp.arange(BATCH) == at
        return write(cache, jnp.where(here, first, 0), jnp.where(here, 9, 0), 9, acts)

    wanted = []
    for question in questions:
        cache, _ = read(empty(policy), *row(context, 0), policy, policy)
        wanted.append(answered(cache, 0, question)[1][0].tolist())
    cache, _ = read(empty(policy), *row(context, 0), policy, policy)
    held = free_blocks(cache)
    cache, granted = split(cache, 0, jnp.array([1, 3]))
    assert granted
    assert_nothing_is_lost(cache)
    part_filled = int((np.asarray(cache.raw.lengths)[:, 0] % 16 > 0).sum())
    assert free_blocks(cache) == [held[0] - 2 * part_filled, *held[1:]]
    for at, question, expected in zip((3, 0, 1), questions, wanted, strict=True):
        cache, tokens, counts = answered(cache, at, question)
        assert_nothing_is_lost(cache)
        assert counts[at] == 9
        assert tokens[at].tolist() == expected
    cache = let_go(cache, jnp.ones(BATCH, bool))
    assert_nothing_is_lost(cache)
    assert free_blocks(cache) == free_blocks(empty(policy))


@pytest.mark.parametrize("name", ["evicted", "two precisions"])
def test_what_is_shared_is_copied_before_it_is_evicted(name):
    policy = POLICIES[name]
    cache, _ = read(empty(policy), *row(tiny.prompt(60, 4), 0), policy, None)
    cache, _ = split(cache, 0, jnp.array([1]))
    before = [tiny.by_position(cache, cache.raw.pool, 1, 0, head) for head in range(2)]
    cache = jax.jit(compress, static_argnums=1)(cache, policy, jnp.array([False, True, False, False]))
    assert_nothing_is_lost(cache)
    assert (np.asarray(cache.raw.lengths)[:, 1] < 60).any()
    after = [tiny.by_position(cache, cache.raw.pool, 1, 0, head) for head in range(2)]
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_where_there_is_no_room_nothing_changes():
    cache, _ = read(empty(None, num_blocks=1 + 4 * 4 + 3), *row(tiny.prompt(60, 4), 0), None, None)
    before = jax.tree.map(jnp.copy, cache)
    cache, granted = split(cache, 0, jnp.array([1]))  # four part-filled blocks, and three are free
    assert not granted
    jax.tree.map(np.testing.assert_array_equal, cache, before)


def test_a_row_that_can_t_have_its_own_is_neither_evicted_nor_decoded_by_who_would_change_it():
    policy = POLICIES["compressed again"]
    cache, first = read(empty(None, num_blocks=1 + 4 * 4 + 8), *row(tiny.prompt(64, 4), 0), policy, None)
    cache, granted = split(cache, 0, jnp.array([1]))
    assert granted
    active = jnp.array([True, True, False, False])
    assert room_to_step(cache, active)
    assert not room_to_step(cache, active, policy)
    cache, _, counts = write(cache, first[jnp.zeros(BATCH, jnp.int32)], active * 3, 3, policy)
    assert counts.tolist() == [0] * BATCH
    cache = compress(cache, policy)
    assert (np.asarray(cache.lengths)[:, :2] == 64).all()
    assert own(cache, active)[1].tolist() == [False] * BATCH
    assert_nothing_is_lost(cache)


ORDERS = st.lists(
    st.tuples(st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH), st.integers(1, 9)), max_size=5
)


@settings(max_examples=15)
@given(orders=ORDERS, length=st.integers(1, 60))
def test_reordered_rows_hold_what_those_did(orders, length):
    """Against texts kept on the side: each row's keys are those of its own text, read afresh."""
    texts = [tiny.prompt(length + i, i).tolist() for i in range(BATCH)]
    cache = empty(None)
    lengths = [len(text) for text in texts]
    tokens = jnp.zeros((BATCH, 64), jnp.int32)
    for i, text in enumerate(texts):
        tokens = tokens.at[i, : len(text)].set(jnp.asarray(text))
    cache, last = read(cache, tokens, jnp.array(lengths), None, None)
    for order, steps in orders:
        cache, made, counts = write(cache, last, jnp.full(BATCH, steps), steps, None)
        assert counts.tolist() == [steps] * BATCH
        texts = [[*text, int(token), *new[:-1]] for text, token, new in zip(texts, last, made.tolist(), strict=True)]
        last, texts = made[jnp.array(order), -1], [texts[i] for i in order]
        cache, granted = ordered(cache, jnp.array(order))
        assert granted
        assert_nothing_is_lost(cache)
    fresh = jnp.zeros((BATCH, 128), jnp.int32)
    for i, text in enumerate(texts):
        fresh = fresh.at[i, : len(text)].set(jnp.asarray(text))
    wanted, _ = read(empty(None), fresh, jnp.array([len(text) for text in texts]), None, None)
    for at in np.ndindex(2, BATCH, 2):
        got, expected = (tiny.by_position(c, c.raw.pool, *at) for c in (cache, wanted))
        assert got.keys() == expected.keys()
        for position, values in expected.items():
            np.testing.assert_allclose(got[position], values, atol=2e-4)
