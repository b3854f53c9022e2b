"""What the shipped gate costs beside the model: FLOPs and bytes of compiled programs, as XLA counts them on a CPU.

    python scripts/count_gate.py [--model smollm2-135m] [--tokens 1536] [--every 128]

A prompt is read in chunks of 512 and its KVs are scored once; a decode step's share is a score of all that the cache
has room for, every ``--every`` tokens. XLA counts the body of a loop once, so that the attention to what is cached
comes out too small: the gate's share is less than what is printed. Nothing here is measured.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxkv import CacheConfig, PagedCache, init_cache
from jaxkv.cache.contents import contents
from jaxkv.generation.decode import decode_step
from jaxkv.generation.prefill import CHUNK, prefill_chunk
from jaxkv.generation.prompt import start_prompt
from jaxkv.generation.scoring import kvs_of
from jaxkv.policies.gate import LearnedGate, gate_for
from models import Llama
from models.interface import ModelSizes
from models.shapes import SHAPES


class Count(NamedTuple):
    """Of a program."""

    flops: float
    size: float
    """Bytes that its operations read and write."""

    def __mul__(self, times: float) -> "Count":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Count(self.flops * times, self.size * times)


def count(function: Callable[..., Any], *args: Any) -> Count:
    """Of a function, for arguments given by shape and dtype."""
    found = jax.jit(function).lower(*args).compile().cost_analysis()
    assert found is not None  # only where a backend doesn't count
    return Count(found["flops"], found["bytes accessed"])


def of_score(cache: PagedCache, sizes: ModelSizes) -> Count:
    """Of scoring all that a cache has room for: reading it out of the pool, and the gate; its layers are alike."""
    weights = gate_for(sizes)
    if weights is None:
        raise SystemExit("no gate is shipped for this model; smollm2-135m has one")
    scorer = LearnedGate(weights=weights)

    def of_layer(cache: PagedCache) -> tuple[jax.Array, ...]:
        now = contents(cache)
        return now.scores[0], *kvs_of(cache, now, jnp.int32(0)), now.held[0]

    parts = jax.eval_shape(of_layer, cache)
    gate = count(partial(scorer.score_kvs, layer=jnp.int32(0)), *parts)
    # XLA takes the whole pool for read where some of its blocks are: in truth the KVs, which are written again.
    moved = 2 * sum(part.size * part.dtype.itemsize for part in parts)
    return Count(gate.flops, gate.size + moved) * sizes.num_layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=1536, help="that the cache has room for")
    parser.add_argument("--every", type=int, default=128, help="tokens between two compressions")
    options = parser.parse_args()
    sizes = SHAPES[options.model]
    model = nnx.eval_shape(lambda: Llama(sizes, rngs=nnx.Rngs(0)))
    config = CacheConfig.for_model(sizes, batch=1, max_context=options.tokens)
    cache = jax.eval_shape(lambda: init_cache(config))
    prompt = jax.eval_shape(lambda c: start_prompt(model, c, jnp.array([CHUNK]), None), cache)
    ids, one = jax.ShapeDtypeStruct((1, CHUNK), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    active = jax.ShapeDtypeStruct((1,), jnp.bool_)
    graph, weights = nnx.split(model)
    chunk = count(
        lambda w, *args: prefill_chunk(nnx.merge(graph, w), *args, policy=None), weights, cache, prompt, ids, one
    )
    step = count(lambda w, *args: decode_step(nnx.merge(graph, w), *args), weights, cache, one, active)
    score, read = of_score(cache, sizes), chunk * (options.tokens / CHUNK)
    print("| | GFLOP | the gate's | GB | the gate's |\n| --- | --- | --- | --- | --- |")
    for name, whole, part in (
        (f"a prompt of {options.tokens} tokens", read, score),
        (f"a decode step, compressed every {options.every}", step, score * (1 / options.every)),
    ):
        print(
            f"| {name} | {whole.flops / 1e9:.3f} | {part.flops / 1e9:.4f}: {part.flops / whole.flops:.2%} | "
            f"{whole.size / 1e9:.3f} | {part.size / 1e9:.4f}: {part.size / whole.size:.2%} |"
        )


if __name__ == "__main__":
    main()
