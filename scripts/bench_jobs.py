"""Whole jobs through ``LLM.run``: tokens a second, and how many sequences were decoded together.

Real text of random lengths, every answer of the same length, greedy, with memory for all rows. Compiling isn't counted.
It measures and doesn't judge: exit status 0. Long prompts in a small pool: ``bench_memory_budget.py``.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from bench_generate import CORES, TEXT, Theirs

from jaxkv import LLM, SamplingParams
from jaxkv.requests import Finished, Refused
from jaxkv.serving import keep_compiled_programs
from models import resolve


def prompts(ids: np.ndarray, options: argparse.Namespace) -> list[list[int]]:
    """Pieces of the text."""
    rng, (least, most) = np.random.default_rng(options.seed), map(int, options.tokens.split("-"))
    lengths = rng.integers(least, most + 1, options.prompts)
    starts = rng.integers(0, len(ids) - most, options.prompts)
    return [ids[start : start + length].tolist() for start, length in zip(starts, lengths, strict=True)]


def run(llm: LLM, pieces: list[list[int]], options: argparse.Namespace) -> str:
    """A row of the table."""
    params = SamplingParams(max_tokens=options.new, temperature=0, repetition_penalty=1, ignore_eos=True)
    context = int(options.tokens.split("-")[1]) + options.new

    def jobs() -> Iterator[tuple[list[int], SamplingParams]]:
        return ((piece, params) for piece in pieces)

    began, tokens = time.perf_counter(), 0
    for event in llm.run(jobs(), max_context=context):
        if isinstance(event, Finished):
            tokens += len(event.completion.token_ids)
        elif isinstance(event, Refused):
            raise SystemExit(f"refused: {event.error}")
    engine = llm.engine
    assert engine is not None
    seconds = time.perf_counter() - began - engine.programs.compile_seconds
    return (
        f"| {tokens / seconds:.1f} | {engine.decoded / engine.decode_seconds:.1f} | {seconds:.1f} s | "
        f"{engine.decoded / engine.decode_steps:.1f} | {engine.decode_steps} | {engine.preemptions} |"
    )


def theirs(gguf: Path, pieces: list[list[int]], options: argparse.Namespace) -> float:
    """Tokens a second of transformers' ``generate``, in padded batches in the prompts' order."""
    loaded = Theirs(gguf)
    model, torch = loaded.model, loaded.torch

    def answer(batch: list[list[int]]) -> int:
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(piece)) + piece for piece in batch])
        mask = torch.tensor([[0] * (longest - len(piece)) + [1] * len(piece) for piece in batch])
        length = {"min_new_tokens": options.new, "max_new_tokens": options.new, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            made = model.generate(ids, attention_mask=mask, **length)  # pyright: ignore[reportAttributeAccessIssue]
            return made[:, longest:].numel()

    answer(pieces[:2])  # warm-up
    began, tokens = time.perf_counter(), 0
    for at in range(0, len(pieces), options.max_batch):
        tokens += answer(pieces[at : at + options.max_batch])
    return tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", default="40-120", metavar="LEAST-MOST", help="of a prompt (default: 40-120)")
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer (default: 64)")
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beside-transformers", action="store_true")
    options = parser.parse_args()

    keep_compiled_programs()
    gguf = resolve("smollm2-135m")
    packages = ["jax", *(["torch", "transformers"] if options.beside_transformers else [])]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    versions = f"{date.today()}, {jax.default_backend()}, {CORES} cores, {versions}"
    print(f"{versions}, float32, SmolLM2-135M, {' '.join(sys.argv[1:])}\n")
    llm = LLM(gguf, max_batch=options.max_batch)
    assert llm.tokenizer is not None
    pieces = prompts(np.array(llm.tokenizer.encode(TEXT.read_text(encoding="utf-8"))), options)
    print("| tokens/s | decode tokens/s | all | mean batch | steps | put back |\n|" + " --- |" * 6, flush=True)
    print(run(llm, pieces, options), flush=True)
    if options.beside_transformers:
        print(f"\ntransformers, padded batches of {options.max_batch}: {theirs(gguf, pieces, options):.1f} tokens/s")


if __name__ == "__main__":
    main()
