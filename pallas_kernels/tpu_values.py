"""Inside a TPU kernel: arithmetic on registers of 128 lanes, and which pool rows the kernels can take."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

LANES = 128
MASKED = -1e30
"""A logit that counts for nothing; finite, so that differences of such logits are no NaN."""


class Lanes(NamedTuple):
    """Where K and V lie in a pool row, as the matrix unit takes them.

    Where both share a register's 128 lanes (head_dim 64), whole rows go to the matrix unit: the half that isn't wanted
    meets zeros, or is dropped afterwards. The unit has time to spare, and no lane is ever shuffled.
    """

    half: int
    """Lanes of K, and of V."""
    width: int
    """Lanes of a key operand, the row's first, and of a value operand, the row's last."""
    value_at: int
    """Where V begins in the product with a value operand."""


def lanes_of(pool: Array) -> Lanes:
    half = pool.shape[-1] // 2
    return Lanes(half, half, 0) if half % LANES == 0 else Lanes(half, 2 * half, half)


def as_column(row: Array) -> Array:
    """``[1, n]`` as ``[n, 1]``, in a kernel."""
    return jnp.transpose(jnp.broadcast_to(row, (8, row.shape[1])))[:, :1]


def as_row(column: Array) -> Array:
    """``[n, 1]`` as ``[1, n]``, in a kernel."""
    return jnp.transpose(jnp.broadcast_to(column, (column.shape[0], LANES)))[:1]


def product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """In a kernel, the product of two matrices over an axis of each, summed in float32, and exact where they are."""
    precision = lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def sublanes(dtype: jnp.dtype) -> int:
    """Rows of a register: what a copy must begin and end at."""
    return 8 * 4 // jnp.dtype(dtype).itemsize


def check_pool(pool: Array, head_dim: int) -> None:
    """Raises ValueError for a pool that these kernels can't read."""
    size, width = pool.shape[1:]
    packed = sublanes(pool.dtype)
    if width % LANES or width < 2 * head_dim:
        wanted = 2 * -(-head_dim // 64) * 64
        raise ValueError(
            f"on a TPU a pool row must be a multiple of {LANES} values wide: {pool.shape=}, {head_dim=}; "
            f"give the cache rows of {wanted} values, K and V padded to {wanted // 2} each"
        )
    if size % packed or LANES % size:
        raise ValueError(
            f"on a TPU a {pool.dtype} block must hold {packed} to {LANES} KVs, a power of two: {pool.shape=}"
        )


def floor_div(x: Array, y: int) -> Array:
    """Of what isn't negative: ``//`` asks about signs, and in a kernel each question is an instruction."""
    if y & (y - 1) == 0:
        return lax.shift_right_logical(x, jnp.int32(y.bit_length() - 1))
    return lax.div(x, jnp.int32(y))


def ceil_div(x: Array, y: int) -> Array:
    return floor_div(x + (y - 1), y)
