"""Compiles every TPU kernel, whole decode steps and a whole compression, for TPUs that aren't here.

    python scripts/compile_tpu.py [--chips v5e v6e] [--models llama-3.1-8b ...] [--json FILE]

prints a row a program: MiB of temporaries and at the peak on each chip, and what is wrong, such as a copy of the pool.
Each chip and model is compiled in a process of its own, since a TPU compiler that fails may end its process.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from targets import (
    DEVICES,
    GIB,
    TPUS,
    abstract_cache,
    compile_for_tpu,
    copies_of,
    quantise_abstractly,
    sizes,
    why_not,
)

from jaxkv.cache import PagedCache
from jaxkv.generation.compress import compress
from jaxkv.generation.decode import decode, decode_step
from jaxkv.policies import KVCompress, LeanKV, Policy, Ratio
from models import Llama, LlamaConfig, stack_layers
from models.shapes import LARGE_SHAPES, SHAPES
from pallas_kernels import use_implementation
from pallas_kernels.block_moves import Moves, move_kvs
from pallas_kernels.block_writes import write_blocks
from pallas_kernels.paged_attention import RawKVs, Significance, TieredKVs, paged_attention
from pallas_kernels.prefill_attention import ObservedQueries, prefill_attention
from pallas_kernels.quantised_block import BlockLayout
from pallas_kernels.quantised_writes import lower_kvs, write_kvs

BATCH, CONTEXT, BLOCK_SIZE, CHUNK, WINDOW = 32, 16_384, 64, 512, 32
KERNEL_POOL = 2 * GIB
WHOLE = "llama-3.1-8b"
"""The model whose whole steps are compiled too."""
TIERED = (WHOLE, "smollm2-135m")
"""Models whose tiers' kernels are compiled too: one of each head dimension."""
TIER_POLICIES = {64: LeanKV(block_tokens=256), 128: LeanKV(block_tokens=128)}
"""By head dimension: both tiers' blocks then fill tiles of 8 rows."""
POLICY = KVCompress(budget=Ratio(ratio=8))
LOOP_TEMPORARIES = 64 * 2**20
"""Bytes beside the weights and the cache: no matrix of a layer, let alone of all, may be laid out anew."""


class Program(NamedTuple):
    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    pool: Any
    donate: tuple[int, ...] = ()
    most: int | None = None
    """Bytes of temporaries; None: what the pool's size says."""


def shape(dims: tuple[int, ...], dtype: Any) -> Any:
    """Stands for an array."""
    return jax.ShapeDtypeStruct(dims, dtype)


def squared_mass(p: jax.Array) -> jax.Array:
    return (p * p).sum(-2)


def square(p: jax.Array) -> jax.Array:
    return p * p


