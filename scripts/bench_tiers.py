"""Quantised tiers on a real model: bytes held, perplexity of real text by format, and what compaction costs a step.

    python scripts/bench_tiers.py [--model smollm2-135m] [--texts 16]

Bytes count all that a sequence holds (codes, scales, scores, positions, part-filled blocks, tables) against K and V of
its whole text at 16 bits a value. Perplexity is of the tokens after a compressed context, which are read uncompressed;
its formats keep every token. Timings are taken in turn in one run, and are ratios first of all.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import LLM, CacheConfig, LeanKV, PagedCache, Ratio, decode_step, init_cache, look_ahead, stats
from jaxkv.cache import TierConfig
from jaxkv.engine.programs import Programs, program
from jaxkv.generation.passes import make_room
from jaxkv.generation.prefill import CHUNK
from models import Decoder
from pallas_kernels.quantised_block import Format

TEXT = Path(__file__).parent / "data" / "emma-chapters-1-10.txt"
CONTEXT, AFTER = 1536, 512


OBSERVING = LeanKV()


class Reader(Programs):
    """Reads contexts into an unquantised cache, from which caches of any format are made."""

    def __init__(self, model: Decoder, context: int, batch: int = 1):
        super().__init__(model)
        self.config = CacheConfig.for_model(model.sizes, batch=batch, max_context=context + 128)

    @program(donate=("cache",), static=("policy",))
    def step(
        self, cache: PagedCache, tokens: jax.Array, active: jax.Array, policy: LeanKV
    ) -> tuple[PagedCache, jax.Array]:
        return decode_step(self.model, cache, tokens, active, policy)

    @program(donate=("cache",), static=("policy",))
    def compact(self, cache: PagedCache, active: jax.Array, policy: LeanKV) -> PagedCache:
        """What a step does before its first layer: tables, then the KVs that are requantised."""
        claim = policy.placement.claim(cache, active)
        return replace(claim.cache, quantised=replace(claim.cache.tiers, pool=make_room(claim, active)))

    @program()
    def nats(self, cache: PagedCache, tokens: jax.Array) -> jax.Array:
        """Nats a token of ``i32[1, tokens]`` after the first, which follow what is cached."""
        logits = jax.nn.log_softmax(self.model.logits(look_ahead(self.model, cache, tokens[:, :-1])))
        return -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean()

    def read(self, tokens: np.ndarray) -> PagedCache:
        """``i32[batch, tokens]``."""
        cache, length = init_cache(self.config), tokens.shape[1]
        for row, ids in enumerate(tokens):
            prompt = self.start(cache, row, length, OBSERVING, fresh=True)
            for at in range(0, length, CHUNK):
                part, count = np.zeros((1, CHUNK), np.int32), min(CHUNK, length - at)
                part[0, :count] = ids[at : at + count]
                cache, prompt = self.chunk(cache, prompt, row, part, count, OBSERVING)
            cache = self.score(cache, prompt, row, OBSERVING)
        return cache

    def compressed(self, cache: PagedCache, policy: LeanKV) -> PagedCache:
        """The cache, given away, compressed by the policy."""
        config, layout = self.config, policy.placement.layout(self.config.head_dim)
        assert layout is not None
        blocks = 1 + config.batch * config.heads * (-(-config.max_context // layout.tokens) + 1)
        tiers = TierConfig(layout=layout, num_blocks=blocks)
        cache = replace(cache, quantised=init_cache(replace(config, num_blocks=2, tiers=tiers)).quantised)
        for row in range(config.batch):
            cache = self.compress_rows(cache, row, 0, policy)
        return cache


def uniform(name: str) -> LeanKV:
    """Every token at one format."""
    return LeanKV(high_threshold=0.0, low_threshold=0.0, high=Format.named(name), low=Format.named(name))


def report_bytes(model: Decoder, ids: np.ndarray, tokens: int) -> None:
    reader = Reader(model, tokens)
    cache = reader.read(ids[None, :tokens])
    print(f"\n{tokens} tokens     nominal  physical  high    low     of the KVs")
    for name, policy in (
        ("K8V4 alone", uniform("K8V4")),
        ("defaults", LeanKV()),
        ("at 8x", LeanKV(budget=Ratio(ratio=8))),
    ):
        held = stats(reader.compressed(jax.tree.map(jnp.copy, cache), policy))
        share = held.bytes_held / held.bytes_full_16bit
        tiers = [kvs / held.kvs_full for kvs in (held.kvs_high, held.kvs_low)]
        print(f"{name:<15} {held.nominal_share:7.4f}  {share:8.4f}  {tiers[0]:.4f}  {tiers[1]:.4f}")


def perplexity(model: Decoder, ids: np.ndarray, texts: int) -> None:
    reader = Reader(model, CONTEXT)
    names = ("K8V8", "K8V4", "K4V8", "K4V4", "K4V2", "K2V4")

    sums = dict.fromkeys(("unquantised", *names), 0.0)
    for text in range(texts):
        at = text * (len(ids) - CONTEXT - AFTER - 1) // max(texts - 1, 1)
        part = ids[None, at : at + CONTEXT + AFTER + 1]
        cache, after = reader.read(part[:, :CONTEXT]), jnp.asarray(part[:, CONTEXT:])
        sums["unquantised"] += float(reader.nats(cache, after))
        for name in names:
            small = reader.compressed(jax.tree.map(jnp.copy, cache), uniform(name))
            sums[name] += float(reader.nats(small, after))
    base = sums["unquantised"] / texts
    print(f"\n{texts * AFTER} tokens after contexts of {CONTEXT}    perplexity  of the unquantised")
    for name, total in sums.items():
        value = np.exp(total / texts)
        print(f"{name:<38} {value:10.4f}  {value / np.exp(base):.4f}")


def compaction(model: Decoder, ids: np.ndarray, batch: int, tokens: int, steps: int) -> None:
    reader = Reader(model, tokens, batch)
    rows = np.stack([ids[row * 64 : row * 64 + tokens] for row in range(batch)])
    policy = LeanKV()
    cache = reader.compressed(reader.read(rows), policy)
    active, last = jnp.ones(batch, bool), jnp.asarray(rows[:, -1])

    whole, part = [], []
    spare = reader.compact(jax.tree.map(jnp.copy, cache), active, policy)
    cache, logits = reader.step(cache, last, active, policy)
    for _ in range(steps):
        began = time.perf_counter()
        cache, logits = jax.block_until_ready(reader.step(cache, last, active, policy))
        stepped = time.perf_counter()
        spare = replace(spare, num_tokens=jnp.copy(cache.num_tokens))
        middle = time.perf_counter()
        spare = jax.block_until_ready(reader.compact(spare, active, policy))
        ended = time.perf_counter()
        whole.append(stepped - began)
        part.append(ended - middle)
        last = jnp.argmax(logits, -1).astype(jnp.int32)
    step_ms, compact_ms = 1000 * np.median(whole), 1000 * np.median(part)
    print(
        f"\nbatch {batch}, {tokens} tokens: decode step {step_ms:.1f} ms, compaction of it {compact_ms:.2f} ms", end=" "
    )
    print(f"({100 * compact_ms / step_ms:.1f} %)")


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--texts", type=int, default=16, help="contexts whose continuation is scored")
    options.add_argument("--tokens", type=int, default=4000, help="of the prompt whose bytes are counted")
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--steps", type=int, default=20, help="decode steps timed")
    asked = options.parse_args()
    llm = LLM(asked.model)
    if llm.tokenizer is None:
        raise SystemExit("this model has no tokenizer")
    ids = np.asarray(llm.tokenizer.encode(TEXT.read_text(encoding="utf-8")), np.int32)
    report_bytes(llm.model, ids, asked.tokens)
    compaction(llm.model, ids, asked.batch, 1024, asked.steps)
    perplexity(llm.model, ids, asked.texts)


if __name__ == "__main__":
    main()
