"""Single KVs into quantised blocks in plain XLA: gathers and scatters of a KV's words."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.quantised_block import BlockLayout
from pallas_kernels.quantised_block.blocks import Tokens, read_tokens, write_tokens


def write_kvs(
    pool: Array, key: Array, value: Array, positions: Array, blocks: Array, offsets: Array, layout: BlockLayout
) -> Array:
    """See ``api.write_kvs``."""
    new = Tokens(key.astype(jnp.float32), value.astype(jnp.float32), jnp.zeros(blocks.shape, jnp.float32), positions)
    words = pool.reshape(pool.shape[0], -1)
    return write_tokens(words, blocks, offsets, new, layout.tiers[0]).reshape(pool.shape)


def lower_kvs(
    pool: Array, from_blocks: Array, from_offsets: Array, to_blocks: Array, to_offsets: Array, layout: BlockLayout
) -> Array:
    """See ``api.lower_kvs``."""
    high, low = layout.tiers
    words = pool.reshape(pool.shape[0], -1)
    kvs = read_tokens(words, from_blocks, from_offsets, high, layout.head_dim)
    return write_tokens(words, to_blocks, to_offsets, kvs, low).reshape(pool.shape)
