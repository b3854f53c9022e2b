"""What the kernels for NVIDIA GPUs share: what they take, and what a warpgroup (128 threads) does with it."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import memref_fold
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref

untyped: Any = plgpu
"""For what jax 0.10 lacks, and what jax 0.12's types call abstract."""
ROWS = 64
"""Rows of the left operand that one instruction of the tensor cores takes."""
LANE = plgpu.LoweringSemantics.Lane
"""Said each time: the default changed between jax 0.10 and 0.11."""
WIDTHS = (128, 256)
"""Values of a pool row: K beside V, 64 or 128 each."""
MASKED = -1e30
"""A logit that counts for nothing; finite, so that a maximum over nothing is no NaN."""
BLOCK_SIZES = (16, 32, 64, 128)
IN_PLACE = (0, 11)
"""First jax version whose mutable arrays alias a kernel's argument inside jit."""


def check_pool(pool: Array) -> None:
    """Raises ValueError for a pool whose rows the kernels can't take."""
    if pool.shape[2] not in WIDTHS:
        raise ValueError(f"GPU kernels take pool rows of {WIDTHS} values, not {pool.shape=}; use implementation='xla'")
    if pool.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"GPU kernels take a pool of float32 or bfloat16, not {pool.dtype}; use implementation='xla'")


def check_block_size(pool: Array) -> None:
    """Raises ValueError for blocks that don't fill, or fit, the kernels' tiles."""
    if pool.shape[1] not in BLOCK_SIZES:
        raise ValueError(f"GPU kernels take {BLOCK_SIZES=}, not {pool.shape=}; use implementation='xla'")


def check_in_place() -> None:
    """Raises ValueError for a jax that would copy the pool."""
    if jax.__version_info__ < IN_PLACE:
        raise ValueError(
            f"GPU kernels write in place, which needs jax >= 0.11 (Python >= 3.12), not {jax.__version__}: "
            "upgrade, or use implementation='xla'"
        )


def load(ref: Any, layout: Any, interpret: bool) -> Array:
    """Into registers laid out so; the interpreter has no layouts."""
    if interpret:
        return ref[...]
    index = (None,) if jax.__version_info__ < (0, 11) else ()  # jax 0.10 wants one, 0.11 deprecates it
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def store(ref: Any, value: Array, interpret: bool) -> None:
    """From registers to the GPU's memory in whatever layout, though it fill no whole cache lines."""
    if interpret or jax.__version_info__ < (0, 12):  # which has a function for it, and refuses the plain spelling
        ref[...] = value
    else:
        untyped.store(ref, value, optimized=False)


def laid(x: Array, layout: Any, interpret: bool) -> Array:
    """The same values, laid out so over the threads."""
    return x if interpret else plgpu.layout_cast(x, layout)


def iota(shape: tuple[int, int], axis: int, interpret: bool) -> Array:
    """Indices along an axis, laid out as the tensor cores give their results."""
    if interpret:
        return lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def tiled(dtype: Any, interpret: bool) -> tuple[Any, ...]:
    """How the tensor cores want their operands in shared memory."""
    if interpret:
        return ()
    return untyped.TilingTransform((8, 128 // dtype.itemsize)), untyped.SwizzleTransform(128)


def product(a: Any, b_ref: Any, interpret: bool, *, transpose: str = "", start: Array | None = None) -> Array:
    """``start + a @ b`` in float32 on the tensor cores.

    The interpreter knows neither accumulators that begin at a value nor operands in registers: it multiplies plainly.

    Args:
      a: a reference, or an array in registers.
      b_ref: a reference.
      interpret: whether the interpreter runs it.
      transpose: which of the references hold their matrix transposed: ``""``, ``"b"`` or ``"ab"``.
      start: what to add to.
    """
    if interpret:
        left, right = (a if isinstance(a, jax.Array) else a[...]), b_ref[...]
        left, right = (left.T if "a" in transpose else left), (right.T if "b" in transpose else right)
        result = jnp.dot(left, right, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        return result if start is None else start + result
    a = a.transpose((1, 0)) if "a" in transpose else a
    b_ref = b_ref.transpose((1, 0)) if "b" in transpose else b_ref
    if start is not None:
        accumulate = pl.run_state(lambda acc: plgpu.wgmma(acc, a, b_ref))
        return cast(Array, accumulate(plgpu.WGMMAAccumulatorRef.init(start)))

    def multiply(acc: Any) -> Array:
        plgpu.wgmma(acc, a, b_ref)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], b_ref.shape[1]), jnp.float32))


def gather(ref: Any, start: Array, layout: Any, interpret: bool, *, axis: int | None = None) -> Array:
    """Elements of a reference that is read as one line; each thread reads its own.

    Args:
      ref: a reference.
      start: ``i32[...]`` which element, laid out as the result is to be.
      layout: how that is.
      interpret: whether the interpreter runs it.
      axis: along which to count on from ``start``, if any: a compiler sees better so what lies side by side.
    """
    if interpret:
        index = start if axis is None else start + lax.broadcasted_iota(jnp.int32, start.shape, axis)
        return ref[...].reshape(-1)[index]

    def read(_: Any, ref: ir.Value, start: Any) -> Any:
        line = memref_fold(ref, 0, len(ir.MemRefType(ref.type).shape))

        def element(at: ir.Value, place: tuple[ir.Value, ...]) -> ir.Value:
            at = arith.index_cast(ir.IndexType.get(), at)
            return memref.load(line, [at if axis is None else arith.addi(at, place[axis])])

        return start.foreach(element, create_array=True, is_signed=False)

    result = plgpu.ShapeDtypeStruct(start.shape, ref.dtype, layout=layout)
    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout), return_type=result)
    return inline(read)(ref, start)