def kernels(model: LlamaConfig) -> Iterator[Program]:
    """Each kernel over a pool of 2 GiB: decoding at batch 32, a chunk of one prompt, the moves of one sequence."""
    i32, bf16 = jnp.int32, jnp.bfloat16
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    max_blocks = min(CONTEXT, model.max_context) // BLOCK_SIZE
    pool = shape((KERNEL_POOL // (BLOCK_SIZE * 2 * head_dim * 2), BLOCK_SIZE, 2 * head_dim), bf16)

    def table(batch: int) -> tuple[Any, Any]:
        return shape((batch, kv_heads, max_blocks), i32), shape((batch, kv_heads), i32)

    def decode(query: Any, pool: Any, table: Any, lengths: Any) -> Any:
        return paged_attention(query, RawKVs(pool, table, lengths), observe=squared_mass)

    yield Program("paged_attention", decode, (shape((BATCH, heads, head_dim), bf16), pool, *table(BATCH)), pool)

    for name, batch, length in (("block_writes, decoding", BATCH, 1), ("block_writes, a chunk", 1, CHUNK)):
        new = shape((batch, length, kv_heads, head_dim), bf16)
        yield Program(name, write_blocks, (pool, new, new, *table(batch), shape((batch,), i32)), pool, (0,))

    def prefill(query: Any, key: Any, value: Any, raw: RawKVs, observe: ObservedQueries) -> Any:
        return prefill_attention(query, key, value, raw, observe=observe)

    observe = ObservedQueries(
        rows=shape((1, WINDOW), i32),
        positions=shape((1, CHUNK), i32),
        cached_positions=shape((1, kv_heads, max_blocks * BLOCK_SIZE), i32),
        function=square,
    )
    query, new = (shape((1, CHUNK, n, head_dim), bf16) for n in (heads, kv_heads))
    yield Program("prefill_attention", prefill, (query, new, new, RawKVs(pool, *table(1)), observe), pool)

    rows = model.num_layers * kv_heads
    values = (pool.shape[0] * BLOCK_SIZE // 128, 128)
    marks = shape((rows, max_blocks * BLOCK_SIZE), jnp.bool_)
    moves = Moves(is_source=marks, is_hole=marks)
    arguments = (pool, shape(values, jnp.float32), shape(values, i32), shape((rows, max_blocks), i32), moves)
    yield Program("block_moves", move_kvs, arguments, pool, (0, 1, 2))


def tiered_kernels(model: LlamaConfig) -> Iterator[Program]:
    """Each kernel over a pool of 2 GiB of quantised blocks, decoding at batch 32."""
    i32, heads, kv_heads, head_dim = jnp.int32, model.num_heads, model.num_kv_heads, model.head_dim
    layout = layout_of(TIER_POLICIES[head_dim], head_dim)
    assert layout is not None
    pool = shape((KERNEL_POOL // layout.block_bytes, layout.rows, 128), jnp.uint32)
    table = shape((BATCH, kv_heads, min(CONTEXT, model.max_context) // layout.tokens + 2), i32)
    lengths, query = shape((BATCH, kv_heads, 2), i32), shape((BATCH, heads, head_dim), jnp.bfloat16)
    significance = Significance(
        observe=lambda p: p.max(-2),
        value=lambda scores, positions, following: scores / (following - positions).astype(jnp.float32),
    )

    def decode(pool: Any, query: Any, table: Any, lengths: Any, following: Any) -> Any:
        tiers = TieredKVs(pool=pool, block_table=table, lengths=lengths, layout=layout)
        return paged_attention(query, None, tiers=tiers, observe=significance, next_position=following)

    arguments = (pool, query, table, lengths, shape((BATCH,), i32))
    yield Program("paged_attention, tiers", decode, arguments, pool, (0,))
    rows = BATCH * kv_heads
    index, new = shape((rows,), i32), shape((rows, head_dim), jnp.bfloat16)
    write, lower = partial(write_kvs, layout=layout), partial(lower_kvs, layout=layout)
    yield Program("quantised_writes, new", write, (pool, new, new, index, index, index), pool, (0,))
    yield Program("quantised_writes, lowered", lower, (pool, index, index, index, index), pool, (0,))


def layout_of(policy: Policy, head_dim: int) -> BlockLayout | None:
    """As a TPU takes it."""
    with use_implementation("mosaic_tpu"):
        return policy.placement.layout(head_dim)


def half_of(model: LlamaConfig) -> LlamaConfig:
    """What one of two chips holds of a model whose heads, feed-forward and vocabulary are split between them."""
    return replace(
        model,
        num_heads=model.num_heads // 2,
        num_kv_heads=model.num_kv_heads // 2,
        intermediate_size=model.intermediate_size // 2,
        vocab_size=model.vocab_size // 2,
    )


def abstract_model(config: LlamaConfig, chip: str, weights: str = "bfloat16", **how: bool) -> Any:
    """Graph and leaves, shapes only, of a model as ``jaxkv.LLM`` runs it on this chip; ``how``: as
    ``quantise_abstractly`` takes it."""
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    if weights != "bfloat16":
        model = quantise_abstractly(model, weights, **how)
    return nnx.split(model if chip == "v7x" else stack_layers(model))


def quantised_step(model: LlamaConfig, chip: str, weights: str, **how: bool) -> Program:
    """One decode step at batch 32 with weights as codes, of which no layer may be widened whole."""
    graph, leaves = abstract_model(model, chip, weights, **how)
    weight_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(leaves))
    cache = abstract_cache(
        model,
        batch=BATCH,
        max_context=CONTEXT,
        block_size=BLOCK_SIZE,
        memory=min(int(0.8 * DEVICES[chip].memory) - weight_bytes, 48 * GIB),
        dtype=jnp.bfloat16,
    )

    def step(cache: PagedCache, weights: Any, tokens: jax.Array, active: jax.Array) -> Any:
        return decode_step(nnx.merge(graph, weights), cache, tokens, active, POLICY)

    row = shape((BATCH,), jnp.int32), shape((BATCH,), jnp.bool_)
    widened = model.hidden_size * model.intermediate_size * 2
    return Program(f"decode step, {weights} weights", step, (cache, leaves, *row), cache.raw.pool, (0,), widened)


def whole_steps(model: LlamaConfig, chip: str) -> Iterator[Program]:
    """Decode steps, one and many, and a compression at batch 32, with a pool of what the weights leave of the chip."""
    graph, weights = abstract_model(model, chip)
    weight_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
    pool_bytes = min(int(0.8 * DEVICES[chip].memory) - weight_bytes, 48 * GIB)
    row = shape((BATCH,), jnp.int32), shape((BATCH,), jnp.bool_)

    def step(cache: PagedCache, weights: Any, tokens: jax.Array, active: jax.Array, *, policy: Policy) -> Any:
        return decode_step(nnx.merge(graph, weights), cache, tokens, active, policy)

    def steps(cache: PagedCache, weights: Any, tokens: jax.Array, limits: jax.Array) -> Any:
        return decode(nnx.merge(graph, weights), cache, tokens, limits, steps=16, policy=POLICY)

    for name, policy in (("", POLICY), (", LeanKV", TIER_POLICIES[model.head_dim])):
        cache = abstract_cache(
            model,
            batch=BATCH,
            max_context=CONTEXT,
            block_size=BLOCK_SIZE,
            memory=pool_bytes,
            dtype=jnp.bfloat16,
            layout=layout_of(policy, model.head_dim),
            prompts=1,
        )
        pool = cache.tiers.pool if cache.layout else cache.raw.pool
        yield Program(f"decode step{name}", partial(step, policy=policy), (cache, weights, *row), pool, (0,))
        if policy is POLICY and chip != "v7x":  # there all weights are retiled before a loop: docs/kernels.md
            yield Program("decode, 16 steps", steps, (cache, weights, row[0], row[0]), pool, (0,), LOOP_TEMPORARIES)
        yield Program(f"compression{name}", partial(compress, policy=policy), (cache,), pool, (0,))


def programs(chip: str, name: str, layers: int | None = None) -> Iterator[tuple[str, Program]]:
    """What is compiled for a chip of a model: the model's name as printed, and the program. ``layers``: of its whole
    steps; None: all."""
    if name in LARGE_SHAPES:  # as it is published in FP8
        large = LARGE_SHAPES[name]
        large = replace(large, num_layers=layers or large.num_layers)
        yield name, quantised_step(large, chip, "fp8", per_tensor=True)
        return
    model, memory = SHAPES[name], DEVICES[chip].memory
    for program in (*kernels(model), *(tiered_kernels(model) if name in TIERED else ())):
        yield name, program
    if name == WHOLE:
        half = memory < 20 * GIB  # 16 GB of weights don't fit
        whole = replace(model, num_layers=layers or model.num_layers)
        for program in whole_steps(half_of(whole) if half else whole, chip):
            yield name + (", half" if half else ""), program
        yield name, quantised_step(whole, chip, "int8")


def compile_all(chip: str, name: str, layers: int | None = None) -> Iterator[dict[str, Any]]:
    for model, program in programs(chip, name, layers):
        began = time.perf_counter()
        compiled = compile_for_tpu(chip, program.function, *program.arguments, donate=program.donate)
        pool = program.pool
        yield {
            "chip": chip,
            "model": model,
            "program": program.name,
            "pool": pool.size * pool.dtype.itemsize,
            "written": bool(program.donate),
            **sizes(compiled),
            "memory": DEVICES[chip].memory,
            "most": pool.size * pool.dtype.itemsize // 4 if program.most is None else program.most,
            "copies": copies_of(compiled, pool.shape, pool.dtype.itemsize),
            "seconds": time.perf_counter() - began,
        }


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled program; nothing, as it should be."""
    found = list(row["copies"])
    if row["written"] and row["aliased"] < row["pool"]:
        found.append(f"only {row['aliased']} bytes of {row['pool']} are updated in place")
    if row["temporary"] > row["most"]:
        found.append(f"{row['temporary']} bytes of temporaries")
    if row["peak"] > row["memory"]:
        found.append(f"{row['peak']} bytes, more than the chip's {row['memory']}")
    return found


def in_a_process(chip: str, name: str, layers: int | None = None) -> list[dict[str, Any]]:
    """``compile_all`` where it can't take this process with it.

    Raises:
      RuntimeError: the compiler failed; with what it said.
    """
    command = [sys.executable, __file__, "--one", chip, name, *(["--layers", str(layers)] if layers else [])]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"compiling {name} for {chip} failed: {ended.stderr[-3000:]}")
    return [json.loads(line) for line in ended.stdout.splitlines()]


def table(rows: list[dict[str, Any]]) -> str:
    """One row a program, one column a chip: MiB of temporaries and at the peak, and what is wrong."""

    def cell(row: dict[str, Any]) -> str:
        numbers = f"{row['temporary'] / 2**20:,.0f} / {row['peak'] / 2**20:,.0f}"
        return "; ".join([numbers, *faults(row)])

    chips = list(dict.fromkeys(row["chip"] for row in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        of = (row["model"], row["program"])
        cells.setdefault(of, {})[row["chip"]] = cell(row)
    lines = ["| " + " | ".join(["model", "program", *chips]) + " |", "|" + " --- |" * (2 + len(chips))]
    for (model, program), by_chip in cells.items():
        lines.append("| " + " | ".join([model, program, *(by_chip.get(chip, "") for chip in chips)]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=TPUS)
    parser.add_argument("--models", nargs="+", choices=[*SHAPES, *LARGE_SHAPES], default=list(SHAPES))
    parser.add_argument("--json", help="write the rows to this file too")
    parser.add_argument("--one", nargs=2, metavar=("CHIP", "MODEL"), help="in this process, a JSON line a program")
    parser.add_argument("--layers", type=int, help="of whole steps, where all take too long")
    options = parser.parse_args()
    if options.one:
        for row in compile_all(*options.one, layers=options.layers):
            print(json.dumps(row), flush=True)
        return
    rows = []
    for chip in options.chips or [chip for chip in TPUS if why_not(chip) is None]:
        if reason := why_not(chip):
            sys.exit(f"nothing can be compiled for {chip}: {reason}")
        for name in options.models:
            rows += in_a_process(chip, name, options.layers)
    print(f"jax {jax.__version__}: temporary / peak MiB; batch {BATCH}, {CONTEXT}-token tables, block {BLOCK_SIZE}\n")
    print(table(rows))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)
    if any(faults(row) for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
