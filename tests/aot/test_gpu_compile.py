"""Every GPU kernel, at the shapes of real models, through to an H200's machine code on a machine without one.

Compiling shows what an interpreter can't: operands that the copy engine or the tensor cores refuse, too much shared
memory, and a pool that is copied where it should be updated in place.
"""

import math
import re

import compile_tpu
import jax
import jax.numpy as jnp
import pytest
from targets import abstract_weights, product_of
from targets_gpu import compile_for_h200, why_not

from models.shapes import SHAPES
from pallas_kernels import use_implementation
from pallas_kernels.block_moves import Moves
from pallas_kernels.block_moves import gpu as moves_gpu
from pallas_kernels.block_writes import gpu as writes_gpu
from pallas_kernels.paged_attention import RawKVs, Significance, TieredKVs, gpu_tiers
from pallas_kernels.paged_attention import gpu as paged_gpu
from pallas_kernels.prefill_attention import ObservedQueries
from pallas_kernels.prefill_attention import gpu as prefill_gpu
from pallas_kernels.quantised_block import BlockLayout, Format
from pallas_kernels.quantised_writes import gpu as quantised_writes_gpu

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
in_place = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="kernels that write in place need jax 0.11")
every_model = pytest.mark.parametrize("model", SHAPES.values(), ids=SHAPES)

BATCH, CONTEXT, SLOTS = 8, 8192, 2**20
"""Sequences, tokens of each, and token slots of the pool."""
Array = jax.ShapeDtypeStruct


def square(p):
    return p * p


def square_mass(p):
    return square(p).sum(-2)


