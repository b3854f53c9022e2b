"""Tokens a second of a batch as large as a pool of fixed bytes lets it be, at several compression ratios.

KV-Compress's set-up: prompts of one length, 500 tokens generated for each, and a pool that is the same for all ratios.
Prompts are read one after the other, each compressed before the next; the more they are compressed, the more of them
fit, and all are decoded together. Compilation isn't counted. The models have their published shapes but random
weights: speed and memory are those of the real ones, the text isn't. It measures and doesn't judge: exit status 0.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxkv import CacheConfig, Decoded, KVCompress, PagedCache, Ratio, compress, decode, init_cache, prefill, stats
from jaxkv.engine.programs import ModelPrograms, program
from models import Llama, LlamaConfig, stack_layers
from models.shapes import SHAPES

TINY = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_context=4096,
)
MODELS = {**SHAPES, "tiny": TINY}
POOL = 4_500_000_000
"""Bytes that a 24 GB card has left beside 16-bit weights of an 8B model, with a tenth of the card kept free."""


@dataclass(frozen=True, kw_only=True)
class Row:
    ratio: float
    batch: int
    blocks_held: int
    """After the prompts, before the first decoded token."""
    blocks: int
    """Of the pool."""
    prefill_seconds: float
    """All prompts, with their compression."""
    decode_seconds: float
    tokens: int
    """Generated."""

    @property
    def tokens_a_second(self) -> float:
        return self.tokens / (self.prefill_seconds + self.decode_seconds)


@dataclass(frozen=True, kw_only=True)
class Setup:
    model: LlamaConfig
    prompt: int
    new: int
    pool_bytes: int
    block_size: int
    most: int
    """Sequences at most, whatever fits."""
    dtype: Any

    def config(self, batch: int) -> CacheConfig:
        return CacheConfig.for_model(
            self.model,
            batch=batch,
            max_context=self.prompt + self.new,
            memory=self.pool_bytes,
            block_size=self.block_size,
            dtype=self.dtype,
        )

    def largest_batch(self, policy: KVCompress, ratio: float) -> int:
        """Sequences that the pool surely serves to the end; 0: not even one prompt fits."""
        heads, size = self.model.num_layers * self.model.num_kv_heads, self.block_size
        full = -(-self.prompt // size)
        kept = (
            heads * full if ratio == 1 else max(int(heads * full / ratio), heads * -(-policy.protected_window // size))
        )
        grown = kept + heads * -(-self.new // size)
        batch = 0
        while batch < self.most:
            room = self.config(batch + 1).num_blocks - 1
            if (batch + 1) * grown > room or batch * kept + heads * full > room:
                break
            batch += 1
        return batch


def random_model(config: LlamaConfig, dtype: Any, *, stacked: bool) -> Llama:
    model = Llama(config, rngs=nnx.Rngs(0), dtype=dtype)
    return stack_layers(model) if stacked else model


class Serving(ModelPrograms):
    """The two programs of a run."""

    @program(donate=("cache",), static=("policy",))
    def read(
        self, cache: PagedCache, row: jax.Array, tokens: jax.Array, policy: KVCompress | None
    ) -> tuple[PagedCache, jax.Array]:
        """One prompt, ``i32[1, tokens]``, into one row, ``i32[1]``; its first token."""
        part, lengths = cache.rows(row), jnp.full(1, tokens.shape[1])
        part, logits = prefill(self.model, part, tokens, lengths, policy)
        part = part if policy is None else compress(part, policy)
        return cache.with_rows(part, row), jnp.argmax(logits, axis=-1).astype(jnp.int32)

    @program(donate=("cache",), static=("steps",))
    def write(self, cache: PagedCache, first: jax.Array, steps: int) -> Decoded:
        return decode(self.model, cache, first, jnp.full(first.shape, steps), steps=steps)

    def seconds_since(self, began: float, compiled: float) -> float:
        """But for what of them was compiling."""
        return time.perf_counter() - began - (self.compile_seconds - compiled)


def measure(setup: Setup, serving: Serving, ratio: float) -> Row | None:
    """None: not even one prompt fits."""
    policy = KVCompress(budget=Ratio(ratio=ratio))
    batch = setup.largest_batch(policy, ratio)
    if batch == 0:
        return None
    cache = init_cache(setup.config(batch))
    prompts = np.random.default_rng(0).integers(0, setup.model.vocab_size, (batch, setup.prompt), np.int32)

    began, compiled = time.perf_counter(), serving.compile_seconds
    tokens = []
    for at in range(batch):
        row, prompt = jnp.full(1, at, jnp.int32), jnp.asarray(prompts[at : at + 1])
        cache, token = serving.read(cache, row, prompt, policy if ratio > 1 else None)
        tokens.append(token)
    first = jax.block_until_ready(jnp.concatenate(tokens))
    prefilled = serving.seconds_since(began, compiled)
    held = stats(cache).blocks_held
    began, compiled = time.perf_counter(), serving.compile_seconds
    made = jax.block_until_ready(serving.write(cache, first, setup.new - 1))
    decoded = serving.seconds_since(began, compiled)
    count = int(made.counts.sum()) + batch
    if count != batch * setup.new:
        print(f"ratio {ratio:g}: the pool ran dry after {count} of {batch * setup.new} tokens", file=sys.stderr)
    return Row(
        ratio=ratio,
        batch=batch,
        blocks_held=held,
        blocks=setup.config(batch).num_blocks - 1,
        prefill_seconds=prefilled,
        decode_seconds=decoded,
        tokens=count,
    )


def print_row(row: Row, first: Row | None) -> None:
    speedup = f"{row.tokens_a_second / first.tokens_a_second:.2f}x" if first else ""
    decoding = row.tokens / row.decode_seconds if row.decode_seconds else 0.0
    print(
        f"| {row.ratio:g} | {row.batch} | {row.blocks_held} of {row.blocks} | {row.prefill_seconds:.2f} | "
        f"{row.decode_seconds:.2f} | {decoding:.1f} | {row.tokens_a_second:.1f} | {speedup} |",
        flush=True,
    )


def main() -> None:
    small = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="tiny" if small else "llama-3.1-8b")
    parser.add_argument("--prompt", type=int, default=256 if small else 6000, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=16 if small else 500, help="tokens generated for each, at least 2")
    parser.add_argument("--pool-bytes", type=int, default=2**21 if small else POOL)
    parser.add_argument("--ratios", default="1,2,4,8" if small else "1,2,4,8,16,32,64")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--most", type=int, default=16 if small else 512, help="sequences at most")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32" if small else "bfloat16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    if options.new < 2:
        parser.error(f"--new must be at least 2, got {options.new}")

    setup = Setup(
        model=MODELS[options.model],
        prompt=options.prompt,
        new=options.new,
        pool_bytes=options.pool_bytes,
        block_size=options.block_size,
        most=options.most,
        dtype=jnp.dtype(options.dtype),
    )
    head = (
        f"{date.today()}, {jax.devices()[0].device_kind}, jax {version('jax')}, shape of {options.model} with RANDOM "
        f"weights, {options.dtype}, pool of {options.pool_bytes} bytes, blocks of {options.block_size}, prompts of "
        f"{options.prompt} tokens, {options.new} generated"
    )
    print(f"{head}\n\n| ratio | batch | blocks held | prefill s | decode s | decode tokens/s | tokens/s | speed-up |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    stacked = jax.default_backend() == "tpu"  # a GPU would copy each layer out of what is stacked, at every step
    serving = Serving(random_model(setup.model, setup.dtype, stacked=stacked))
    rows: list[Row] = []
    for ratio in map(float, options.ratios.split(",")):
        row = measure(setup, serving, ratio)
        if row is None:
            print(f"| {ratio:g} | 0 | a prompt doesn't fit the pool | | | | | |", flush=True)
            continue
        rows.append(row)
        print_row(row, rows[0] if rows[0].ratio == 1 else None)
    if options.json:
        figures = [{**asdict(row), "tokens_a_second": row.tokens_a_second} for row in rows]
        options.json.write_text(json.dumps({"run": head, "rows": figures}, indent=2))


if __name__ == "__main__":
    main()
