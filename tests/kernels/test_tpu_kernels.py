"""TPU kernels in the interpreter against the XLA references, which are tested against float64 elsewhere."""

import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import eager as eager
from interpreted import interpreter as interpreter
from test_paged_attention import paged, squared_mass

from pallas_kernels import block_moves, block_writes, paged_attention, prefill_attention
from pallas_kernels.block_moves import tpu as moves_tpu
from pallas_kernels.block_writes import tpu as writes_tpu
from pallas_kernels.kvs import RawKVs
from pallas_kernels.paged_attention import tpu as paged_tpu
from pallas_kernels.prefill_attention import tpu as prefill_tpu
from pallas_kernels.tpu_tiles import Tiling

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}
SKEWED = np.array([[75, 0, 1], [2, 33, 16]])
"""One head full, the others nearly or quite empty; ends within and at the end of a block and of a tile."""


def tiles_of(table, size, *, blocks=2, buffers=3):
    return Tiling(block_size=size, blocks=blocks, max_blocks=table.shape[-1], buffers=buffers)


def bits(array):
    array = np.asarray(array)
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def assert_close(got, wanted, dtype):
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(wanted, np.float32), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


def pool_of(rng, lengths, *, head_dim, half=None, size=16, dtype=jnp.float32, spare=0):
    """Random KVs at the first ``head_dim`` values of each half, zeros after them, NaN in every slot without a KV."""
    pool, table, _ = paged(rng, lengths, head_dim=head_dim, block_size=size, dtype=dtype)
    half = half or head_dim
    wide = np.zeros((*pool.shape[:2], 2 * half), np.float32)
    wide[..., :head_dim], wide[..., half : half + head_dim] = np.split(np.asarray(pool, np.float32), 2, axis=-1)
    return jnp.asarray(wide, dtype), table[..., : table.shape[-1] - 3 + spare]


