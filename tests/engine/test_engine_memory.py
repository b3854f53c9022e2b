"""What compression is worth to the engine: when it happens, what stays bounded, how many sequences then fit."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from tiny import CONFIG, MODEL, blocks_held, dense_run, empty_cache, padded, prompt

from jaxkv import LLM, CacheConfig, KVCompress, MaxTokens, Ratio, SamplingParams, compress, decode_step, prefill
from jaxkv.requests import Finished, TextMade

pytestmark = pytest.mark.once

HEADS = CONFIG.num_layers * CONFIG.num_kv_heads
PROMPT, NEW = 160, 88


def serve(policy, count: int, memory: int):
    """Answers, most sequences at once, and most blocks held while none is being read."""
    llm = LLM(MODEL, compression=policy, cache_memory=memory, max_batch=8, share_prefixes=False)
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    jobs = [(prompt(PROMPT, seed=s), params) for s in range(count)]
    done, together, held, compressions = {}, 0, 0, 0
    for event in llm.run(iter(jobs), max_context=256):
        engine = llm.engine
        if compressions == 0:
            counted, original = [], engine.programs.compress_rows

            def count_and_compress(*args, counted=counted, original=original):
                counted.extend(args[1][args[-1]])
                return original(*args)

            engine.programs.compress_rows, compressions = count_and_compress, 1
        if isinstance(event, Finished):
            done[event.request] = event.completion
        elif isinstance(event, TextMade):
            running = engine.scheduler.running
            together = max(together, len(running))
            if running:
                held = max(held, max(engine.counts.held(row).raw for row in running))
    return done, together, held, len(counted)


@pytest.fixture(scope="module")
def served():
    full = CacheConfig.for_model(CONFIG, batch=8, max_context=256)
    memory = full.bytes_with(1 + int(2.3 * full.full_blocks(PROMPT + NEW)))
    return {ratio: serve(KVCompress(budget=Ratio(ratio=ratio)) if ratio > 1 else None, 6, memory) for ratio in (1, 4)}


def test_the_first_token_is_the_full_caches(served):
    done, *_ = served[4]
    for seed in (0, 3):
        assert done[seed].token_ids[0] == dense_run(prompt(PROMPT, seed=seed))[0][-1].argmax()


def test_each_prompt_is_compressed_once(served):
    assert served[4][3] == len(served[4][0]) == 6


def test_blocks_shrink_and_batches_grow_with_the_ratio(served):
    (_, together_full, held_full, _), (_, together, held, _) = served[1], served[4]
    assert held_full == HEADS * -(-(PROMPT + NEW) // 16)
    assert held <= HEADS * (PROMPT // 16 // 4 + -(-NEW // 16) + 1)
    assert together_full == 2
    assert together >= 4


def test_blocks_stay_bounded_when_every_token_compresses():
    policy = KVCompress(budget=MaxTokens(tokens=48), protected_window=16, compress_every=1)
    tokens, lengths = padded([prompt(100, seed=1)])
    cache, logits = jax.jit(lambda c: prefill(MODEL, c, tokens, lengths, policy))(empty_cache())
    step = jax.jit(partial(decode_step, MODEL, policy=policy))
    shrink = jax.jit(partial(compress, policy=policy))
    cache = shrink(cache)
    bound = HEADS * (48 // 16)
    for _ in range(40):
        cache, logits = step(cache, jnp.argmax(logits, -1).astype(jnp.int32), jnp.array([True]))
        held = int(blocks_held(cache).sum())
        assert held <= bound + HEADS
        cache = shrink(cache)
        assert int(blocks_held(cache).sum()) <= bound
