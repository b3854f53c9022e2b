"""No compiled step copies the pool: it is aliased, and temporaries stay below a tenth of it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
import tiny

from jaxkv.cache import CacheConfig, fork, init_cache, own, release
from jaxkv.cache.config import TierConfig
from jaxkv.generation.compress import compress
from jaxkv.generation.decode import decode, decode_step, generate
from jaxkv.generation.prefill import finish_prompt, prefill, prefill_chunk
from jaxkv.generation.prompt import start_prompt
from jaxkv.generation.scoring import score_prompt
from jaxkv.policies import ExpectedAttention, KVCompress, LeanKV, Mixed, Ratio

BATCH = 2
POLICIES = {
    "full": None,
    "all queries": KVCompress.full(budget=Ratio(ratio=8)),
    "expected": ExpectedAttention(budget=Ratio(ratio=8)),
    "continual": KVCompress(budget=Ratio(ratio=8), compress_every=16),
    "lean-kv": LeanKV(block_tokens=16),
    "mixed": Mixed.over(KVCompress, budget=Ratio(ratio=8), block_tokens=16, unquantised_window=True),
}
TIERED = ("chunk", "finish", "score", "decode_step", "compress")
ONLY = {"expected": ("chunk", "finish"), "lean-kv": TIERED, "mixed": TIERED}
"""Steps in which a policy differs from the others."""


def empty_cache(policy, dtype):
    """Its pools are far larger than what a step works on."""
    sizes = CacheConfig.for_model(tiny.CONFIG, batch=BATCH, max_context=256, num_blocks=40_000, dtype=dtype)
    if policy is not None and (layout := policy.placement.layout(tiny.CONFIG.head_dim)):
        sizes = replace(sizes, tiers=TierConfig(layout=layout, num_blocks=80_000))
    return init_cache(sizes)


def programs(policy, dtype):
    """Step name -> (function of (state, …), arguments)."""
    model = tiny.MODEL
    cache = empty_cache(policy, dtype)
    ids, row = jnp.zeros((BATCH, 64), jnp.int32), jnp.zeros(BATCH, jnp.int32)
    one = jnp.array([1])

    def chunk_of_one_row(cache, state, row, tokens, counts):
        part, state = prefill_chunk(model, cache.rows(row), state, tokens, counts, policy)
        return cache.with_rows(part, row), state

    state = start_prompt(model, cache.rows(one), one, policy)
    steps = {
        "prefill": (lambda c, t, n: prefill(model, c, t, n, policy), (cache, ids, row)),
        "chunk": (chunk_of_one_row, (cache, state, one, ids[:1], one)),
        "finish": (lambda c, s: finish_prompt(model, c.rows(one), s, policy), (cache, state)),
        "score": (lambda c, s: score_prompt(model, c.rows(one), s, policy), (cache, state)),
        "decode_step": (lambda c, t: decode_step(model, c, t, t > 0, policy), (cache, row)),
        "decode": (lambda c, t: decode(model, c, t, t, steps=8, policy=policy), (cache, row)),
        "generate": (lambda c, t, n: generate(model, c, t, n, max_tokens=8, policy=policy), (cache, ids, row)),
        "own": (lambda c: own(c, jnp.arange(c.num_tokens.shape[0]) == 1), (cache,)),
        "fork": (lambda c: fork(c, 0, jnp.array([1])), (cache,)),
        "release": (lambda c, t: release(c, t > 0), (cache, row)),
    }
    if policy is not None:
        steps["compress"] = (lambda c, t: compress(c, policy, tokens=t), (cache, row))
    return steps


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize("name", POLICIES)
def test_every_step_updates_the_pool_in_place(name):
    check(POLICIES[name], ONLY.get(name))


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_a_pool_of_bfloat16_is_updated_in_place():
    check(
        POLICIES["continual"],
        ("chunk", "finish", "decode_step", "decode", "own", "fork", "compress"),
        dtype=jnp.bfloat16,
    )


def check(policy, names=None, dtype=jnp.float32):
    steps = programs(policy, dtype)
    for step in names or steps:
        function, arguments = steps[step]
        cache = arguments[0]
        pools = [cache.raw.pool.nbytes] + ([] if cache.layout is None else [cache.tiers.pool.nbytes])
        memory = jax.jit(function, donate_argnums=0).lower(*arguments).compile().memory_analysis()
        assert memory.alias_size_in_bytes >= sum(pools), step
        assert memory.temp_size_in_bytes < min(pools) / 10, (step, memory.temp_size_in_bytes / min(pools))


def test_compression_takes_one_sequence_at_a_time():
    """What is sorted together is one sequence's, so temporaries are bounded by that, whatever the batch."""
    policy = KVCompress(budget=Ratio(ratio=8))

    def temporaries(batch):
        cache = tiny.empty_cache(batch=batch, num_blocks=4000, max_context=512)
        program = jax.jit(lambda c: compress(c, policy), donate_argnums=0).lower(cache).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(16) < 1.2 * temporaries(2)
