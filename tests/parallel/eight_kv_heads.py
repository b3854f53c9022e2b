"""A tiny model of eight KV heads, for tests over several devices, and what one device and several make with it."""

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tiny import prompt, random_model

from jaxkv import CacheConfig, Decoded, Policy, generate, init_cache
from jaxkv.cache.shards import ShardedHeads, partition_specs
from models import Llama, LlamaConfig
from models.sharding import place, shard, weight_specs

CONFIG = LlamaConfig(
    vocab_size=104,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=16,
    num_kv_heads=8,
    head_dim=16,
    max_context=512,
    attention_bias=True,
    output_bias=True,
    tie_embeddings=False,
    eos_token_ids=(103,),
)
MODEL = random_model(CONFIG)
TOKENS = np.stack([prompt(200, seed=1), prompt(200, seed=2)])
LENGTHS = np.array([200, 150], np.int32)


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("heads",))


def sizes(policy: Policy | None, **given) -> CacheConfig:
    layout = policy and policy.placement.layout(CONFIG.head_dim)
    return CacheConfig.for_model(CONFIG, batch=2, max_context=256, layout=layout, **given)


def answer_on(devices: int, policy: Policy | None, model: Llama = MODEL, *, max_tokens: int = 24) -> Decoded:
    """Two prompts answered by a program of the functional layer inside a ``shard_map``."""
    mesh, local = mesh_of(devices), shard(model, count=devices)
    graph, weights = nnx.split(local)
    specs = weight_specs(local)
    cache = init_cache(sizes(policy, shards=ShardedHeads(devices=devices)), mesh)
    held = partition_specs(cache)

    def answer(weights, cache, tokens, lengths):
        return generate(nnx.merge(graph, weights), cache, tokens, lengths, max_tokens=max_tokens, policy=policy)

    made = Decoded(cache=held, **dict.fromkeys(set(Decoded._fields) - {"cache"}, P()))
    inside = jax.shard_map(answer, mesh=mesh, in_specs=(specs, held, P(), P()), out_specs=made, check_vma=False)
    return jax.jit(inside, donate_argnums=1)(place(weights, specs, mesh), cache, TOKENS, LENGTHS)


def answer_on_one(policy: Policy | None, model: Llama = MODEL, *, max_tokens: int = 24) -> Decoded:
    """The same on one device, with neither a ``shard_map`` nor anything split."""
    graph, weights = nnx.split(model)

    @jax.jit
    def answer(weights, cache, tokens, lengths):
        return generate(nnx.merge(graph, weights), cache, tokens, lengths, max_tokens=max_tokens, policy=policy)

    return answer(weights, init_cache(sizes(policy)), TOKENS, LENGTHS)


def assert_no_block_is_lost(cache) -> None:
    """On each device, of each pool: every block but the null one is free or held by one head."""
    stores = [cache.raw.tables] if cache.layout is None else [cache.raw.tables, cache.tiers.tables]
    for tables in stores:
        devices = tables.shards.count
        table, held = np.asarray(tables.block_table), np.asarray(tables.blocks_held())
        free, counts = np.split(np.asarray(tables.free.blocks), devices), np.reshape(tables.free.count, -1)
        per_head = table.shape[2] // devices
        for device in range(devices):
            blocks = free[device][: counts[device]].tolist()
            heads = range(device * per_head, (device + 1) * per_head)
            for layer, row, head in np.ndindex(*table.shape[:2], per_head):
                line = table[layer, row, heads[head]]
                blocks += line[: held[layer, row, heads[head], 0]].tolist()
                if held.shape[-1] == 2 and held[layer, row, heads[head], 1]:
                    blocks += line[-held[layer, row, heads[head], 1] :].tolist()
            assert sorted(blocks) == list(range(1, len(free[device])))
