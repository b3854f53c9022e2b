"""Prefill, decode and compression on this machine, beside transformers in the same run.

Ours and theirs are taken in turn, so that a machine whose speed drifts affects both alike; medians of several repeats,
without compilation and after a warm-up. Float32, SmolLM2-135M, real text. It measures and doesn't judge: exit status 0.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import CacheConfig, Greedy, KVCompress, Policy, Ratio, init_cache
from jaxkv.engine.programs import Programs
from jaxkv.generation.prefill import CHUNK
from jaxkv.serving import keep_compiled_programs
from models import Decoder, load_model, load_tokenizer, resolve

TEXT = Path(__file__).parent / "data" / "emma-chapters-1-10.txt"
STEPS = 16  # decode steps in one run
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """Seconds; ``other`` and ``ratio`` are None where transformers is left out."""

    what: str
    ours: float
    beside: str
    other: float | None
    ratio: float | None
    target: str


class Ours:
    """A cache of ``batch`` rows, each with its own part of the text; prompts one after the other, as in ``LLM``."""

    def __init__(self, programs: Programs, policy: Policy, model: Decoder, tokens: np.ndarray, room: int):
        batch, length = tokens.shape
        self.programs, self.policy, self.tokens, self.batch = programs, policy, tokens, batch
        size = -(-(length + room) // 256) * 256
        self.cache = init_cache(CacheConfig.for_model(model.sizes, batch=batch, max_context=size))

    def prefill(self, row: int) -> None:
        ids, chunk = self.tokens[row], min(CHUNK, self.tokens.shape[1])
        prompt = self.programs.start(self.cache, row, len(ids), self.policy)
        for at in range(0, len(ids), chunk):
            part = np.zeros((1, chunk), np.int32)
            count = min(chunk, len(ids) - at)
            part[0, :count] = ids[at : at + count]
            self.cache, prompt = self.programs.chunk(self.cache, prompt, row, part, count, self.policy)
        self.cache, first = self.programs.finish(self.cache, prompt, row, Greedy(), self.policy)
        first.tokens.block_until_ready()

    def prefill_all(self) -> None:
        self.cache = self.programs.release(self.cache, jnp.ones(self.batch, bool))
        for row in range(self.batch):
            self.prefill(row)

    def compress(self, row: int) -> None:
        self.cache = jax.block_until_ready(self.programs.compress_rows(self.cache, row, 0, self.policy))

    def decode(self) -> None:
        last, limits = jnp.zeros(self.batch, jnp.int32), jnp.full(self.batch, STEPS)
        self.cache = jax.block_until_ready(
            self.programs.decode(self.cache, last, limits, Greedy(), STEPS, self.policy).cache
        )


class Theirs:
    """transformers with SDPA and a dynamic cache."""

    def __init__(self, gguf: Path):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(CORES)
        self.torch = torch
        settings = {"gguf_file": gguf.name, "dtype": torch.float32, "attn_implementation": "sdpa"}
        self.model = AutoModelForCausalLM.from_pretrained(gguf.parent, **settings).eval()

    def prefill(self, ids: np.ndarray):
        with self.torch.inference_mode():
            return self.model(self.torch.tensor(ids).long(), use_cache=True, logits_to_keep=1).past_key_values

    def decoder(self, ids: np.ndarray, batch: int) -> Callable[[], None]:
        """Decodes ``batch`` rows from a cache that is one row's prompt, repeated."""
        cache = self.prefill(ids[None])
        cache.batch_repeat_interleave(batch)

        def decode() -> None:
            with self.torch.inference_mode():
                token = self.torch.zeros((batch, 1), dtype=self.torch.long)
                for _ in range(STEPS):
                    token = self.model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

        return decode


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def in_turn(repeats: int, *runs: Callable[[], object]) -> list[float]:
    return list(map(statistics.median, zip(*([seconds(run) for run in runs] for _ in range(repeats)), strict=True)))


