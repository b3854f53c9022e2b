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
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxkv import LLM, CacheConfig, LeanKV, PagedCache, Ratio, decode_step, init_cache, stats
from jaxkv.cache.quantised import TierConfig, init_tiers
from jaxkv.engine.programs import ModelPrograms, program
from jaxkv.generation.decode import compress
from jaxkv.generation.passes import compact
from jaxkv.generation.prefill import PromptState, finish_prompt, look_ahead, prefill_chunk, start_prompt
from models import Llama
from pallas_kernels.tiers import Format

TEXT = Path(__file__).parent / "data" / "emma-chapters-1-10.txt"
CONTEXT, AFTER = 1536, 512
CHUNK = 512


OBSERVING = LeanKV()


class Reader(ModelPrograms):
    """Reads contexts into an unquantised cache, from which caches of any format are made."""

    def __init__(self, model: Llama, context: int, batch: int = 1):
        super().__init__(model)
        self.config = CacheConfig.for_model(model.config, batch=batch, max_context=context + 128)

    @program(donate=("cache",))
    def start(self, cache: PagedCache, lengths: jax.Array) -> PromptState:
        return start_prompt(self.model, cache, lengths, OBSERVING, fresh=True)

    @program(donate=("state",))
    def chunk(self, state: PromptState, tokens: jax.Array, counts: jax.Array) -> PromptState:
        return prefill_chunk(self.model, state, tokens, counts, OBSERVING)

    @program()
    def finish(self, state: PromptState) -> tuple[PagedCache, jax.Array]:
        return finish_prompt(self.model, state, OBSERVING)

    @program(donate=("cache",), static=("policy",))
    def step(
        self, cache: PagedCache, tokens: jax.Array, active: jax.Array, policy: LeanKV
    ) -> tuple[PagedCache, jax.Array]:
        return decode_step(self.model, cache, tokens, active, policy)

    def read(self, tokens: np.ndarray) -> PagedCache:
        """``i32[batch, tokens]``."""
        batch, length = tokens.shape
        state = self.start(init_cache(self.config), jnp.full(batch, length))
        for at in range(0, length, CHUNK):
            part = np.zeros((batch, CHUNK), np.int32)
            part[:, : length - at] = tokens[:, at : at + CHUNK]
            state = self.chunk(state, jnp.asarray(part), jnp.full(batch, min(CHUNK, length - at)))
        return self.finish(state)[0]

    def compressed(self, cache: PagedCache, policy: LeanKV) -> PagedCache:
        """The cache, given away, compressed by the policy."""
        layout = policy.layout(self.config.head_dim)
        blocks = 1 + self.config.batch * self.config.heads * (-(-self.config.max_context // layout.tokens) + 1)
        tiers = init_tiers(
            TierConfig(layout=layout, num_blocks=blocks),
            layers=self.config.num_layers,
            batch=self.config.batch,
            kv_heads=self.config.num_kv_heads,
            max_context=self.config.max_context,
        )
        return shrink(replace(cache, tiers=tiers), policy)


shrink = jax.jit(compress, static_argnums=1, donate_argnums=0)


@nnx.jit
def _nats(model: Llama, cache: PagedCache, tokens: jax.Array) -> jax.Array:
    logits = jax.nn.log_softmax(model.logits(look_ahead(model, cache, tokens[:, :-1])))
    return -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean()


def continuation_nats(model: Llama, cache: PagedCache, tokens: jax.Array) -> float:
    """Nats a token of ``i32[1, tokens]`` after the first, which follow what is cached."""
    return float(_nats(model, cache, tokens))


def uniform(name: str) -> LeanKV:
    """Every token at one format."""
    return LeanKV(high_threshold=0.0, low_threshold=0.0, high=Format.named(name), low=Format.named(name))


def report_bytes(model: Llama, ids: np.ndarray, tokens: int) -> None:
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


def perplexity(model: Llama, ids: np.ndarray, texts: int) -> None:
    reader = Reader(model, CONTEXT)
    names = ("K8V8", "K8V4", "K4V8", "K4V4", "K4V2", "K2V4")

    sums = dict.fromkeys(("unquantised", *names), 0.0)
    for text in range(texts):
        at = text * (len(ids) - CONTEXT - AFTER - 1) // max(texts - 1, 1)
        part = ids[None, at : at + CONTEXT + AFTER + 1]
        cache, after = reader.read(part[:, :CONTEXT]), jnp.asarray(part[:, CONTEXT:])
        sums["unquantised"] += continuation_nats(model, cache, after)
        for name in names:
            small = reader.compressed(jax.tree.map(jnp.copy, cache), uniform(name))
            sums[name] += continuation_nats(model, small, after)
    base = sums["unquantised"] / texts
    print(f"\n{texts * AFTER} tokens after contexts of {CONTEXT}    perplexity  of the unquantised")
    for name, total in sums.items():
        value = np.exp(total / texts)
        print(f"{name:<38} {value:10.4f}  {value / np.exp(base):.4f}")


def compaction(model: Llama, ids: np.ndarray, batch: int, tokens: int, steps: int) -> None:
    reader = Reader(model, tokens, batch)
    rows = np.stack([ids[row * 64 : row * 64 + tokens] for row in range(batch)])
    policy = LeanKV()
    cache = reader.compressed(reader.read(rows), policy)
    active, last = jnp.ones(batch, bool), jnp.asarray(rows[:, -1])

    @partial(jax.jit, donate_argnums=0)
    def alone(tiers, num_tokens):
        return compact(tiers, policy.step(tiers, num_tokens), active).tiers

    whole, part = [], []
    spare = alone(jax.tree.map(jnp.copy, cache.quantised), cache.num_tokens)
    cache, logits = reader.step(cache, last, active, policy)
    for _ in range(steps):
        began = time.perf_counter()
        cache, logits = jax.block_until_ready(reader.step(cache, last, active, policy))
        middle = time.perf_counter()
        spare = jax.block_until_ready(alone(spare, cache.num_tokens))
        whole.append(middle - began)
        part.append(time.perf_counter() - middle)
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
