"""K and V in the pool: rows of floating-point numbers, or of their bits where XLA can't leave the pool where it is.

On a CPU XLA before that of jax 0.11 gathers and scatters bfloat16 in float32, on a copy of the whole array. There a
pool of bfloat16 is kept as 16-bit whole numbers, and only the rows that are read or written are taken for bfloat16.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.dispatch import choose

BITS = jnp.uint16
IN_BOUNDS = "promise_in_bounds"
"""How to index what a table names: it is a block of the pool."""


def pool_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """How a pool of such numbers is to be kept here: ``uint16`` stands for the bits of bfloat16."""
    copies = jax.default_backend() == "cpu" and jax.__version_info__ < (0, 11) and choose(None).implementation == "xla"
    return jnp.dtype(BITS) if copies and dtype == jnp.bfloat16 else jnp.dtype(dtype)


def read_rows(rows: Array) -> Array:
    """Rows gathered from a pool, as float32."""
    rows = lax.bitcast_convert_type(rows, jnp.bfloat16) if rows.dtype == BITS else rows
    return rows.astype(jnp.float32)


def to_rows(values: Array, dtype: jnp.dtype) -> Array:
    """Values as a pool of that dtype keeps them."""
    if dtype == BITS:
        return lax.bitcast_convert_type(values.astype(jnp.bfloat16), BITS)
    return values.astype(dtype)
