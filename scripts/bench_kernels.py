"""The operations on whatever device JAX finds, against the bandwidth of its own memory.

First a plain copy, which is what the memory can do; then each operation with the bytes that it must move, its time and
the share of the copy's bandwidth. Beside them, in the same run: the XLA reference, on a GPU jax's own paged attention
(uniform lengths), and torch's scaled_dot_product_attention over dense KVs where torch is installed. It measures and
doesn't judge: exit status 0. On a CPU the sizes are small, and the figures say little of anything but the CPU.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_moves import Moves, move_kvs
from pallas_kernels.block_writes import write_blocks
from pallas_kernels.dispatch import Implementation, block_low_step, block_tile
from pallas_kernels.paged_attention import RawKVs, TieredKVs, paged_attention
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.quantised_block import BlockLayout, Format, blocks


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The pool's KVs are those that all heads hold, ``context`` each on average."""

    batch: int
    kv_heads: int
    group: int
    head_dim: int
    context: int
    block_size: int
    chunk: int
    dtype: str

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def kv_bytes(self) -> int:
        """Of one KV: its K and its V."""
        return 2 * self.head_dim * jnp.dtype(self.dtype).itemsize


CPU_SIZES = Sizes(batch=4, kv_heads=2, group=4, head_dim=64, context=512, block_size=16, chunk=128, dtype="float32")
DEVICE_SIZES = Sizes(
    batch=32, kv_heads=8, group=4, head_dim=128, context=8192, block_size=32, chunk=512, dtype="bfloat16"
)


@dataclass(frozen=True, kw_only=True)
class Row:
    what: str
    by: str
    seconds: float | None
    """None: it did not run; ``note`` says why."""
    bytes: int
    """That any implementation must move."""
    note: str = ""


Operations = dict[str, dict[str, Callable[..., Any]]]


def operations(platform: str) -> Operations:
    """By operation and implementation. The kernels of a platform are tried on no other."""
    api = {"decode": paged_attention, "writes": write_blocks, "moves": move_kvs, "prefill": prefill_attention}
    own: dict[str, Implementation] = {"tpu": "mosaic_tpu", "gpu": "mosaic_gpu"}
    names: list[Implementation] = ["xla", own[platform]] if platform in own else ["xla"]
    return {what: {name: partial(call, implementation=name) for name in names} for what, call in api.items()}


def seconds(call: Callable[..., Any], *arguments: Any, repeats: int, carried: bool = False) -> float:
    """Of one call, when ``repeats`` are under way one after the other; the best of three times.

    ``carried``: the first result takes the place of the first argument, which the call is given to keep.
    """

    def run(times: int) -> None:
        nonlocal arguments
        result = None
        for _ in range(times):
            result = call(*arguments)
            if carried:
                arguments = (jax.tree.leaves(result)[0], *arguments[1:])
        jax.block_until_ready(result)

    run(2)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        run(repeats)
        best = min(best, (time.perf_counter() - began) / repeats)
    return best


def attempt(what: str, by: str, size: int, measure: Callable[[], float]) -> Row:
    """One figure; what this device or these packages can't run is said, not hidden."""
    try:
        return Row(what=what, by=by, seconds=measure(), bytes=size)
    except (ValueError, NotImplementedError, ImportError, RuntimeError) as error:  # XLA's errors are RuntimeErrors
        return Row(what=what, by=by, seconds=None, bytes=size, note=str(error).splitlines()[0][:120])


