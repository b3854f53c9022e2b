"""Weights held as floats, as the file has them, and quantised at load: memory, loading, and perplexity of real text.

    python scripts/bench_weights.py [--model smollm2-135m] [--windows 16] [--weights float32 stored int8 fp8]

Perplexity is of the first tokens of Austen's Emma in windows of 512, each read alone, with dense attention in float32.
Each kind runs in a process of its own, whose largest resident memory is told once the model is loaded.
"""

import argparse
import resource
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import causal_attention, load_model, load_tokenizer, resolve
from models.checkpoints.assemble import parameters_of
from models.quantised import Quantised

TEXT = Path(__file__).parent / "data" / "emma-chapters-1-10.txt"
WINDOW = 512


class Measured(NamedTuple):
    weights: str
    held: int
    """Bytes of all parameters."""
    matrices: str
    seconds: float
    """To load."""
    peak: int
    """Bytes resident at most, until the model was loaded."""
    perplexity: float


def measure(name: str, weights: str, windows: int) -> Measured:
    path = resolve(name)
    ids = load_tokenizer(path).encode(TEXT.read_text(encoding="utf-8"))[: windows * WINDOW]
    began = time.perf_counter()
    model = load_model(path, weights="floats" if weights == "float32" else weights)
    graph, state = nnx.split(model)
    leaves = jax.block_until_ready(jax.tree.leaves(state))
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    values = [leaf.get_value() for leaf in parameters_of(model).values()]
    kinds = Counter(type(value).__name__ if isinstance(value, Quantised) else "float32" for value in values)

    @jax.jit
    def loss(state: nnx.State, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graph, state)
        _, hidden = model(tokens[None], jnp.arange(WINDOW)[None], causal_attention, None)
        chances = jax.nn.log_softmax(model.logits(hidden[0, :-1]))
        return -jnp.take_along_axis(chances, tokens[1:, None], 1).sum()

    losses = [float(loss(state, jnp.asarray(tokens))) for tokens in np.asarray(ids, np.int32).reshape(-1, WINDOW)]
    perplexity = float(np.exp(sum(losses) / (len(losses) * (WINDOW - 1))))
    matrices = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return Measured(weights, held, matrices, seconds, peak, perplexity)


HEAD = "| weights | MB held | of them | peak MB while loading | load s | perplexity | beside the first |"


def line(row: Measured, first: Measured) -> str:
    """Of a table under ``HEAD``."""
    cells = [row.weights, f"{row.held / 1e6:.0f}", row.matrices, f"{row.peak / 1e6:.0f}", f"{row.seconds:.1f}"]
    cells += [f"{row.perplexity:.3f}", f"{row.perplexity / first.perplexity - 1:+.2%}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=16, help=f"of {WINDOW} tokens (default: 16)")
    kinds = ["float32", "stored", "int8", "fp8"]
    parser.add_argument("--weights", nargs="+", choices=kinds, default=kinds)
    asked = parser.parse_args()
    if asked.windows < 1:
        sys.exit(f"--windows must be at least 1, got {asked.windows}")
    rows: list[Measured] = []
    print(f"{HEAD}\n|{' --- |' * 7}")
    for weights in asked.weights:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
            rows.append(alone.submit(measure, asked.model, weights, asked.windows).result())
        print(line(rows[-1], rows[0]), flush=True)


if __name__ == "__main__":
    main()
