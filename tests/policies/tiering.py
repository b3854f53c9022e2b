"""Prompts with random attention, the policies that tests of tiers give them, and what they assign."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import KVCompress, Ratio
from jaxkv.cache import CacheConfig, init_cache
from jaxkv.cache.config import TierConfig
from jaxkv.cache.contents import Contents
from jaxkv.cache.home import GONE, HIGH, LOW, RAW
from jaxkv.policies import LeanKV, Mixed
from pallas_kernels.quantised_block import Format

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