class Cached:
    """A pool in random order whose heads hold so many KVs each."""

    def __init__(self, sizes: Sizes, lengths: np.ndarray, rng: np.random.Generator):
        blocks = -(-lengths // sizes.block_size)
        ids = rng.permutation(int(blocks.sum())).astype(np.int32) + 1
        table = np.zeros((*lengths.shape, int(blocks.max()) + -(-sizes.chunk // sizes.block_size)), np.int32)
        used = 0
        for row in np.ndindex(lengths.shape):
            table[row][: blocks[row]] = ids[used : used + blocks[row]]
            used += blocks[row]
        shape = len(ids) + 1, sizes.block_size, 2 * sizes.head_dim
        self.pool = random_array(shape, sizes.dtype)
        self.raw = RawKVs(self.pool, jnp.asarray(table), jnp.asarray(lengths, jnp.int32))
        self.bytes = int(lengths.sum()) * sizes.kv_bytes


def random_array(shape: tuple[int, ...], dtype: str, seed: int = 0) -> jax.Array:
    return jax.jit(lambda: jax.random.normal(jax.random.key(seed), shape, jnp.dtype(dtype)))()


def skewed(sizes: Sizes, ratio: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths from 1 to ``ratio`` times the shortest, in random order, of the same total as uniform ones."""
    share = np.geomspace(1, ratio, sizes.batch * sizes.kv_heads)
    lengths = np.maximum(1, np.round(share / share.mean() * sizes.context)).astype(int)
    return rng.permutation(lengths).reshape(sizes.batch, sizes.kv_heads)


def copy_bandwidth(size: int, repeats: int) -> float:
    """Bytes a second, read and written, of adding one to so many bytes."""
    values = random_array((size // 4,), "float32")
    return 2 * values.nbytes / seconds(jax.jit(lambda x: x + 1), values, repeats=repeats)


def measure_decode(sizes: Sizes, found: Operations, repeats: int, ratio: int) -> Iterator[Row]:
    rng = np.random.default_rng(0)
    query = random_array((sizes.batch, sizes.heads, sizes.head_dim), sizes.dtype)
    uniform = np.full((sizes.batch, sizes.kv_heads), sizes.context)
    for name, lengths in (("uniform lengths", uniform), (f"lengths 1:{ratio}", skewed(sizes, ratio, rng))):
        cached = Cached(sizes, lengths, rng)
        arguments = query, cached.raw
        for by, call in found["decode"].items():
            timed = partial(seconds, jax.jit(call), *arguments, repeats=repeats)
            yield attempt(f"decode, {name}", by, cached.bytes, timed)
    for by, run in (("jax's paged_attention", jax_decode), ("torch's SDPA, dense KVs", torch_decode)):
        size = int(uniform.sum()) * sizes.kv_bytes
        yield attempt("decode, uniform lengths", by, size, partial(run, sizes, repeats))


def measure_tiers(sizes: Sizes, found: Operations, repeats: int) -> Iterator[Row]:
    """Decode attention over as many quantised KVs as ``measure_decode`` has in bfloat16 or float32."""
    query = random_array((sizes.batch, sizes.heads, sizes.head_dim), sizes.dtype)
    for name, high, low, share in (("K8V4", "K8V4", "K8V4", 1.0), ("half K8V4, half K4V2", "K8V4", "K4V2", 0.5)):
        layout = BlockLayout(
            head_dim=sizes.head_dim,
            high=Format.named(high),
            low=Format.named(low),
            tokens=128,
            tile=block_tile(),
            low_step=block_low_step(sizes.head_dim),
        )
        in_high = int(share * sizes.context)
        tiers = tiered_kvs(sizes, layout, (in_high, sizes.context - in_high))
        size = (tiers.pool.shape[0] - 1) * layout.block_bytes
        kvs = sizes.batch * sizes.kv_heads * sizes.context
        for by, call in found["decode"].items():

            def attend(query: jax.Array, tiers: TieredKVs, call: Any = call) -> jax.Array:
                return call(query, None, tiers=tiers)[0]

            timed = partial(seconds, jax.jit(attend), query, tiers, repeats=repeats)
            row = attempt(f"decode, {name}", by, size, timed)
            note = row.note or f"{size / (kvs * 4 * sizes.head_dim):.3f} of bfloat16's bytes"
            yield replace(row, note=note)


def tiered_kvs(sizes: Sizes, layout: BlockLayout, held: tuple[int, int]) -> TieredKVs:
    """Blocks in random order, all of a tier alike; each head holds so many KVs in the high and in the low tier."""
    rng, heads = np.random.default_rng(0), (sizes.batch, sizes.kv_heads)
    counts = [-(-n // tier.tokens) for n, tier in zip(held, layout.tiers, strict=True)]
    table, first = np.zeros((*heads, sum(counts)), np.int32), 1
    pool = [jnp.zeros((1, layout.words), jnp.uint32)]
    for count, tier, columns in zip(counts, layout.tiers, (table, table[..., ::-1]), strict=True):
        total = sizes.batch * sizes.kv_heads * count
        columns[..., :count] = (first + rng.permutation(total)).reshape(*heads, count)
        first += total
        key, value = (random_array((tier.tokens, sizes.head_dim), "float32", seed) for seed in range(2))
        tokens = blocks.Tokens(key, value, jnp.zeros(tier.tokens), jnp.zeros(tier.tokens, jnp.int32))
        pool.append(jnp.broadcast_to(blocks.encode(tokens, tier, layout.words), (total, layout.words)))
    return TieredKVs(
        pool=jnp.concatenate(pool).reshape(-1, layout.rows, 128),
        block_table=jnp.asarray(table),
        lengths=jnp.broadcast_to(jnp.array(held, jnp.int32), (*heads, 2)),
        layout=layout,
    )


def jax_decode(sizes: Sizes, repeats: int) -> float:
    """jax's own kernel: heads of one length, K and V in pages of their own."""
    if jax.default_backend() != "gpu":
        raise NotImplementedError("only for GPUs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import paged_attention as theirs
    pages = sizes.context // sizes.block_size
    shape = sizes.kv_heads, sizes.batch * pages, sizes.block_size, sizes.head_dim
    table = np.random.default_rng(0).permutation(sizes.batch * pages).reshape(sizes.batch, pages)
    query = random_array((sizes.batch, sizes.heads, sizes.head_dim), sizes.dtype)
    lengths = jnp.full(sizes.batch, sizes.context, jnp.int32)
    arguments = (
        query,
        random_array(shape, sizes.dtype),
        random_array(shape, sizes.dtype, 1),
        jnp.asarray(table),
        lengths,
    )
    return seconds(jax.jit(theirs.paged_attention), *arguments, repeats=repeats)


def torch_decode(sizes: Sizes, repeats: int) -> float:
    import torch

    where = "cuda" if torch.cuda.is_available() else "cpu"
    if where == "cpu" and jax.default_backend() != "cpu":
        raise NotImplementedError("this torch sees no such device")
    kind = getattr(torch, sizes.dtype)
    shape = sizes.batch, sizes.kv_heads, sizes.context, sizes.head_dim
    query = torch.randn(sizes.batch, sizes.heads, 1, sizes.head_dim, dtype=kind, device=where)
    key, value = (torch.randn(shape, dtype=kind, device=where) for _ in range(2))

    def call() -> None:
        with torch.inference_mode():
            for _ in range(repeats):
                torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
            if where == "cuda":
                torch.cuda.synchronize()

    call()
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        taken.append((time.perf_counter() - began) / repeats)
    return min(taken)


def measure_writes(sizes: Sizes, found: Operations, repeats: int) -> Iterator[Row]:
    for length in (1, sizes.chunk):
        rng = np.random.default_rng(0)
        cached = Cached(sizes, np.full((sizes.batch, sizes.kv_heads), sizes.chunk), rng)
        kv = random_array((sizes.batch, length, sizes.kv_heads, sizes.head_dim), sizes.dtype)
        starts, counts = jnp.zeros((sizes.batch, sizes.kv_heads), jnp.int32), jnp.full(sizes.batch, length, jnp.int32)
        size = 2 * sizes.batch * length * sizes.kv_heads * sizes.kv_bytes
        for by, call in found["writes"].items():
            jitted = jax.jit(call, donate_argnums=0)
            arguments = cached.pool + 0, kv, kv, cached.raw.block_table, starts, counts
            timed = partial(seconds, jitted, *arguments, repeats=repeats, carried=True)
            yield attempt(f"writes, {length} a head", by, size, timed)


def measure_moves(sizes: Sizes, found: Operations, repeats: int) -> Iterator[Row]:
    """A quarter of the KVs from the second half of their heads into the first."""
    rng = np.random.default_rng(0)
    cached = Cached(sizes, np.full((sizes.batch, sizes.kv_heads), sizes.context), rng)
    rows, kvs = sizes.batch * sizes.kv_heads, cached.raw.block_table.shape[-1] * sizes.block_size
    half = sizes.context // 2
    marks = np.zeros((2, rows, kvs), bool)
    for row in range(rows):
        marks[0, row, half + rng.permutation(half)[: half // 2]] = True
        marks[1, row, rng.permutation(half)[: half // 2]] = True
    moves = Moves(is_source=jnp.asarray(marks[0]), is_hole=jnp.asarray(marks[1]))
    values = -(-cached.pool.shape[0] * sizes.block_size // 128), 128
    size = 2 * rows * (half // 2) * (sizes.kv_bytes + 8)

    def call(pool: jax.Array, state: tuple[jax.Array, jax.Array], *rest: Any, move: Any) -> Any:
        pool, scores, positions = move(pool, *state, *rest)
        return pool, (scores, positions)

    for by, move in found["moves"].items():
        jitted = jax.jit(partial(call, move=move), donate_argnums=0)
        state = jnp.zeros(values, jnp.float32), jnp.zeros(values, jnp.int32)
        arguments = cached.pool + 0, state, cached.raw.block_table.reshape(rows, -1), moves
        timed = partial(seconds, jitted, *arguments, repeats=repeats, carried=True)
        yield attempt("moves, a quarter of the KVs", by, size, timed)


def measure_prefill(sizes: Sizes, found: Operations, repeats: int) -> Iterator[Row]:
    """One sequence's chunk over a full context; computing, not memory, is what it takes its time for."""
    cached = Cached(sizes, np.full((1, sizes.kv_heads), sizes.context), np.random.default_rng(0))
    query = random_array((1, sizes.chunk, sizes.heads, sizes.head_dim), sizes.dtype)
    kv = random_array((1, sizes.chunk, sizes.kv_heads, sizes.head_dim), sizes.dtype)
    pairs = sizes.chunk * sizes.context + sizes.chunk * (sizes.chunk + 1) // 2
    flops = 4 * sizes.heads * sizes.head_dim * pairs
    for by, call in found["prefill"].items():
        arguments = query, kv, kv, cached.raw
        size = cached.bytes + 2 * query.nbytes + 2 * kv.nbytes
        timed = partial(seconds, jax.jit(call), *arguments, repeats=repeats)
        row = attempt(f"prefill, {sizes.chunk} tokens after {sizes.context}", by, size, timed)
        rate = f"{flops / row.seconds / 1e12:.2f} TFLOP/s" if row.seconds else row.note
        yield Row(what=row.what, by=by, seconds=row.seconds, bytes=size, note=rate)


def print_row(row: Row, bandwidth: float) -> None:
    if row.seconds is None:
        print(f"| {row.what} | {row.by} | {row.bytes / 1e6:.2f} | not run | | | {row.note} |", flush=True)
        return
    rate = row.bytes / row.seconds
    figures = f"{1e3 * row.seconds:.3f} | {rate / 1e9:.1f} | {100 * rate / bandwidth:.0f} %"
    print(f"| {row.what} | {row.by} | {row.bytes / 1e6:.2f} | {figures} | {row.note} |", flush=True)


def main() -> None:
    platform = jax.default_backend()
    defaults = CPU_SIZES if platform == "cpu" else DEVICE_SIZES
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default: {value}")
    parser.add_argument("--skew", type=int, default=50, help="longest over shortest head (default: 50)")
    parser.add_argument("--repeats", type=int, default=3 if platform == "cpu" else 20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    sizes = Sizes(**{name: getattr(options, name) for name in asdict(defaults)})

    versions = [f"jax {version('jax')}"]
    try:
        versions.append(f"torch {version('torch')}")
    except PackageNotFoundError:
        versions.append("no torch")
    head = f"{date.today()}, {jax.devices()[0].device_kind}, {', '.join(versions)}, {sizes}"
    bandwidth = copy_bandwidth(2**26 if platform == "cpu" else 2**31, options.repeats)
    print(f"{head}\n\ncopy: {bandwidth / 1e9:.1f} GB/s, read and written\n")
    print("| what | by | MB it must move | ms | GB/s | of the copy | |\n| --- | --- | --- | --- | --- | --- | --- |")
    found, rows = operations(platform), []
    for measured in (
        measure_decode(sizes, found, options.repeats, options.skew),
        measure_tiers(sizes, found, options.repeats),
        measure_writes(sizes, found, options.repeats),
        measure_moves(sizes, found, options.repeats),
        measure_prefill(sizes, found, options.repeats),
    ):
        for row in measured:
            rows.append(row)
            print_row(row, bandwidth)
    if options.json:
        figures = {"run": head, "copy_bytes_a_second": bandwidth, "rows": [asdict(r) for r in rows]}
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
