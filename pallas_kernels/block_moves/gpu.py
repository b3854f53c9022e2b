"""Survivors into the holes, for NVIDIA Hopper GPUs: K and V in place by a kernel, the rest by XLA.

The moves of all rows are one flat list. A fixed number of programs goes through it, so the cost follows the KVs that
move; each keeps the loads of a whole batch under way. A KV is short, and survivors lie scattered: loads by all threads
serve that better than the copy engine, which likes long rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_moves.types import Moves
from pallas_kernels.block_moves.xla import ranked_slots
from pallas_kernels.gpu_warpgroup import LANE, check_in_place, check_pool, load

BATCH = 32
"""KVs that a program moves at once: they and their slots fit the registers."""
PROGRAMS = {2: 5 * 132, 4: 4 * 132}
"""By the bytes of a value: as many as the 132 multiprocessors of a large Hopper GPU have registers for at once."""


def move_kvs(
    pool: Array,
    scores: Array,
    positions: Array,
    block_table: Array,
    moves: Moves,
    *,
    programs: int | None = None,
    interpret: Any = False,
) -> tuple[Array, Array, Array]:
    """See ``api.move_kvs``; ``interpret`` takes ``InterpretGPUParams``, ``programs`` how many there are at most."""
    block_size, width = pool.shape[1:]
    source, count = ranked_slots(moves.is_source, block_table, block_size)
    hole, _ = ranked_slots(moves.is_hole, block_table, block_size)
    size = -(-source.shape[0] // BATCH) * BATCH
    source, hole = (jnp.pad(slots.astype(jnp.int32), (0, size - slots.shape[0])) for slots in (source, hole))
    kernel = plgpu.kernel(
        move_kernel(block_size, width, bool(interpret)),
        grid=(min(programs or PROGRAMS[pool.dtype.itemsize], size // BATCH),),
        grid_names=("program",),
        # A thread stores what it loaded itself, and no source is a hole: the threads need not wait for each other.
        compiler_params=plgpu.CompilerParams(lowering_semantics=LANE, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    ref = jax.new_ref(pool)
    kernel(ref, source, hole, count.astype(jnp.int32)[None])

    def move(values: Array) -> Array:
        """One scatter: a loop's turn costs more on a GPU than the whole list."""
        moved = lax.optimization_barrier(values.reshape(-1)[source])  # else it reads while it writes, from a copy
        target = jnp.where(jnp.arange(size) < count, hole, values.size)
        return values.reshape(-1).at[target].set(moved, mode="drop").reshape(values.shape)

    return jax.freeze(ref), move(scores), move(positions)


def check(pool: Array) -> None:
    """Raises ValueError for what the kernel can't take."""
    check_pool(pool)
    check_in_place()


def move_kernel(block_size: int, width: int, interpret: bool) -> Callable[..., None]:
    """Every so many batches of moves: all their KVs into registers, then all out."""
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=width // 128)

    def kernel(
        pool_ref: Any,  # [blocks, block_size, 2 * head_dim], moved in place
        source_ref: Any,  # i32[moves] token slots
        hole_ref: Any,  # i32[moves]
        count_ref: Any,  # i32[1] moves that exist; the rest of the lists is slot 0
    ) -> None:
        program, programs = lax.axis_index("program"), jnp.int32(lax.axis_size("program"))
        count = count_ref[0]

        def place(slot: Array) -> tuple[Array, Array]:
            return lax.div(slot, jnp.int32(block_size)), lax.rem(slot, jnp.int32(block_size))

        def move(i: Array, _: None) -> None:
            first = (program + i * programs) * BATCH
            # All slots are asked for before the first is used, and all KVs before the first is stored: one wait each.
            sources = [source_ref[first + m] for m in range(BATCH)]
            holes = [hole_ref[first + m] for m in range(BATCH)]
            rows = [load(pool_ref.at[place(slot)], layout, interpret) for slot in sources]
            for m in range(BATCH):

                @pl.when(first + m < count)
                def _(m: int = m):
                    pool_ref[place(holes[m])] = rows[m]

        batches = lax.div(count + BATCH - 1, jnp.int32(BATCH))
        lax.fori_loop(0, lax.div(batches - program + programs - 1, programs), move, None)

    return kernel
