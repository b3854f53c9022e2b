"""New KVs into their slots as a TPU kernel: what is there is fetched, new rows are laid over it, and it goes back.

A row alone can't be copied into a tiled array, so the unit of a copy is a register's worth of rows (decoding, one new
KV a head) or a block (a chunk). Only units that are part old and part new are fetched. Many heads share a grid step, so
the latency of a copy is paid once for all of them.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu_tiles import SMEM_ENTRIES, UNCHECKED, rows_at_once
from pallas_kernels.tpu_values import check_pool, floor_div, sublanes

STEP_BYTES = 2 * 2**20
"""New KVs that one grid step lays out in VMEM."""


class Units(NamedTuple):
    """How a head's new KVs fall into units of ``size`` rows."""

    size: int
    a_head: int
    """Units that a head's new KVs may touch."""
    a_block: int
    heads_a_step: int


def write_blocks(
    pool: Array,
    key: Array,
    value: Array,
    block_table: Array,
    starts: Array,
    counts: Array,
    *,
    heads_a_step: int | None = None,
    smem_entries: int = SMEM_ENTRIES,
    interpret: Any = False,
) -> Array:
    """See ``api.write_blocks``; ``heads_a_step`` and ``smem_entries`` are for tests."""
    batch, length, kv_heads, head_dim = key.shape
    _, block_size, width = pool.shape
    rows = batch * kv_heads
    size = sublanes(pool.dtype) if length == 1 else block_size
    count = 1 if length == 1 else (length + size - 2) // size + 1
    a_step = heads_a_step or max(1, STEP_BYTES // (count * size * width * pool.dtype.itemsize))
    units = Units(size, count, block_size // size, min(a_step, rows))

    pad = ((0, 0), (0, 0), (0, 0), (0, width // 2 - head_dim))
    new = jnp.concatenate([jnp.pad(key, pad), jnp.pad(value, pad)], axis=-1).transpose(0, 2, 1, 3)
    new = new.reshape(rows, length, width).astype(pool.dtype)
    if length > 1:
        new = jnp.pad(new, ((0, 0), (0, count * size - length), (0, 0)))

    starts = starts.reshape(rows)
    unit = starts[:, None] // size + jnp.arange(count)
    entry = jnp.minimum(unit // units.a_block, block_table.shape[-1] - 1)
    block = jnp.take_along_axis(block_table.reshape(rows, -1), entry, axis=1)
    places = block * units.a_block + unit % units.a_block
    shifts, counts = starts % size, jnp.repeat(counts, kv_heads)

    at_once = rows_at_once(count + 2, smem_entries)
    for at in range(0, rows, at_once):
        part = slice(at, at + at_once)
        pool = _run(pool, new[part], places[part], shifts[part], counts[part], units, interpret)
    return pool


def check(pool: Array, head_dim: int) -> None:
    """Raises ValueError for what the kernel can't take."""
    check_pool(pool, head_dim)


def _run(pool: Array, new: Array, places: Array, shifts: Array, counts: Array, units: Units, interpret: Any) -> Array:
    """One call: new ``[rows, length, width]``, places ``i32[rows, units]``, shifts and counts ``i32[rows]``."""
    rows, length, width = new.shape
    a_step = units.heads_a_step
    pad = -rows % a_step
    new, places = jnp.pad(new, ((0, pad), (0, 0), (0, 0))), jnp.pad(places, ((0, pad), (0, 0)))
    of_new = pl.BlockSpec((a_step, length, width), lambda step, *_: (step, 0, 0))
    anywhere = pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        partial(_kernel, units=units),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=((rows + pad) // a_step,),
            in_specs=[of_new, anywhere],
            out_specs=anywhere,
            scratch_shapes=[
                pltpu.VMEM((a_step, units.a_head * units.size, width), pool.dtype),
                pltpu.SemaphoreType.DMA,
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        input_output_aliases={4: 0},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=32 * 2**20, **UNCHECKED),
        name="write_blocks",
        interpret=interpret,
    )(places.reshape(-1), jnp.pad(shifts, (0, pad)), jnp.pad(counts, (0, pad)), new, pool)


def _kernel(
    places: Any,
    shifts: Any,
    counts: Any,
    new: Any,
    pool: Any,
    written: Any,
    buffer: Any,
    read: Any,
    wrote: Any,
    *,
    units: Units,
) -> None:
    """``pool`` and ``written`` are the same memory."""
    first_row = pl.program_id(0) * units.heads_a_step

    def each_unit(visit: Any) -> None:
        """Calls ``visit(head of the step, unit, first new row, end of the new rows)`` for units that get something."""

        def of_unit(i: Array, _: None) -> None:
            head, unit = floor_div(i, units.a_head), lax.rem(i, jnp.int32(units.a_head))
            row = first_row + head
            begin = shifts[row] - unit * units.size
            end = jnp.minimum(begin + counts[row], units.size)
            begin = jnp.maximum(begin, 0)
            pl.when(begin < end)(partial(visit, head, unit, begin, end))

        lax.fori_loop(0, units.heads_a_step * units.a_head, of_unit, None)

    def in_pool(array: Any, head: Array, unit: Array) -> Any:
        place = places[(first_row + head) * units.a_head + unit]
        at = pl.multiple_of(lax.rem(place, jnp.int32(units.a_block)) * units.size, units.size)
        return array.at[floor_div(place, units.a_block), pl.ds(at, units.size)]

    def in_buffer(head: Array, unit: Array) -> Any:
        return buffer.at[head, pl.ds(pl.multiple_of(unit * units.size, units.size), units.size)]

    def fetch(head: Array, unit: Array, begin: Array, end: Array, *, wait: bool) -> None:
        @pl.when(end - begin < units.size)
        def _():
            copy = pltpu.make_async_copy(in_pool(pool, head, unit), in_buffer(head, unit), read)
            copy.wait() if wait else copy.start()

    def store(head: Array, unit: Array, begin: Array, end: Array, *, wait: bool) -> None:
        copy = pltpu.make_async_copy(in_buffer(head, unit), in_pool(written, head, unit), wrote)
        copy.wait() if wait else copy.start()

    def lay_over(head: Array, _: None) -> None:
        shift, count = shifts[first_row + head], counts[first_row + head]

        @pl.when(count > 0)
        def _():
            rows = new[head].astype(jnp.float32)  # packed rows can't be shifted one by one
            if rows.shape[0] > 1:
                rows = pltpu.roll(rows, shift, axis=0)
            index = lax.broadcasted_iota(jnp.int32, buffer.shape[1:], 0)
            is_new = (index >= shift) & (index < shift + count)
            buffer[head] = jnp.where(is_new, rows, buffer[head].astype(jnp.float32)).astype(buffer.dtype)

    each_unit(partial(fetch, wait=False))
    each_unit(partial(fetch, wait=True))
    lax.fori_loop(0, units.heads_a_step, lay_over, None)
    each_unit(partial(store, wait=False))
    each_unit(partial(store, wait=True))
