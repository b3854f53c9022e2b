"""The TPU kernels whose schedules are counted: how they are called, for heads that hold how many KVs, and what a tile
or a head of them must read or compute."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from compile_tpu import BLOCK_SIZE, CONTEXT, TIER_POLICIES, layout_of, shape, squared_mass

from models import LlamaConfig
from models.shapes import SHAPES
from pallas_kernels.block_moves import Moves, move_kvs
from pallas_kernels.paged_attention import RawKVs, Significance, TieredKVs, paged_attention
from pallas_kernels.paged_attention import tpu_tiers as tiers_tpu
from pallas_kernels.prefill_attention import prefill_attention

POOL_BYTES = 2**31
ROWS = 256
"""KV heads of all sequences in a call, about: so many that of those on each of two cores some in the middle see neither
the first step of the grid nor the last."""
MOVED_ROWS = 32
"""Of moves, which take longest and visit one head a step."""
HEADS = (2048, 16_384)
"""KVs of the heads that are counted whole."""
SHORT = 256
"""Of a head that is compressed 64 times; shorter than a tile."""
CHUNK = 512
"""Tokens of a prompt that are read at once."""
LONG_CHUNK = 2048
"""Of a longer chunk, of whose own keys less is masked."""


class Need(NamedTuple):
    """What must be done, whatever does it."""

    bytes: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is counted: what the first run, or passes, has more than the second."""

    name: str
    need: Need
    kvs: int
    more: int
    """A run, by the KVs a head."""
    less: int | None = None
    times: float = 1.0
    """Parts in the difference."""


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    kernel: str
    """As the compiler names it."""
    function: Callable[..., Any]
    """Of a pool and what ``arguments`` gives."""
    pool: Any
    """Shape and dtype; or several."""
    arguments: Callable[[int], tuple[Any, ...]]
    """For heads that hold so many KVs."""
    rows: int
    """KV heads of all sequences."""
    parts: tuple[Part, ...]
    blocks_axis: int = 0
    """Of the pool."""

    @property
    def runs(self) -> list[int]:
        """KVs a head."""
        return sorted({run for part in self.parts for run in (part.more, part.less) if run is not None})