def pool_of(model, size, dtype=jnp.bfloat16):
    return Array((SLOTS // size, size, 2 * model.head_dim), dtype)


def table_of(model, size, batch=BATCH):
    return Array((batch, model.num_kv_heads, CONTEXT // size), jnp.int32)


def of_heads(model, batch=BATCH):
    return Array((batch, model.num_kv_heads), jnp.int32)


def assert_no_copy(program, pool, *, written):
    """The pool is updated in place, where it is written, and nothing of its size lies beside it."""
    size, memory = pool.size * pool.dtype.itemsize, program.memory_analysis()
    assert memory.temp_size_in_bytes < size / 4
    if written:
        assert memory.alias_size_in_bytes >= size


def assert_not_copied(program, array):
    """No instruction copies an array of that size, be it flat or in rows."""
    copies = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", program.as_text())
    sizes = [math.prod(map(int, shape.split(","))) for shape in copies]
    assert array.size not in sizes


def compile_decode(model, size, *, dtype=jnp.bfloat16, observe=square_mass):
    pool, query = pool_of(model, size, dtype), Array((BATCH, model.num_heads, model.head_dim), dtype)

    def attend(query, raw):
        return paged_gpu.paged_attention(query, raw, observe=observe)

    program = compile_for_h200(attend, query, RawKVs(pool, table_of(model, size), of_heads(model)))
    assert_no_copy(program, pool, written=False)


@every_model
def test_decode(model):
    compile_decode(model, 32)


@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_decode_with_every_block_size(size, dtype):
    compile_decode(SHAPES["llama-3.1-8b"], size, dtype=dtype)
    compile_decode(SHAPES["smollm2-135m"], size, dtype=dtype, observe=None)


@in_place
@every_model
@pytest.mark.parametrize("length", [1, 512])
def test_writes(model, length):
    pool, kv = pool_of(model, 32), Array((BATCH, length, model.num_kv_heads, model.head_dim), jnp.bfloat16)
    ids = table_of(model, 32), of_heads(model), Array((BATCH,), jnp.int32)
    program = compile_for_h200(writes_gpu.write_blocks, pool, kv, kv, *ids, donate=(0,))
    assert_no_copy(program, pool, written=True)


@in_place
@every_model
def test_moves(model):
    pool, rows = pool_of(model, 32), model.num_layers * model.num_kv_heads
    values, marks = (SLOTS // 128 + 1, 128), Array((rows, CONTEXT), bool)  # no list is as long as the scores
    arguments = pool, Array(values, jnp.float32), Array(values, jnp.int32), Array((rows, CONTEXT // 32), jnp.int32)
    moves = Moves(is_source=marks, is_hole=marks)
    program = compile_for_h200(moves_gpu.move_kvs, *arguments, moves, donate=(0, 1, 2))
    assert_no_copy(program, pool, written=True)
    assert_not_copied(program, arguments[1])
    a_list = 4 * marks.size // 2  # the most that can move
    assert program.memory_analysis().temp_size_in_bytes < 6 * a_list


def compile_prefill(model, size, *, observed=32, batch=2, length=512):
    pool, query = pool_of(model, size), Array((batch, length, model.num_heads, model.head_dim), jnp.bfloat16)
    kv = Array((batch, length, model.num_kv_heads, model.head_dim), jnp.bfloat16)
    seen = ObservedQueries(
        rows=Array((batch, observed), jnp.int32),
        positions=Array((batch, length), jnp.int32),
        cached_positions=Array((batch, model.num_kv_heads, CONTEXT), jnp.int32),
        function=square,
        buffer=8,
    )

    def attend(*arguments):
        *arguments, seen = arguments
        return prefill_gpu.prefill_attention(*arguments, observe=seen)

    raw = RawKVs(pool, table_of(model, size, batch), of_heads(model, batch))
    program = compile_for_h200(attend, query, kv, kv, raw, seen if observed else None)
    assert_no_copy(program, pool, written=False)


@every_model
def test_prefill(model):
    compile_prefill(model, 32)


@pytest.mark.parametrize("size", [16, 64, 128])
def test_prefill_with_every_block_size(size):
    compile_prefill(SHAPES["llama-3.2-1b"], size, length=300)


def test_prefill_unobserved():
    compile_prefill(SHAPES["llama-3.1-8b"], 16, observed=0)


@pytest.mark.parametrize("program", list(compile_tpu.tiered_kernels(SHAPES["smollm2-135m"]))[1:], ids=lambda p: p.name)
def test_writes_into_quantised_tiers_in_plain_xla(program):
    """Which jax 0.10 takes."""
    compiled = compile_for_h200(program.function, *program.arguments, donate=program.donate)
    assert_no_copy(compiled, program.pool, written=True)


def compile_tiered(program):
    with use_implementation("mosaic_gpu"):
        compiled = compile_for_h200(program.function, *program.arguments, donate=program.donate)
    assert_no_copy(compiled, program.pool, written=True)


both_head_dims = pytest.mark.parametrize("model", ["smollm2-135m", "llama-3.1-8b"])


@both_head_dims
def test_attention_over_quantised_tiers(model):
    attention, *_ = compile_tpu.tiered_kernels(SHAPES[model])
    compile_tiered(attention)


@in_place
@both_head_dims
def test_writes_into_quantised_tiers(model):
    _, *writes = compile_tpu.tiered_kernels(SHAPES[model])
    for program in writes:
        compile_tiered(program)


@pytest.mark.parametrize(
    ("dtype", "high", "low"), [(jnp.bfloat16, "K4V4", "K1V1"), (jnp.float32, "K8V4/1,2", "K4V2/2,8")]
)
def test_attention_over_other_formats_beside_unquantised_kvs(dtype, high, low):
    model = SHAPES["llama-3.1-8b"]
    layout = BlockLayout(head_dim=model.head_dim, high=Format.named(high), low=Format.named(low))
    pool = Array((SLOTS // 64, layout.rows, 128), jnp.uint32)
    query = Array((BATCH, model.num_heads, model.head_dim), dtype)
    lengths = Array((*of_heads(model).shape, 2), jnp.int32)
    tiers = TieredKVs(pool=pool, block_table=table_of(model, 64), lengths=lengths, layout=layout)
    raw = RawKVs(pool_of(model, 16, dtype), Array((BATCH, model.num_kv_heads, 4), jnp.int32), of_heads(model))

    program = compile_for_h200(gpu_tiers.paged_attention, query, raw, tiers)
    assert_no_copy(program, pool, written=False)


def layers_of(model, attend):
    """Ten steps through four layers that write the pool and read it, one pool for all."""

    def run(pool, x, tables, lengths, counts):
        def layer(state, ids):
            pool, x = state
            table, length = ids
            kv = x[..., : model.num_kv_heads, :]
            kv = kv[:, None] if kv.ndim == 3 else kv
            pool = writes_gpu.write_blocks(pool, kv, kv, table, length, counts)
            return (pool, x + attend(x, kv, pool, table, length)), None

        def unrolled(_, state):
            for index in range(4):
                state, _ = layer(state, (tables[index], lengths[index]))
            return state

        state = jax.lax.fori_loop(0, 5, unrolled, (pool, x))
        return jax.lax.fori_loop(0, 5, lambda _, s: jax.lax.scan(layer, s, (tables, lengths))[0], state)

    return run


def decode_layer(x, kv, pool, table, length):
    return paged_gpu.paged_attention(x, RawKVs(pool, table, length + 1))[0]


def prefill_layer(x, kv, pool, table, length):
    return prefill_gpu.prefill_attention(x, kv, kv, RawKVs(pool, table, length))[0]


@in_place
@pytest.mark.parametrize(("attend", "tokens"), [(decode_layer, ()), (prefill_layer, (512,))])
def test_layers_in_a_loop_share_one_pool(attend, tokens):
    model = SHAPES["llama-3.1-8b"]
    pool, x = pool_of(model, 32), Array((BATCH, *tokens, model.num_heads, model.head_dim), jnp.bfloat16)
    ids = Array((4, *table_of(model, 32).shape), jnp.int32), Array((4, *of_heads(model).shape), jnp.int32)
    program = compile_for_h200(layers_of(model, attend), pool, x, *ids, Array((BATCH,), jnp.int32), donate=(0,))
    assert_no_copy(program, pool, written=True)


@in_place
def test_layers_in_a_loop_share_one_pool_of_quantised_blocks():
    """Each writes its new KVs, attends, adds to the scores, and knows its weakest KVs."""
    model, layers = SHAPES["llama-3.1-8b"], 4
    layout = BlockLayout(head_dim=model.head_dim, high=Format.named("K8V4"), low=Format.named("K4V2"))
    rows, heads = BATCH * model.num_kv_heads, (BATCH, model.num_kv_heads)
    significance = Significance(observe=lambda p: p.max(-2), value=lambda scores, positions, following: scores)

    def layer(state, ids):
        pool, x = state
        table, lengths, blocks, offsets = ids
        new = x[:, : model.num_kv_heads].reshape(rows, -1)
        pool = quantised_writes_gpu.write_kvs(pool, new, new, offsets, blocks, offsets, layout)
        pool = quantised_writes_gpu.lower_kvs(pool, blocks, offsets, blocks, offsets, layout)
        tiers = TieredKVs(pool=pool, block_table=table, lengths=lengths, layout=layout)
        observed = {"observe": significance, "next_position": lengths[:, 0, 0]}
        out, (pool, weakest) = gpu_tiers.paged_attention(x, None, tiers, **observed)
        return (pool, x + out), weakest

    def run(pool, x, *ids):
        return jax.lax.fori_loop(0, 5, lambda _, state: jax.lax.scan(layer, state, ids)[0], (pool, x))

    pool = Array((SLOTS // 16, layout.rows, 128), jnp.uint32)
    index, x = Array((layers, rows), jnp.int32), Array((BATCH, model.num_heads, model.head_dim), jnp.bfloat16)
    ids = Array((layers, *heads, CONTEXT // 64), jnp.int32), Array((layers, *heads, 2), jnp.int32), index, index
    program = compile_for_h200(run, pool, x, *ids, donate=(0,))
    assert_no_copy(program, pool, written=True)


@pytest.mark.parametrize("rows", [32, 512])
@pytest.mark.parametrize("kind", abstract_weights())
def test_weights_as_codes_are_never_widened_whole(kind, rows):
    held = abstract_weights()[kind]
    program = compile_for_h200(product_of, held, Array((rows, held.shape[0]), jnp.bfloat16))
    assert program.memory_analysis().temp_size_in_bytes < held.shape[0] * held.shape[1] * 2 / 4
