"""GPU kernels against the XLA references, which are tested against float64 elsewhere: in the interpreter, or on a GPU.

``JAX_PLATFORMS=cuda pytest tests/kernels/test_gpu_kernels.py tests/kernels/test_gpu_tiers.py`` runs them
on the Hopper GPU that is there.

Kernels that write in place need jax 0.11. The prefill kernel's three warpgroups wait for each other, and the
interpreter gives each a thread of XLA's pool, which has one a core: its tests run in a process with a larger pool.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public in jax 0.11
from test_paged_attention import paged, squared_mass

from pallas_kernels import block_moves, block_writes, paged_attention, prefill_attention
from pallas_kernels.block_moves import gpu as moves_gpu
from pallas_kernels.block_writes import gpu as writes_gpu
from pallas_kernels.gpu_warpgroup import MASKED
from pallas_kernels.kvs import RawKVs
from pallas_kernels.paged_attention import gpu as paged_gpu
from pallas_kernels.paged_attention import gpu_cuda_cores, gpu_merge, gpu_segments, gpu_tensor_cores
from pallas_kernels.prefill_attention import gpu as prefill_gpu

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}
SKEWED = np.array([[300, 0, 1], [2, 65, 16]])
"""One head long, the others nearly or quite empty; ends within and at the end of a block and of a tile."""
ON_GPU = jax.default_backend() == "gpu"
in_place = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="kernels that write in place need jax 0.11")
with_threads = pytest.mark.skipif(
    not ON_GPU and "NPROC" not in os.environ, reason="run by test_prefill_where_xla_has_threads"
)


@pytest.fixture
def run():
    """Runs a kernel in the interpreter with scratch full of NaN, and fails where two accesses race; or on a GPU."""

    def on_gpu(kernel, *arguments, detect_races=True, **options):
        return jax.block_until_ready(kernel(*arguments, interpret=False, **options))

    def interpret(kernel, *arguments, detect_races=True, **options):
        params = InterpretGPUParams(detect_races=detect_races, uninitialized_memory="nan")
        results = jax.block_until_ready(kernel(*arguments, interpret=params, **options))
        assert not (detect_races and interpret_pallas_call.get_races().races_found)
        return results

    if ON_GPU:
        with jax.default_matmul_precision("highest"):  # also of the references: else they multiply in tf32
            yield on_gpu
        return
    yield interpret
    interpret_pallas_call.reset_gpu_interpret_mode_state()


def assert_close(got, wanted, dtype):
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(np.float32(got), np.float32(wanted), atol=tolerance, rtol=tolerance)


def pool_of(rng, lengths, *, head_dim, half=None, size=16, dtype=jnp.float32):
    """Random KVs, NaN in every slot without one, and ids far outside the pool past each head's last block."""
    pool, table, _ = paged(rng, lengths, head_dim=head_dim, block_size=size, dtype=dtype)
    wide = np.zeros((*pool.shape[:2], 2, half or head_dim), np.float32)
    wide[..., :head_dim] = np.float32(pool).reshape(*pool.shape[:2], 2, head_dim)
    past = np.arange(table.shape[-1]) >= -(-lengths // size)[..., None]
    poison = rng.choice([-(2**30), 2**30], table.shape)
    return jnp.asarray(wide.reshape(*pool.shape[:2], -1), dtype), jnp.where(past, poison, table).astype(jnp.int32)


def check_decode(run, *, lengths=SKEWED, group=3, head_dim=64, half=None, size=16, dtype=jnp.float32, observed=True):
    rng = np.random.default_rng(group + head_dim + size)
    pool, table = pool_of(rng, lengths, head_dim=head_dim, half=half, size=size, dtype=dtype)
    batch, kv_heads = lengths.shape
    query = jnp.asarray(rng.standard_normal((batch, kv_heads * group, head_dim)), dtype)
    arguments = query, RawKVs(pool, table, jnp.asarray(lengths))
    observe = squared_mass if observed else None
    got, masses = run(paged_gpu.paged_attention, *arguments, observe=observe)
    wanted, wanted_masses = paged_attention.paged_attention(*arguments, observe=observe, implementation="xla")
    assert got.dtype == wanted.dtype
    assert_close(got, wanted, dtype)
    assert (masses is None) == (not observed)
    if observed:
        assert_close(masses, wanted_masses, dtype)
        assert (np.asarray(masses)[np.asarray(wanted_masses) == 0] == 0).all()
    assert (np.float32(got).reshape(batch, kv_heads, group, -1)[lengths == 0] == 0).all()


@pytest.mark.parametrize(
    ("group", "head_dim", "dtype"),
    [(1, 64, jnp.float32), (3, 64, jnp.bfloat16), (4, 128, jnp.bfloat16), (7, 128, jnp.float32), (8, 64, jnp.bfloat16)],
)
def test_decode(run, group, head_dim, dtype):
    check_decode(run, group=group, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_decode_with_larger_blocks(run, size):
    check_decode(run, lengths=np.array([[0, size + 1], [2 * size, 3]]), size=size, dtype=jnp.bfloat16)


def test_decode_of_a_padded_head(run):
    check_decode(run, head_dim=96, half=128, lengths=SKEWED[:1])


def test_decode_unobserved(run):
    check_decode(run, observed=False)


def test_decode_of_empty_heads_alone(run):
    check_decode(run, lengths=np.zeros((2, 2), int))


def test_a_long_head_is_cut_into_segments():
    lengths, tile = jnp.array([0, 40_000, 1, 129]), 64
    work = gpu_segments.plan_work(lengths, 65_536, tile)
    row, first, count, _ = np.asarray(work.table).T
    tiles = -(-np.asarray(lengths) // tile)
    for r in range(4):
        mine = (row == r) & (count > 0)
        assert count[mine].sum() == tiles[r]
        assert (first[mine] == np.cumsum(count[mine]) - count[mine]).all()
        assert (np.flatnonzero(mine) == np.arange(0 if r == 0 else work.end[r - 1], work.end[r])).all()
    assert count.max() == gpu_segments.MIN_TILES


def test_segments_grow_with_what_is_held_so_that_their_number_stays():
    work = gpu_segments.plan_work(jnp.full(64, 100_000), 131_072, 64)
    count = np.asarray(work.table)[:, 2]
    assert count.sum() == 64 * -(-100_000 // 64)
    assert gpu_segments.SEGMENTS // 2 < (count > 0).sum() <= gpu_segments.SEGMENTS + 64


@pytest.mark.parametrize(("axis", "layout"), [(0, gpu_cuda_cores.LAYOUT), (1, gpu_tensor_cores.LAYOUT)])
def test_segments_are_joined_by_row(run, axis, layout):
    rng = np.random.default_rng()
    end = np.cumsum([0, 1, gpu_merge.TURN, 0, 2 * gpu_merge.TURN + 3, 0])
    shape = (end[-1] + 2, 8, 64)
    output, maximum = rng.standard_normal(shape), 30 * rng.standard_normal(shape[:2])
    total = rng.random(shape[:2]) + 0.5
    for array in (output, maximum, total):
        array[end[-1] :] = np.nan  # no program writes there
    given = np.moveaxis(output, 1, 1 + axis), maximum, total
    options = {"axis": axis, "layout": layout}
    got = run(gpu_merge.merge, jnp.asarray(end, jnp.int32), *(jnp.asarray(x, jnp.float32) for x in given), **options)
    for row, last in enumerate(end):
        mine = slice(end[row - 1] if row else 0, last)
        weight = np.exp2(maximum[mine] - maximum[mine].max(0, initial=MASKED))
        whole = (total[mine] * weight).sum(0)
        wanted = (output[mine] * weight[..., None]).sum(0) / np.maximum(whole, 1e-30)[:, None]
        assert_close(np.moveaxis(got[0][row], axis, 0), wanted, jnp.float32)
        assert_close(got[1][row], maximum[mine].max(0, initial=MASKED), jnp.float32)
        assert_close(got[2][row], whole, jnp.float32)


@pytest.mark.parametrize(
    ("pool", "group", "message"),
    [
        ((4, 8, 128), 2, r"BLOCK_SIZES.*\(4, 8, 128\)"),
        ((4, 16, 192), 2, r"\(128, 256\) values.*\(4, 16, 192\)"),
        ((4, 16, 128), 9, "1 to 8 query heads.*group=9"),
    ],
)
def test_what_decode_cannot_take_is_refused(pool, group, message):
    query = jnp.zeros((1, group, 64))
    raw = RawKVs(jnp.zeros(pool), jnp.zeros((1, 1, 2), jnp.int32), jnp.ones((1, 1), jnp.int32))
    with pytest.raises(ValueError, match=message):
        paged_attention.paged_attention(query, raw, implementation="mosaic_gpu")


def check_writes(run, *, length, counts, head_dim=64, half=None, size=16, dtype=jnp.float32):
    rng = np.random.default_rng(length)
    batch, kv_heads, max_blocks = len(counts), 2, 5
    blocks = batch * kv_heads * max_blocks + 1
    pool = jnp.asarray(rng.standard_normal((blocks, size, 2 * (half or head_dim))), dtype)
    key, value = (jnp.asarray(rng.standard_normal((batch, length, kv_heads, head_dim)), dtype) for _ in range(2))
    table = 1 + rng.permutation(blocks - 1).reshape(batch, kv_heads, max_blocks)
    starts = rng.integers(0, max_blocks * size - length, (batch, kv_heads))
    past = np.arange(max_blocks) > ((starts + np.array(counts)[:, None] - 1) // size)[..., None]
    table = np.where(past, 2**30, table)
    arguments = (pool, key, value, *(jnp.asarray(x, jnp.int32) for x in (table, starts, counts)))
    got = run(jax.jit(writes_gpu.write_blocks, static_argnames="interpret"), *arguments)
    wanted = block_writes.write_blocks(*arguments, implementation="xla")
    np.testing.assert_array_equal(np.float32(got)[1:], np.float32(wanted)[1:])


@in_place
@pytest.mark.parametrize(("length", "counts"), [(1, [1, 0, 1]), (7, [7, 3]), (19, [2, 19]), (32, [32, 17])])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_writes(run, length, counts, dtype):
    check_writes(run, length=length, counts=counts, dtype=dtype)


@in_place
def test_writes_of_a_padded_head(run):
    check_writes(run, length=2, counts=[2, 1], head_dim=96, half=128, size=32)


def bits(array):
    array = np.asarray(array)
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


@in_place
@pytest.mark.parametrize(
    ("counts", "dtype"), [([40, 0, 21], jnp.float32), ([0, 0, 0], jnp.float32), ([1, 48, 32], jnp.bfloat16)]
)
def test_moves(run, counts, dtype):
    rng = np.random.default_rng(sum(counts))
    rows, max_blocks, size = len(counts), 6, 16
    blocks = rows * max_blocks + 1
    pool = jnp.asarray(rng.standard_normal((blocks, size, 128)), dtype)
    values = -(-blocks * size // 128) * 128
    scores = jnp.asarray(rng.standard_normal(values), jnp.float32).reshape(-1, 128)
    positions = jnp.asarray(rng.permutation(values), jnp.int32).reshape(-1, 128)
    table = jnp.asarray(1 + rng.permutation(blocks - 1).reshape(rows, max_blocks), jnp.int32)
    is_source, is_hole = np.zeros((2, rows, max_blocks * size), bool)
    for row, count in enumerate(counts):
        is_hole[row, rng.permutation(max_blocks * size // 2)[:count]] = True
        is_source[row, max_blocks * size // 2 + rng.permutation(max_blocks * size // 2)[:count]] = True
    moves = block_moves.Moves(is_source=jnp.asarray(is_source), is_hole=jnp.asarray(is_hole))
    arguments = pool, scores, positions, table, moves
    got = run(jax.jit(moves_gpu.move_kvs, static_argnames=("interpret", "programs")), *arguments, programs=2)
    wanted = block_moves.move_kvs(*arguments, implementation="xla")
    for one, other, width in zip(got, wanted, (pool.shape[2], 1, 1), strict=True):
        one, other = (bits(x).reshape(-1, width)[size:] for x in (one, other))
        np.testing.assert_array_equal(one, other)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="jax 0.11 updates in place")
def test_jax_that_would_copy_the_pool_is_told_what_to_upgrade():
    pool, ids = jnp.zeros((3, 16, 128)), jnp.zeros((1, 1), jnp.int32)
    kv, values, none = jnp.zeros((1, 1, 1, 64)), jnp.zeros((1, 128)), jnp.zeros((1, 16), bool)
    moves = block_moves.Moves(is_source=none, is_hole=none)
    with pytest.raises(ValueError, match=r"needs jax >= 0\.11 .*upgrade"):
        block_writes.write_blocks(pool, kv, kv, ids[None], ids, ids[0], implementation="mosaic_gpu")
    with pytest.raises(ValueError, match=r"needs jax >= 0\.11 .*upgrade"):
        block_moves.move_kvs(pool, values, values, ids, moves, implementation="mosaic_gpu")


def check_prefill(run, *, cached, length, group=2, head_dim=64, half=None, size=16, dtype=None, buffer=0):
    dtype = dtype or (jnp.bfloat16 if ON_GPU else jnp.float32)  # float32 is the interpreter's alone
    rng = np.random.default_rng(length + head_dim)
    pool, table = pool_of(rng, cached, head_dim=head_dim, half=half, size=size, dtype=dtype)
    batch, kv_heads = cached.shape
    query = jnp.asarray(rng.standard_normal((batch, length, kv_heads * group, head_dim)), dtype)
    key, value = (jnp.asarray(rng.standard_normal((batch, length, kv_heads, head_dim)), dtype) for _ in range(2))
    observed = prefill_attention.ObservedQueries(
        rows=jnp.asarray([[length - 1, 0, -1], [-1, length // 2, length - 2]][:batch], jnp.int32),
        positions=jnp.asarray(np.array([[100], [400]])[:batch] + np.arange(length), jnp.int32),
        cached_positions=jnp.asarray(rng.integers(0, 120, (batch, kv_heads, table.shape[-1] * size)), jnp.int32),
        function=lambda p: p * p,
        buffer=buffer,
    )
    arguments = query, key, value, RawKVs(pool, table, jnp.asarray(cached))
    # Three threads' reads and writes look like races to it though a barrier lies between: only values are compared.
    got, masses = run(prefill_gpu.prefill_attention, *arguments, observe=observed, detect_races=False)
    wanted, wanted_masses = prefill_attention.prefill_attention(*arguments, observe=observed, implementation="xla")
    assert got.dtype == wanted.dtype
    assert_close(got, wanted, dtype)
    for one, other in zip(masses, wanted_masses, strict=True):
        assert_close(one, other, dtype)


@with_threads
def test_prefill_over_tails_alone(run):
    check_prefill(run, cached=np.array([[0, 127]]), length=3)


@in_place  # for its speed: jax 0.10's interpreter takes ten times as long
@with_threads
@pytest.mark.parametrize(("buffer", "length"), [(0, 20), (15, 140)])
def test_prefill_over_whole_tiles_and_tails(run, buffer, length):
    check_prefill(run, cached=np.array([[128, 1], [300, 0]]), length=length, buffer=buffer)


@in_place
@with_threads
def test_prefill_in_bfloat16(run):
    check_prefill(run, cached=np.array([[200, 256]]), length=40, head_dim=128, size=32, group=1, dtype=jnp.bfloat16)


@in_place
@with_threads
def test_prefill_of_a_padded_head(run):
    check_prefill(run, cached=np.array([[0, 130]]), length=9, head_dim=96, half=128, size=128, group=1)


@pytest.mark.skipif(ON_GPU or "NPROC" in os.environ, reason="this is the process with more threads")
def test_prefill_where_xla_has_threads():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "test_prefill", __file__]
    done = subprocess.run(command, env={**os.environ, "NPROC": "16"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


def test_a_float32_pool_is_refused_by_the_tensor_cores():
    query, kv, ids = jnp.zeros((1, 1, 2, 64)), jnp.zeros((1, 1, 1, 64)), jnp.zeros((1, 1), jnp.int32)
    raw = RawKVs(jnp.zeros((3, 16, 128)), ids[None], ids)
    with pytest.raises(ValueError, match="bfloat16, not float32"):
        prefill_attention.prefill_attention(query, kv, kv, raw, implementation="mosaic_gpu")
