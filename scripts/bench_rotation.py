"""Perplexity with all K and V quantised, as computed or rotated before it, also of a model with outlier channels.

    python scripts/bench_rotation.py [--model smollm2-135m] [--texts 4]

Before a KV is quantised K and V are multiplied by a Hadamard matrix over the head dimension, and the queries with K: so
logits stay, and the output is turned back. Outliers: some channels of each key are scaled by 20 and the queries' by
1/20, in the weights, which changes nothing but how keys are quantised.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxkv import LLM
from models import Llama, stack_layers
from pallas_kernels.quantised_block import Format, quantizer
from pallas_kernels.quantised_block.hadamard import matrix

TEXT = Path(__file__).parent / "data" / "emma-chapters-1-10.txt"
FORMATS = ("K8V4", "K4V8", "K4V4", "K4V2")
CHANNELS, SCALE = 2, 20.0
"""Pairs of a head's channels that are scaled: RoPE turns one into the other."""


def stored(x: Array, bits: Array) -> Array:
    """What ``bits`` leave of vectors; 0: all."""
    return jnp.where(bits > 0, quantizer.dequantize(quantizer.quantize(x, jnp.maximum(bits, 1))), x)  # pyright: ignore


@partial(jax.jit, static_argnames="graph")
def nats(graph: nnx.GraphDef, weights: nnx.State, tokens: Array, bits: Array, turn: Array) -> Array:
    """A token of ``i32[tokens]``, of those after a quarter of them; ``i32[2]`` bits of K and V."""
    model, length = nnx.merge(graph, weights), tokens.shape[0] - 1
    before = jnp.tril(jnp.ones((length, length), bool))

    def attend(state: None, layer: int | Array, query: Array, key: Array, value: Array) -> tuple[None, Array]:
        query, key, value = (x[0] @ turn for x in (query, key, value))
        key, value = stored(key, bits[0]), stored(value, bits[1])
        group = query.shape[1] // key.shape[1]
        logits = jnp.einsum("qhgd,khd->hgqk", query.reshape(length, -1, group, query.shape[-1]), key)
        p = jax.nn.softmax(jnp.where(before, logits * query.shape[-1] ** -0.5, -jnp.inf), axis=-1)
        out = jnp.einsum("hgqk,khd->qhgd", p, value).reshape(query.shape) @ turn.T
        return state, out[None]

    _, hidden = model(tokens[None, :-1], jnp.arange(length)[None], attend, None)
    logprobs = jax.nn.log_softmax(model.logits(hidden)[0])
    return -jnp.take_along_axis(logprobs, tokens[1:, None], axis=-1)[length // 4 :].mean()


def with_outliers(model: Llama, seed: int = 0) -> Llama:
    """The same function of its tokens, with keys of which some channels are large."""
    graph, weights = nnx.split(model)
    sizes, rng = model.sizes, np.random.default_rng(seed)
    half, group = sizes.head_dim // 2, sizes.num_heads // sizes.num_kv_heads
    scales = np.ones((sizes.num_kv_heads, sizes.head_dim), np.float32)
    for head in scales:
        some = rng.choice(half, CHANNELS, replace=False)
        head[some] = head[some + half] = SCALE

    def scaled(path: tuple, leaf: nnx.Variable) -> nnx.Variable:
        if "key" in path and "kernel" in path:
            return leaf.replace(leaf[...] * scales.reshape(-1))
        if "query" in path and "kernel" in path:
            return leaf.replace(leaf[...] / scales.repeat(group, axis=0).reshape(-1))
        return leaf

    return nnx.merge(graph, nnx.map_state(scaled, weights))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    llm = LLM(options.model)
    assert llm.tokenizer is not None
    assert isinstance(llm.model, Llama)
    ids = np.asarray(llm.tokenizer.encode(TEXT.read_text(encoding="utf-8")), np.int32)
    starts = np.linspace(0, len(ids) - options.tokens - 1, options.texts).astype(int)
    texts = [jnp.asarray(ids[at : at + options.tokens + 1]) for at in starts]
    size = llm.model.sizes.head_dim
    print("| model | format | as computed | rotated |\n| --- | --- | --- | --- |")
    for name, model in (("as it is", llm.model), ("outlier channels", with_outliers(llm.model))):
        graph, weights = nnx.split(stack_layers(model))
        for form in (None, *map(Format.named, FORMATS)):
            bits = jnp.array([0, 0] if form is None else [form.key_bits, form.value_bits])
            found = [
                np.exp(np.mean([nats(graph, weights, text, bits, jnp.asarray(turn)) for text in texts]))
                for turn in (np.eye(size, dtype=np.float32), matrix(size))
            ]
            print(f"| {name} | {form or 'unquantised'} | " + " | ".join(f"{x:.3f}" for x in found) + " |", flush=True)


if __name__ == "__main__":
    main()
