"""jax's own attention kernels for TPUs, as cases beside ours: Llama 3.1 8B's shape, with what they are tuned for."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from compile_tpu import BLOCK_SIZE, shape
from jax.experimental.pallas.ops.tpu import paged_attention as paged
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as ragged
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from models.shapes import SHAPES
from schedules.cases import HEADS, ROWS, Case, Need, Part, of_heads

MODEL = SHAPES["llama-3.1-8b"]
HEADS_OF_MODEL, KV_HEADS, HEAD_DIM = MODEL.num_heads, MODEL.num_kv_heads, MODEL.head_dim
KV_BYTES = 2 * 2 * HEAD_DIM
PAGES = 16
"""Of 64 KVs that are worked on at once."""


def paged_attention() -> Case:
    """A head after the other, pages of one head each: what ours is, too."""
    batch, pages = ROWS // KV_HEADS, max(HEADS) // BLOCK_SIZE
    pool = shape((KV_HEADS, 8192, BLOCK_SIZE, HEAD_DIM), jnp.bfloat16)

    def arguments(kvs: int) -> tuple[Any, ...]:
        query = jnp.zeros((batch, HEADS_OF_MODEL, HEAD_DIM), jnp.bfloat16)
        return query, jnp.full((batch,), kvs, jnp.int32), jnp.zeros((batch, pages), jnp.int32)

    def attend(pool: Any, query: Any, lengths: Any, table: Any) -> Any:
        keys, values = pool
        return paged.paged_attention(query, keys, values, lengths, table, pages_per_compute_block=PAGES)

    return Case(
        name="jax's paged_attention, llama-3.1-8b",
        kernel="paged_attention",
        function=attend,
        pool=(pool, pool),
        arguments=arguments,
        rows=ROWS,
        blocks_axis=1,
        parts=of_heads(lambda kvs: kvs * KV_BYTES, PAGES * BLOCK_SIZE),
    )


def ragged_paged_attention() -> Case:
    """All heads of a sequence at once, whose pages hold them all; 32 sequences' queries are a block."""
    batch, pages = 256, 8192 // BLOCK_SIZE
    pool = shape((8192, BLOCK_SIZE, 2 * KV_HEADS, HEAD_DIM), jnp.bfloat16)

    def arguments(kvs: int) -> tuple[Any, ...]:
        query = jnp.zeros((batch, HEADS_OF_MODEL, HEAD_DIM), jnp.bfloat16)
        lengths, table = jnp.full((batch,), kvs, jnp.int32), jnp.zeros((batch, pages), jnp.int32)
        return query, lengths, table, jnp.arange(batch + 1, dtype=jnp.int32), jnp.full((1,), batch, jnp.int32)

    def attend(pool: Any, *arguments: Any) -> Any:
        query, *rest = arguments
        return ragged.ragged_paged_attention(
            query, pool, *rest, num_kv_pages_per_block=PAGES, num_queries_per_block=32, vmem_limit_bytes=64 * 2**20
        )

    unit, tiles = PAGES * BLOCK_SIZE, 2
    return Case(
        name="jax's ragged_paged_attention, llama-3.1-8b",
        kernel="ragged_paged_attention_kernel",
        function=attend,
        pool=pool,
        arguments=arguments,
        rows=batch,
        parts=(
            Part(
                name="tile",
                need=Need(bytes=unit * KV_BYTES),
                kvs=unit,
                more=2 * tiles * unit,
                less=tiles * unit,
                times=tiles * KV_HEADS,
            ),
        ),
    )


def splash_attention() -> Case:
    """A prompt over as many keys, none of them masked; its pages aren't paged."""
    length, block, keys = 4096, 512, 1024
    kv = shape((KV_HEADS, length, HEAD_DIM), jnp.bfloat16)

    def arguments(_: int) -> tuple[Any, ...]:
        return (jnp.zeros((HEADS_OF_MODEL, length, HEAD_DIM), jnp.bfloat16),)

    def attend(kv: Any, query: Any) -> Any:
        mask = splash.MultiHeadMask([splash.FullMask((length, length)) for _ in range(HEADS_OF_MODEL)])
        sizes = splash.BlockSizes(block_q=block, block_kv=keys, block_kv_compute=block)
        attention = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)
        return attention(query, *kv)

    tile = Part(
        name="cached tile",
        need=Need(flops=2 * 2 * block * block * HEAD_DIM),
        kvs=block,
        more=length,
        times=length / block,  # with what a row of them begins and ends with
    )
    return Case(
        name="jax's splash_attention, llama-3.1-8b",
        kernel="splash_mha_fwd_no_residuals",
        function=attend,
        pool=(kv, kv),
        arguments=arguments,
        rows=HEADS_OF_MODEL * length // block,
        parts=(tile,),
    )


def peers() -> Iterator[Case]:
    yield paged_attention()
    yield ragged_paged_attention()
    yield splash_attention()