def measure(
    model: Decoder, theirs: Theirs | None, ids: np.ndarray, batch: int, options: argparse.Namespace
) -> list[Row]:
    context, repeats, short = options.context, options.repeats, options.context // options.ratio
    programs, policy = Programs(model), KVCompress(budget=Ratio(ratio=options.ratio))
    texts = np.stack([ids[start : start + context] for start in np.arange(batch) * 997 % (len(ids) - context)])
    room = (repeats + 1) * STEPS
    full, eighth = Ours(programs, policy, model, texts, room), Ours(programs, policy, model, texts[:, :short], room)
    name = f"batch {batch}, {context} tokens"
    prefills: list[Callable[[], object]] = [full.prefill_all]
    full.prefill(0)  # warm-up
    if theirs is not None:
        theirs.prefill(texts[:1])
        prefills.append(lambda: theirs.prefill(texts))
    prefill, *other = in_turn(repeats if batch == 1 else min(repeats, 2), *prefills)
    rows = [row(f"prefill, {name}", prefill, "transformers", other, "≥ 1.0x")]
    squeezed, compressing = Ours(programs, policy, model, texts, room), []
    while len(compressing) <= repeats:  # the first compiles and isn't counted
        squeezed.prefill_all()
        compressing += [seconds(lambda at=at: squeezed.compress(at)) for at in range(batch)]
    compress = statistics.median(compressing[1:])
    rows.append(row(f"compression of one prompt, {name}", compress, "our prefill of it", [prefill / batch], "≤ 0.05"))
    eighth.prefill_all()
    runs = [full.decode, squeezed.decode, eighth.decode, *([theirs.decoder(texts[0], batch)] if theirs else [])]
    in_turn(1, *runs)  # warm-up
    uncompressed, compressed, as_long, *other = (taken / STEPS for taken in in_turn(repeats, *runs))
    at = f"decode step, {name}"
    rows += [
        row(at, uncompressed, "transformers", other, "≥ 1.2x" if batch == 1 else "≥ 1.5x"),
        row(f"{at} at {options.ratio}x", compressed, f"full cache of {short} tokens", [as_long], "≤ 1.15"),
        row(f"{at} at {options.ratio}x", compressed, f"full cache of {context} tokens", [uncompressed], "none"),
    ]
    return rows


def row(what: str, ours: float, beside: str, other: Sequence[float], target: str) -> Row:
    """A comparison whose ratio is a speed-up where the target is one (``x``), else ours as a share of the other."""
    if not other:
        return Row(what=what, ours=ours, beside=beside, other=None, ratio=None, target=target)
    ratio = other[0] / ours if "x" in target else ours / other[0]
    return Row(what=what, ours=ours, beside=beside, other=other[0], ratio=ratio, target=target)


def print_table(rows: list[Row], versions: str) -> None:
    print(f"{versions}\n\n| what | ours | beside | its time | ratio | target |\n| --- | --- | --- | --- | --- | --- |")
    for r in rows:
        other, ratio = "not run", "not run"
        if r.other is not None and r.ratio is not None:
            other, ratio = f"{1000 * r.other:.1f} ms", f"{r.ratio:.2f}x" if "x" in r.target else f"{r.ratio:.3f}"
        print(f"| {r.what} | {1000 * r.ours:.1f} ms | {r.beside} | {other} | {ratio} | {r.target} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=2048, help="tokens of each prompt (default: 2048)")
    parser.add_argument("--batches", default="1,16", help="default: 1,16; above 1, at most 2 repeats of prefill")
    parser.add_argument("--ratio", type=int, default=8, help="compression (default: 8)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()

    keep_compiled_programs()
    gguf, theirs, packages = resolve("smollm2-135m"), None, ["jax"]
    if not options.without_transformers:
        try:
            theirs, packages = Theirs(gguf), [*packages, "torch", "transformers"]
        except ImportError as error:
            print(f"without transformers: {error}; pip install 'jaxkv[reference]' to compare", file=sys.stderr)
    model = load_model(gguf)
    ids = np.array(load_tokenizer(gguf).encode(TEXT.read_text(encoding="utf-8")), np.int32)
    if not options.ratio <= options.context < len(ids):
        parser.error(f"--context must lie between the ratio and the text's {len(ids)} tokens")

    rows = [r for batch in options.batches.split(",") for r in measure(model, theirs, ids, int(batch), options)]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    versions = f"{date.today()}, {jax.default_backend()}, {CORES} cores, Python {sys.version.split()[0]}, {versions}"
    print_table(rows, f"{versions}, float32, SmolLM2-135M")
    if options.json:
        options.json.write_text(json.dumps({"versions": versions, "rows": [asdict(r) for r in rows]}, indent=2))


if __name__ == "__main__":
    main()
