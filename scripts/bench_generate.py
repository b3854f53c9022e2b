"""Prefill, decode and compression on this machine, beside transformers in the same run.

Ours and theirs are taken in turn, so that a machine whose speed drifts affects both alike; medians of several repeats,
without compilation and after a warm-up. Float32, SmolLM2-135M, real text.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import CacheConfig, Greedy, KVCompress, Ratio, init_cache
from jaxkv.cli import keep_compiled_programs
from jaxkv.steps import CompiledSteps
from models import load_model, load_tokenizer, resolve

TEXT = Path(__file__).parent / "data" / "emma-chapters-1-10.txt"
CHUNK = 512
STEPS = 16


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison; seconds."""

    what: str
    ours: float
    other: float
    other_is: str
    ratio: float
    target: str


class Ours:
    """A cache of ``batch`` rows, each with its own part of the text, through the compiled steps."""

    def __init__(self, steps: CompiledSteps, tokens: np.ndarray, config: CacheConfig):
        self.steps, self.tokens, self.config = steps, tokens, config
        self.cache = init_cache(config)

    def prefill(self, row: int) -> None:
        ids = self.tokens[row]
        state = self.steps.start(self.cache, row, len(ids))
        for at in range(0, len(ids), CHUNK):
            part = np.zeros(min(CHUNK, len(ids)), np.int32)
            part[: len(ids[at : at + CHUNK])] = ids[at : at + CHUNK]
            state = self.steps.chunk(state, row, jnp.asarray(part[None]), len(ids[at : at + CHUNK]))
        self.cache, token, _ = self.steps.finish(state, row, Greedy())
        token.block_until_ready()

    def compress(self, row: int) -> None:
        self.cache = jax.block_until_ready(self.steps.compress(self.cache, row))

    def decode(self) -> None:
        batch = self.config.batch
        made = self.steps.decode(self.cache, jnp.zeros(batch, jnp.int32), jnp.full(batch, STEPS), Greedy(), STEPS)
        self.cache = jax.block_until_ready(made.cache)

    def clear(self) -> None:
        self.cache = self.steps.release(self.cache, jnp.ones(self.config.batch, bool))


class Theirs:
    """transformers with SDPA and a dynamic cache."""

    def __init__(self, gguf: Path):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(os.cpu_count() or 1)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()

    def prefill(self, ids: np.ndarray):
        with self.torch.inference_mode():
            tokens = self.torch.from_numpy(ids.astype(np.int64))[None]
            return self.model(tokens, use_cache=True, logits_to_keep=1).past_key_values

    def cache_of(self, ids: np.ndarray, batch: int):
        """The cache of one row, ``batch`` times."""
        cache = self.prefill(ids)
        cache.batch_repeat_interleave(batch)
        return cache

    def decode(self, cache, batch: int) -> None:
        with self.torch.inference_mode():
            token = self.torch.zeros((batch, 1), dtype=self.torch.long)
            for _ in range(STEPS):
                logits = self.model(token, past_key_values=cache, use_cache=True).logits
                token = logits[:, -1:].argmax(-1)


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def in_turn(repeats: int, *runs: Callable[[], object]) -> list[float]:
    """Medians of several runs, taken in turn after one of each that isn't counted."""
    for run in runs:
        run()
    taken = [[seconds(run) for run in runs] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--ratio", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    keep_compiled_programs()
    gguf = resolve("smollm2-135m")
    theirs = None
    if not options.without_transformers:
        try:
            theirs = Theirs(gguf)
        except ModuleNotFoundError as error:
            sys.exit(f"{error}; pip install 'jaxkv[reference]', or --without-transformers")
    model = load_model(gguf)
    ids = np.array(load_tokenizer(gguf).encode(TEXT.read_text(encoding="utf-8")), np.int32)
    rows: list[Row] = []
    for batch in map(int, options.batches.split(",")):
        rows += measure(model, theirs, ids, batch, options)
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))


def measure(model, theirs: Theirs | None, ids: np.ndarray, batch: int, options: argparse.Namespace) -> list[Row]:
    context, repeats = options.context, options.repeats
    short = context // options.ratio
    policy = KVCompress(budget=Ratio(ratio=options.ratio))
    steps = CompiledSteps(model, policy, ())
    grown = (repeats + 2) * STEPS
    starts = (np.arange(batch) * 997) % (len(ids) - context)
    texts = np.stack([ids[s : s + context] for s in starts])

    def ours(tokens: np.ndarray) -> Ours:
        length = -(-(tokens.shape[1] + 2 * grown) // 256) * 256
        return Ours(steps, tokens, CacheConfig.for_model(model.config, batch=batch, max_context=length))

    rows: list[Row] = []
    full, eighth = ours(texts), ours(texts[:, :short])
    if batch == 1:

        def prefill() -> None:
            full.clear()
            full.prefill(0)

        runs = [prefill] if theirs is None else [prefill, lambda: theirs.prefill(texts[0])]
        mine, *other = in_turn(repeats, *runs)
        if other:
            rows.append(compare(f"prefill of {context} tokens", mine, other[0], "transformers", "≥ 1.0x"))
        compressing = []
        for _ in range(repeats + 1):
            full.clear()
            full.prefill(0)
            compressing.append(seconds(lambda: full.compress(0)))
        share = statistics.median(compressing[1:])
        rows.append(
            Row(
                what=f"compression of {context} tokens",
                ours=share,
                other=mine,
                other_is="our prefill",
                ratio=share / mine,
                target="≤ 0.05",
            )
        )
    full.clear()
    for row in range(batch):
        full.prefill(row)
        eighth.prefill(row)
    if theirs is not None:
        cache = theirs.cache_of(texts[0], batch)
        mine, other = in_turn(repeats, full.decode, lambda: theirs.decode(cache, batch))
        target = "≥ 1.2x" if batch == 1 else "≥ 1.5x"
        name = f"decode step, batch {batch}, {context} tokens"
        rows.append(compare(name, mine / STEPS, other / STEPS, "transformers", target))
        del cache
    full.clear()
    for row in range(batch):
        full.prefill(row)
        full.compress(row)
    compressed, as_long = in_turn(repeats, full.decode, eighth.decode)
    rows.append(
        Row(
            what=f"decode step, batch {batch}, {context} tokens at {options.ratio}x",
            ours=compressed / STEPS,
            other=as_long / STEPS,
            other_is=f"full cache of {short} tokens",
            ratio=compressed / as_long,
            target="≤ 1.15",
        )
    )
    return rows


def compare(what: str, ours: float, other: float, other_is: str, target: str) -> Row:
    return Row(what=what, ours=ours, other=other, other_is=other_is, ratio=other / ours, target=target)


def print_table(rows: list[Row]) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{date.today()}, {jax.devices()[0].platform}, {cores} cores, Python {sys.version.split()[0]}, ", end="")
    print(f"jax {jax.__version__}, float32, SmolLM2-135M\n")
    print("| what | ours | beside | its time | ratio | target |\n| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        mark = f"{row.ratio:.2f}x" if "x" in row.target else f"{row.ratio:.3f}"
        print(
            f"| {row.what} | {1000 * row.ours:.1f} ms | {row.other_is} | {1000 * row.other:.1f} ms | {mark} "
            f"| {row.target} |"
        )


if __name__ == "__main__":
    main()