def check_decode(
    interpreter, *, lengths=SKEWED, group=3, head_dim=64, half=None, size=16, dtype=jnp.float32, **options
):
    rng = np.random.default_rng(group + head_dim + size)
    pool, table = pool_of(rng, lengths, head_dim=head_dim, half=half, size=size, dtype=dtype, spare=1)
    batch, kv_heads = lengths.shape
    query = jnp.asarray(rng.standard_normal((batch, kv_heads * group, head_dim)), dtype)
    arguments = query, RawKVs(pool, table, jnp.asarray(lengths))
    options = {"observe": squared_mass, **options}
    tiles = options.pop("tiles", None) or tiles_of(table, size)
    got, masses = interpreter.run(paged_tpu.paged_attention, *arguments, tiles=tiles, **options)
    wanted, wanted_masses = paged_attention.paged_attention(
        *arguments, observe=options["observe"], implementation="xla"
    )
    assert got.dtype == wanted.dtype
    assert_close(got, wanted, dtype)
    assert (masses is None) == (wanted_masses is None)
    if masses is not None:
        held = np.arange(masses.shape[-1]) < lengths[..., None]  # past a length they mean nothing
        assert_close(np.asarray(masses)[held], np.asarray(wanted_masses)[held], dtype)
        written = np.arange(masses.shape[-1]) < -(-lengths[..., None] // (2 * tiles.kvs)) * 2 * tiles.kvs
        assert np.isnan(np.asarray(masses)[~written]).all()
    assert (np.asarray(got, np.float32).reshape(batch, kv_heads, group, -1)[lengths == 0] == 0).all()


@pytest.mark.parametrize(
    ("group", "head_dim", "dtype"),
    [(1, 64, jnp.float32), (3, 64, jnp.bfloat16), (4, 128, jnp.bfloat16), (7, 128, jnp.float32), (8, 64, jnp.float32)],
)
def test_decode(eager, group, head_dim, dtype):
    check_decode(eager, group=group, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("size", [32, 128])
def test_decode_with_larger_blocks(eager, size):
    check_decode(eager, lengths=np.array([[0, size + 1], [2 * size, 3]]), size=size, dtype=jnp.bfloat16)


def test_decode_of_a_256_wide_head(eager):
    check_decode(eager, head_dim=256, lengths=SKEWED[:1])


def test_decode_of_a_padded_head(eager):
    check_decode(eager, head_dim=96, half=128, lengths=SKEWED[:1])


def test_decode_unobserved(interpreter):
    check_decode(interpreter, observe=None)


def test_decode_of_empty_heads_alone(eager):
    check_decode(eager, lengths=np.zeros((2, 2), int))


def test_decode_with_tiles_as_it_would_choose_them(interpreter):
    check_decode(interpreter, tiles=Tiling(block_size=16, blocks=8, max_blocks=6), lengths=SKEWED)


def test_decode_of_heads_shorter_than_a_quarter_of_a_tile(interpreter):
    """They, and the last tile of 520 KVs, are worked on a quarter of a tile at a time."""
    tiles = Tiling(block_size=128, blocks=4, max_blocks=6, buffers=3)
    check_decode(interpreter, tiles=tiles, lengths=np.array([[100, 128, 520], [300, 129, 0]]), size=128)


def test_decode_of_tiles_in_all_sizes(eager, monkeypatch):
    """Tiles of 512 KVs, worked on as 128, 256 or 512 in any order, in steps of 3 rows, of which some are empty."""
    monkeypatch.setattr(paged_tpu, "ROWS_A_STEP", 3)
    lengths = np.random.default_rng(5).choice([0, 5, 128, 200, 400, 512, 700], (2, 12))
    tiles = Tiling(block_size=128, blocks=4, max_blocks=7, buffers=3)
    check_decode(eager, tiles=tiles, lengths=lengths, size=128, group=1)


def test_a_head_that_is_no_number_leaves_the_others_alone(eager):
    rng = np.random.default_rng(0)
    lengths = np.array([[40, 20, 0, 33]])
    pool, table = pool_of(rng, lengths, head_dim=64)
    query = jnp.asarray(rng.standard_normal((1, 4, 64)), jnp.float32)
    options = {"tiles": tiles_of(table, 16), "observe": squared_mass}
    broken = pool.at[table[0, 0, 1], 3].set(jnp.nan)
    wanted, got = (
        eager.run(paged_tpu.paged_attention, query, RawKVs(x, table, jnp.asarray(lengths)), **options)
        for x in (pool, broken)
    )
    assert np.isnan(np.asarray(got[0][:, 0])).all()
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one[:, 1:], other[:, 1:])


def test_decode_over_a_table_too_large_for_one_call(interpreter):
    """Five rows of 6 entries where SMEM is said to hold 12: three calls, of which the last has one row."""
    check_decode(interpreter, lengths=np.array([[75, 0, 1, 2, 33]]), smem_entries=12)


def check_prefill(
    interpreter,
    *,
    cached=SKEWED[:, :2],
    length=20,
    group=2,
    head_dim=64,
    dtype=jnp.float32,
    buffer=0,
    unseen=(),
    **options,
):
    """``unseen``: sequences of which nobody is observed."""
    rng = np.random.default_rng(length + head_dim)
    pool, table = pool_of(rng, cached, head_dim=head_dim, half=options.pop("half", None), dtype=dtype, spare=1)
    batch, kv_heads = cached.shape
    query = jnp.asarray(rng.standard_normal((batch, length, kv_heads * group, head_dim)), dtype)
    key, value = (jnp.asarray(rng.standard_normal((batch, length, kv_heads, head_dim)), dtype) for _ in range(2))
    rows = np.array([[length - 1, 0, -1], [-1, length // 2, length - 2]], np.int32)
    rows[list(unseen)] = -1
    observed = prefill_attention.ObservedQueries(
        rows=jnp.asarray(rows),
        positions=jnp.asarray(np.array([[100], [400]]) + np.arange(length), jnp.int32),
        cached_positions=jnp.asarray(rng.integers(0, 120, (batch, kv_heads, table.shape[-1] * 16)), jnp.int32),
        function=lambda p: p * p,
        buffer=buffer,
    )
    arguments = query, key, value, RawKVs(pool, table, jnp.asarray(cached))
    got, masses = interpreter.run(
        prefill_tpu.prefill_attention,
        *arguments,
        observe=observed,
        tiles=tiles_of(table, 16),
        query_rows=16 * group,
        **options,
    )
    wanted, wanted_masses = prefill_attention.prefill_attention(*arguments, observe=observed, implementation="xla")
    assert_close(got, wanted, dtype)
    for one, other in zip(masses, wanted_masses, strict=True):
        assert_close(one, other, dtype)


@pytest.mark.parametrize(
    ("group", "head_dim", "dtype"), [(1, 64, jnp.bfloat16), (3, 64, jnp.float32), (4, 128, jnp.bfloat16)]
)
def test_prefill(eager, group, head_dim, dtype):
    check_prefill(eager, group=group, head_dim=head_dim, dtype=dtype)


def test_prefill_of_several_blocks(interpreter):
    """Three blocks of queries, of which the last two see earlier ones' keys; the last is part-filled."""
    check_prefill(interpreter, length=37, cached=SKEWED[:, :1])


def test_prefill_of_a_long_chunk(interpreter):
    """Two spans of 128 queries, so the cached tiles are streamed twice."""
    check_prefill(interpreter, length=150, cached=SKEWED[:, :1], group=1)


@pytest.mark.parametrize("length", [2, 16])
def test_prefill_of_short_chunks(eager, length):
    check_prefill(eager, length=length, cached=SKEWED[:, :1])


def test_prefill_into_an_empty_cache(eager):
    check_prefill(eager, cached=np.zeros((2, 1), int))


def test_prefill_observed_but_for_the_nearest_keys(eager):
    check_prefill(eager, buffer=7, cached=SKEWED[:, :1])


@pytest.mark.parametrize("unseen", [(0,), (0, 1)])
def test_prefill_that_is_observed_in_part(interpreter, unseen):
    check_prefill(interpreter, unseen=unseen, length=5)


def test_prefill_of_a_padded_head(eager):
    check_prefill(eager, head_dim=96, half=128, cached=SKEWED[:, :1])


def test_prefill_over_a_table_too_large_for_one_call(interpreter):
    check_prefill(interpreter, smem_entries=18)


def test_prefill_that_nobody_observes(eager):
    rng = np.random.default_rng(0)
    pool, table = pool_of(rng, SKEWED[:1, :1], head_dim=64)
    query, key, value = (jnp.asarray(rng.standard_normal((1, 5, 1, 64)), jnp.float32) for _ in range(3))
    arguments = query, key, value, RawKVs(pool, table, jnp.asarray(SKEWED[:1, :1]))
    got, none = eager.run(prefill_tpu.prefill_attention, *arguments, tiles=tiles_of(table, 16))
    assert none is None
    assert_close(got, prefill_attention.prefill_attention(*arguments, implementation="xla")[0], jnp.float32)


def check_writes(interpreter, *, length, size=16, head_dim=64, half=None, dtype=jnp.float32, heads=2, **options):
    rng = np.random.default_rng(length)
    max_blocks = 2 - (-length // size)
    blocks = 1 + 3 * heads * max_blocks
    pool = jnp.asarray(rng.standard_normal((blocks, size, 2 * (half or head_dim))), dtype)
    table = jnp.asarray(1 + rng.permutation(blocks - 1).reshape(3, heads, max_blocks), jnp.int32)
    key, value = (jnp.asarray(rng.standard_normal((3, length, heads, head_dim)), jnp.float32) for _ in range(2))
    starts = jnp.asarray(rng.integers(0, max_blocks * size - length + 1, (3, heads)), jnp.int32)
    counts = jnp.array([length, 0, max(length - 5, 1)], jnp.int32)
    arguments = pool, key, value, table, starts, counts
    got = interpreter.run(writes_tpu.write_blocks, *arguments, **options)
    wanted = block_writes.write_blocks(*arguments, implementation="xla")
    np.testing.assert_array_equal(bits(got)[1:], bits(wanted)[1:])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("length", "size"), [(1, 32), (37, 16), (5, 128)])
def test_writes(interpreter, length, size, dtype):
    check_writes(interpreter, length=length, size=size, dtype=dtype)


def test_writes_in_several_steps_and_calls(interpreter):
    """Six heads, four a step; then three entries a head where SMEM is said to hold six."""
    check_writes(interpreter, length=1, heads_a_step=4)
    check_writes(interpreter, length=1, smem_entries=6)


def test_writes_of_a_padded_head(eager):
    check_writes(eager, length=3, head_dim=96, half=128)


def check_moves(interpreter, *, counts, max_blocks=8, size=16, width=128, dtype=jnp.float32, **options):
    rng = np.random.default_rng(len(counts))
    rows, kvs = len(counts), max_blocks * size
    blocks = 1 + rows * max_blocks
    pool = jnp.asarray(rng.standard_normal((blocks, size, width)), dtype)
    scores = rng.standard_normal((-(-blocks * size // 128), 128)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.2] = np.nan
    positions = rng.permutation(scores.size).reshape(scores.shape).astype(np.int32)
    table = 1 + rng.permutation(blocks - 1).reshape(rows, max_blocks).astype(np.int32)
    is_source, is_hole = np.zeros((rows, kvs), bool), np.zeros((rows, kvs), bool)
    for row, count in enumerate(counts):
        least = -(-count // size)
        end = size * rng.integers(least, max_blocks - least + 1)
        is_hole[row, rng.permutation(end)[:count]] = True
        is_source[row, end + rng.permutation(kvs - end)[:count]] = True
        # What holds neither must not be touched: past a head's end the table may name another head's block.
        last = max(np.flatnonzero(is_source[row] | is_hole[row]), default=-1) // size
        table[row, last + 1 :] = table[(row + 1) % rows, 0]
    moves = block_moves.Moves(is_source=jnp.asarray(is_source), is_hole=jnp.asarray(is_hole))
    arguments = pool, jnp.asarray(scores), jnp.asarray(positions), jnp.asarray(table), moves
    options = {"tiles": tiles_of(table, size), **options}
    got = interpreter.run(moves_tpu.move_kvs, *arguments, **options)
    wanted = block_moves.move_kvs(*arguments, implementation="xla")
    np.testing.assert_array_equal(bits(got[0])[1:], bits(wanted[0])[1:])
    for one, other in zip(got[1:], wanted[1:], strict=True):
        np.testing.assert_array_equal(bits(one).reshape(-1)[size:], bits(other).reshape(-1)[size:])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_moves(interpreter, dtype):
    check_moves(interpreter, counts=[0, 31, 64, 1], dtype=dtype)


def test_moves_of_larger_blocks_and_rows(eager):
    check_moves(eager, counts=[50, 7], max_blocks=5, size=32, width=256, dtype=jnp.bfloat16)


def test_moves_with_tiles_as_it_would_choose_them(interpreter):
    check_moves(interpreter, counts=[40, 0, 17], tiles=None)


def test_no_moves(eager):
    check_moves(eager, counts=[0, 0])


def test_moves_over_a_table_too_large_for_one_call(interpreter):
    check_moves(interpreter, counts=[9, 30, 2], max_blocks=6, smem_entries=40)


@pytest.mark.parametrize(
    ("shape", "dtype", "head_dim", "message"),
    [
        ((4, 16, 192), jnp.float32, 96, r"multiple of 128.*rows of 256 values, K and V padded to 128"),
        ((4, 8, 128), jnp.bfloat16, 64, "must hold 16 to 128 KVs"),
        ((4, 256, 128), jnp.float32, 64, "must hold 8 to 128 KVs"),
    ],
)
def test_a_pool_that_fills_no_registers_is_refused(shape, dtype, head_dim, message):
    table, lengths = jnp.zeros((1, 1, 2), jnp.int32), jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match=message):
        paged_attention.paged_attention(
            jnp.zeros((1, 1, head_dim)), RawKVs(jnp.zeros(shape, dtype), table, lengths), implementation="mosaic_tpu"
        )


def test_a_table_row_that_no_call_can_take_is_refused():
    table, lengths = jnp.zeros((1, 1, 200_000), jnp.int32), jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="200000 entries of 131072; use larger blocks"):
        paged_attention.paged_attention(
            jnp.zeros((1, 1, 64)), RawKVs(jnp.zeros((4, 16, 128)), table, lengths), implementation="mosaic_tpu"
        )
