"""A tiny random Llama and its dense, uncompressed run, for tests of everything above the kernels."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from oracles.attention import dense_attention

from jaxkv.cache import CacheConfig, PagedCache, init_cache
from jaxkv.requests import Finished
from models import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    max_context=512,
    tie_embeddings=True,
    eos_token_ids=(100,),
)


def random_model(config: LlamaConfig = CONFIG, dtype=jnp.float32, seed: int = 7) -> Llama:
    """Weights large enough that attention is far from uniform, in some heads more than in others."""
    llama = Llama(config, rngs=nnx.Rngs(0), dtype=dtype)
    graph, weights = nnx.split(llama)
    rng = np.random.default_rng(seed)

    def weight(leaf):
        if leaf.ndim == 1:
            return jnp.asarray(1 + 0.1 * rng.standard_normal(leaf.shape), leaf.dtype)
        sharpness = rng.uniform(1.0, 3.0, leaf.shape[-1] // 16).repeat(16) if leaf.shape[-1] % 16 == 0 else 1.0
        return jnp.asarray(rng.standard_normal(leaf.shape) * sharpness / np.sqrt(leaf.shape[0]), leaf.dtype)

    return nnx.merge(graph, nnx.map_state(lambda path, leaf: leaf.replace(weight(leaf[...])), weights))


MODEL = random_model()


def empty_cache(*, batch=1, max_context=256, **sizes) -> PagedCache:
    """Sizes as ``CacheConfig.for_model`` takes them."""
    return init_cache(CacheConfig.for_model(CONFIG, batch=batch, max_context=max_context, **sizes))


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100, length).astype(np.int32)


def answers(llm, prompts, params) -> dict[int, list[int]]:
    """Token ids by prompt, from programs that serve any number of prompts of up to 256 tokens with their answers."""
    ended = (e for e in llm.run([(p, params) for p in prompts], max_context=256) if isinstance(e, Finished))
    return {e.request: e.completion.token_ids for e in ended}


def padded(prompts: list[np.ndarray]) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Prompts as tokens ``i32[batch, longest]`` and lengths ``i32[batch]``."""
    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
    return jnp.asarray(tokens), jnp.array([len(p) for p in prompts], jnp.int32)


def dense_run(tokens: np.ndarray, visible=None) -> tuple[np.ndarray, np.ndarray]:
    """Logits ``[tokens, vocab]`` and probabilities ``[layers, heads, tokens, tokens]`` of the plain model.

    ``visible``: ``bool[layers, kv_heads, tokens, tokens]`` keys that each query may see; None: all before it.
    """
    length = len(tokens)
    seen = []

    def attend(state, layer, query, key, value):
        q, k, v = (np.asarray(x[0], np.float64) for x in (query, key, value))
        if visible is None:
            out, probabilities = dense_attention(q, k, v, np.arange(length), np.arange(length))
        else:
            out, probabilities = masked_attention(q, k, v, visible[layer])
        seen.append(probabilities)
        return state, jnp.asarray(out, jnp.float32)[None]

    _, hidden = MODEL(jnp.asarray(tokens)[None], jnp.arange(length)[None], attend, None)
    return np.asarray(MODEL.logits(hidden))[0], np.stack(seen)


def masked_attention(q, k, v, visible):
    """Attention of ``[tokens, heads, d]`` queries to the keys that ``bool[kv_heads, tokens, tokens]`` lets them see."""
    group = q.shape[1] // k.shape[1]
    k, v, visible = (np.repeat(x, group, axis=a) for x, a in ((k, 1), (v, 1), (visible, 0)))
    scores = np.where(visible, np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v), weights


def dense_greedy(tokens: np.ndarray, count: int) -> list[int]:
    """Tokens that the plain model continues with."""
    start = len(tokens)
    tokens = np.concatenate([tokens, np.zeros(count, tokens.dtype)])  # one length, one compilation
    for at in range(start, start + count):
        tokens[at] = dense_run(tokens)[0][at - 1].argmax()
    return tokens[start:].tolist()


def by_position(cache: PagedCache, values, layer: int, row: int, head: int) -> dict[int, np.ndarray]:
    """What each KV of a head has in ``values`` (scores, or the pool's rows), keyed by its position in the text."""
    raw = cache.raw
    size = raw.block_size
    table = np.asarray(raw.tables.block_table[layer, row, head])
    count = int(raw.lengths[layer, row, head])
    slots = [table[i // size] * size + i % size for i in range(count)]
    flat = np.asarray(values).reshape(-1, *([values.shape[-1]] if values.ndim == 3 else []))
    positions = np.asarray(raw.positions).reshape(-1)
    return {int(positions[s]): flat[s] for s in slots}


def token_slots(cache: PagedCache) -> jnp.ndarray:
    """Slot of each KV, ``i32[layers, batch, kv_heads, capacity]`` in table order; 0 past a head's end."""
    raw, index = cache.raw, jnp.arange(cache.capacity)
    slots = raw.tables.block_table[..., index // raw.block_size] * raw.block_size + index % raw.block_size
    return jnp.where(index < raw.lengths[..., None], slots, 0)


def with_tables(cache: PagedCache, **arrays) -> PagedCache:
    """With other arrays in the unquantised store's tables; ``lengths`` without their axis of tiers."""
    if "lengths" in arrays:
        arrays["lengths"] = jnp.asarray(arrays["lengths"], jnp.int32)[..., None]
    return replace(cache, raw=replace(cache.raw, tables=replace(cache.raw.tables, **arrays)))


def assert_no_block_is_lost_or_shared(cache, prefixes=()):
    """But for what rows borrow of prefixes (``jaxkv.engine.prefixes.SharedPrefix``), which must be these."""
    tables = cache.raw.tables
    table, lengths = jax.device_get((tables.block_table, cache.raw.lengths))
    size = cache.raw.block_size
    held = [table[row][: -(-lengths[row] // size)] for row in np.ndindex(lengths.shape)]
    lent = [kept.prefix.table[..., : kept.blocks].reshape(-1) for kept in prefixes]
    holders = assert_the_free_list_is_right(tables.free, [*held, *lent])
    expected = np.ones_like(holders)
    for kept in prefixes:
        for row, count in kept.borrowed.items():
            assert (table[:, row, :, :count] == kept.prefix.table[..., :count]).all()
            np.add.at(expected, kept.prefix.table[..., :count].reshape(-1), 1)
    assert (holders <= expected).all()


def assert_the_free_list_is_right(free, held):
    """Every block but the null block is free or has the holders that it is said to have; gives how many each has."""
    others, count, stack = jax.device_get((free.others, free.count, free.blocks))
    holders = np.zeros_like(others)
    for blocks in held:
        np.add.at(holders, blocks, 1)
    assert (others == np.maximum(holders - 1, 0)).all()
    assert sorted(stack[:count].tolist()) == [i for i in range(1, len(others)) if holders[i] == 0]
    assert holders[0] == 0
    return holders


def blocks_held(cache: PagedCache) -> np.ndarray:
    """``i32[layers, batch, kv_heads]`` unquantised."""
    return np.asarray(cache.raw.tables.blocks_held())[..., 0]