def raw_pool(model: LlamaConfig) -> Any:
    row = 2 * model.head_dim
    return shape((POOL_BYTES // (BLOCK_SIZE * row * 2), BLOCK_SIZE, row), jnp.bfloat16)


def of_heads(size: Callable[[int], float], unit: int, heads: tuple[int, ...] = HEADS) -> tuple[Part, ...]:
    """A tile of so many KVs, from two heads of whole tiles, and whole heads."""
    tiles = max(2, HEADS[-1] // unit // 2)
    tile = Part(
        name="tile",
        need=Need(size(unit)),
        kvs=unit,
        more=2 * tiles * unit,
        less=tiles * unit,
        times=tiles,
    )
    return tile, *(Part(name="head", need=Need(size(n)), kvs=n, more=n) for n in heads)


def decode(name: str, *, observe: Any = None) -> Case:
    """bfloat16; a tile is half a MiB."""
    model = SHAPES[name]
    kv_heads, width = model.num_kv_heads, 2 * model.head_dim
    batch, entries = -(-ROWS // kv_heads), max(HEADS) // BLOCK_SIZE

    def arguments(kvs: int) -> tuple[Any, ...]:
        query = jnp.zeros((batch, model.num_heads, model.head_dim), jnp.bfloat16)
        table = np.arange(batch * kv_heads * entries, dtype=np.int32).reshape(batch, kv_heads, entries)
        return query, jnp.asarray(table), jnp.full((batch, kv_heads), kvs, jnp.int32)

    def attend(pool: Any, query: Any, table: Any, lengths: Any) -> Any:
        return paged_attention(query, RawKVs(pool, table, lengths), observe=observe)

    return Case(
        name=f"decode, {name}" + (", masses" if observe else ""),
        kernel="paged_attention",
        function=attend,
        pool=raw_pool(model),
        arguments=arguments,
        rows=batch * kv_heads,
        parts=of_heads(lambda kvs: kvs * width * 2, 2**19 // (width * 2), (SHORT, *HEADS)),
    )


SIGNIFICANCE = Significance(
    observe=lambda p: p.max(-2),
    value=lambda scores, positions, following: scores / (following - positions).astype(jnp.float32),
)


def tiers(name: str, *, is_low: bool, significance: bool = False) -> Case:
    model = SHAPES[name]
    layout = layout_of(TIER_POLICIES[model.head_dim], model.head_dim)
    assert layout is not None
    tier = layout.tiers[is_low]
    kv_heads = model.num_kv_heads
    batch = -(-ROWS // kv_heads)
    unit = tiers_tpu.tiling(layout, max(HEADS)).blocks * tier.tokens
    entries = -(-max(*HEADS, 4 * unit) // tier.tokens)

    def arguments(kvs: int) -> tuple[Any, ...]:
        query = jnp.zeros((batch, model.num_heads, model.head_dim), jnp.bfloat16)
        table = np.arange(batch * kv_heads * entries, dtype=np.int32).reshape(batch, kv_heads, entries)
        lengths = np.zeros((batch, kv_heads, 2), np.int32)
        lengths[..., int(is_low)] = kvs
        return query, jnp.asarray(table), jnp.asarray(lengths), jnp.full((batch,), 100_000, jnp.int32)

    def attend(pool: Any, query: Any, table: Any, lengths: Any, following: Any) -> Any:
        held = TieredKVs(pool=pool, block_table=table, lengths=lengths, layout=layout)
        observed = {"observe": SIGNIFICANCE, "next_position": following} if significance else {}
        return paged_attention(query, None, tiers=held, **observed)

    return Case(
        name=f"{tier.format}, {name}" + (", significance" if significance else ""),
        kernel="paged_attention_tiers",
        function=attend,
        pool=shape((POOL_BYTES // layout.block_bytes, layout.rows, 128), jnp.uint32),
        arguments=arguments,
        rows=batch * kv_heads,
        parts=of_heads(lambda kvs: -(-kvs // tier.tokens) * layout.block_bytes, unit),
    )


def prefill(name: str, chunk: int = CHUNK) -> Case:
    """A chunk of a prompt over what is cached of it. A tile: 512 KVs of either, under 512 query rows."""
    model = SHAPES[name]
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    batch, entries = 2, CONTEXT // BLOCK_SIZE

    def arguments(kvs: int) -> tuple[Any, ...]:
        query, new = (jnp.zeros((batch, chunk, n, head_dim), jnp.bfloat16) for n in (heads, kv_heads))
        table = np.arange(batch * kv_heads * entries, dtype=np.int32).reshape(batch, kv_heads, entries)
        return query, new, new, jnp.asarray(table), jnp.full((batch, kv_heads), kvs, jnp.int32)

    def attend(pool: Any, query: Any, key: Any, value: Any, table: Any, lengths: Any) -> Any:
        return prefill_attention(query, key, value, RawKVs(pool, table, lengths))[0]

    def flops(queries: float, kvs: float) -> Need:
        return Need(flops=2 * 2 * queries * kvs * head_dim * heads // kv_heads)

    few, many, keys = 4096, 8192, 512
    queries = 512 / (heads // kv_heads)
    causal = chunk * (chunk + 1) / 2
    return Case(
        name=f"prefill, {name}" + (f", {chunk:,} at once" if chunk != CHUNK else ""),
        kernel="prefill_attention",
        function=attend,
        pool=raw_pool(model),
        arguments=arguments,
        rows=batch * kv_heads,
        parts=(
            Part(
                name="cached tile",
                need=flops(queries, keys),
                kvs=keys,
                more=many,
                less=few,
                times=(many - few) / keys * chunk / queries,
            ),
            Part(name="own keys", need=Need(flops=flops(1, 1).flops * causal), kvs=chunk, more=0),
            Part(
                name=f"chunk after {many:,}",
                need=Need(flops=flops(1, 1).flops * (causal + chunk * many)),
                kvs=chunk + many,
                more=many,
            ),
        ),
    )


def moves(name: str, ratio: int = 8) -> Case:
    """The survivors of an eviction, evenly spread, into the blocks that stay."""
    model = SHAPES[name]
    entries, kept = CONTEXT // BLOCK_SIZE, CONTEXT // ratio
    pool = raw_pool(model)
    values = (pool.shape[0] * BLOCK_SIZE // 128, 128)
    block = BLOCK_SIZE * 2 * model.head_dim * 2

    def arguments(kvs: int) -> tuple[Any, ...]:
        stays, survives = np.arange(kvs) < kept, np.arange(kvs) % ratio == 0
        scores, positions = jnp.zeros(values, jnp.float32), jnp.zeros(values, jnp.int32)
        table = np.arange(MOVED_ROWS * entries, dtype=np.int32).reshape(MOVED_ROWS, entries)
        marks = (jnp.asarray(np.tile(marked, (MOVED_ROWS, 1))) for marked in (survives & ~stays, stays & ~survives))
        is_source, is_hole = marks
        return scores, positions, jnp.asarray(table), Moves(is_source=is_source, is_hole=is_hole)

    blocks = entries + kept // BLOCK_SIZE  # all are read, and those that stay written
    return Case(
        name=f"moves, {name}",
        kernel="move_kvs",
        function=move_kvs,
        pool=pool,
        arguments=arguments,
        rows=MOVED_ROWS,
        parts=(Part(name="head", need=Need(bytes=blocks * block), kvs=CONTEXT, more=CONTEXT),),
    )


def cases() -> Iterator[Case]:
    for name in ("llama-3.1-8b", "smollm2-135m"):
        yield decode(name)
        yield decode(name, observe=squared_mass)
        for is_low in (False, True):
            yield tiers(name, is_low=is_low)
            yield tiers(name, is_low=is_low, significance=True)
        yield prefill(name)
        yield prefill(name, LONG_CHUNK)
    yield moves("llama-3.1-8b")
