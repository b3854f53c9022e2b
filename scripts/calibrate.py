"""Finds LeanKV's thresholds for a model, as its paper does: first the high one by itself, then the low one.

    python scripts/calibrate.py --model smollm2-135m [--text FILE] [--texts 8] [--tolerance 0.01]

The high threshold is swept over 0.5, 1, 2, 3, 4, 5 with nothing pruned, then the low one over five values from 0 to
0.1. Of each the highest is taken whose perplexity of the text after a compressed context stays within the tolerance of
the full cache's. (The paper takes the best accuracy on a training set of problems; perplexity needs only text.) Where
not even the first high threshold does, the low tier is not worth having: the thresholds are then equal.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from bench_tiers import TEXT, Reader

from jaxkv import LLM, LeanKV, stats

HIGH = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0)
LOW = (0.0, 0.025, 0.05, 0.075, 0.1)


def measure(
    reader: Reader, texts: list[np.ndarray], context: int, policies: list[LeanKV]
) -> tuple[float, list[tuple[float, float]]]:
    """Perplexity with the full cache; and with each policy, as a part of that, beside the share of bytes held."""
    nats, share, base = np.zeros(len(policies)), np.zeros(len(policies)), 0.0
    for text in texts:
        cache, after = reader.read(text[None, :context]), jnp.asarray(text[None, context:])
        base += float(reader.nats(cache, after))
        for i, policy in enumerate(policies):
            small = reader.compressed(jax.tree.map(jnp.copy, cache), policy)
            held = stats(small)
            share[i] += held.bytes_held / held.bytes_full_16bit
            nats[i] += float(reader.nats(small, after))
    worse = np.exp((nats - base) / len(texts))
    return float(np.exp(base / len(texts))), list(zip(worse.tolist(), (share / len(texts)).tolist(), strict=True))


def choose(policies: list[LeanKV], measured: list[tuple[float, float]], tolerance: float) -> LeanKV | None:
    """The last policy up to which all stay within the tolerance; None where the first doesn't."""
    chosen = None
    for policy, (worse, share) in zip(policies, measured, strict=True):
        fine = worse <= 1 + tolerance
        name = "high {:g}  low {:g}".format(*policy.thresholds)
        print(f"{name:<22} perplexity x {worse:.4f}   bytes {share:.3f} of 16 bits   {'' if fine else 'too much'}")
        if not fine:
            break
        chosen = policy
    return chosen


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--model", required=True)
    options.add_argument("--text", type=Path, default=TEXT, help="real text of the kind that the model will read")
    options.add_argument("--texts", type=int, default=8)
    options.add_argument("--context", type=int, default=1536, help="tokens before the continuation")
    options.add_argument("--after", type=int, default=256, help="tokens of it")
    options.add_argument("--tolerance", type=float, default=0.01, help="of perplexity (default: 0.01)")
    asked = options.parse_args()
    llm = LLM(asked.model)
    if llm.tokenizer is None:
        raise SystemExit("this model has no tokenizer")
    ids = np.asarray(llm.tokenizer.encode(asked.text.read_text(encoding="utf-8")), np.int32)
    length = asked.context + asked.after + 1
    if len(ids) < length:
        raise SystemExit(f"{asked.text} has {len(ids)} tokens, and one context with its continuation takes {length}")
    starts = np.linspace(0, len(ids) - length, asked.texts).astype(int)
    texts = [ids[at : at + length] for at in starts]
    reader = Reader(llm.model, asked.context)

    policies = [LeanKV(high_threshold=high, low_threshold=0.0) for high in HIGH]
    full, measured = measure(reader, texts, asked.context, policies)
    print(f"full cache: perplexity {full:.3f} of {len(texts)} x {asked.after} tokens")
    high = choose(policies, measured, asked.tolerance)
    if high is None:
        print("the low tier costs too much at any threshold: prune only")
    base = high.thresholds.high if high is not None else 0.0
    policies = [LeanKV(high_threshold=max(base, low), low_threshold=low) for low in LOW]
    best = choose(policies, measure(reader, texts, asked.context, policies)[1], asked.tolerance) or policies[0]
    print("\nLeanKV(high_threshold={:g}, low_threshold={:g})".format(*best.thresholds))


if __name__ == "__main__":
    main()
