"""Quantised blocks and single KVs in them: the XLA code against numpy, to the bit, and the TPU kernel against it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import eager as eager
from interpreted import interpreter as interpreter
from tiered import LAYOUTS, block_of, layout_of

from pallas_kernels.quantised_block import BlockLayout, Format, blocks
from pallas_kernels.quantised_block.patches import take
from pallas_kernels.quantised_writes import lower_kvs, tpu, write_kvs

BLOCKS, KVS = 9, 4
seeds = given(seed=st.integers(0, 2**32 - 1))
few = settings(max_examples=3, deadline=None)


def garbage(rng, layout):
    return rng.integers(0, 2**32, (BLOCKS, layout.rows, 128), dtype=np.uint32)


def vectors(rng, *shape):
    """Of all sizes, from below what half precision has normal numbers for; one of equal values."""
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 3, (*shape[:-1], 1))
    x.reshape(-1, shape[-1])[0] = x.flat[0]
    return x.astype(np.float32)


def new_kvs(rng, layout):
    """Arguments of ``write_kvs``, the last KV for the null block."""
    into = np.append(1 + rng.permutation(BLOCKS - 1)[: KVS - 1], 0).astype(np.int32)
    offsets = rng.integers(0, layout.tiers[0].tokens, KVS).astype(np.int32)
    key, value = vectors(rng, KVS, layout.head_dim), vectors(rng, KVS, layout.head_dim)
    return key, value, rng.integers(0, 9999, KVS).astype(np.int32), into, offsets


def lowered(rng, layout):
    """A pool with valid KVs in some high slots, and arguments of ``lower_kvs``, the last KV for the null block."""
    pool, ids = garbage(rng, layout), 1 + rng.permutation(BLOCKS - 1).astype(np.int32)
    source, into = ids[:KVS], np.append(ids[KVS : 2 * KVS - 1], 0).astype(np.int32)
    offsets, to = (rng.integers(0, tier.tokens, KVS).astype(np.int32) for tier in layout.tiers)
    for block, offset in zip(source, offsets, strict=True):
        key, value = vectors(rng, 2, layout.head_dim)
        block_of(pool, block, layout, 0).put(offset, key, value, rng.random(), rng.integers(0, 9999))
    return pool, source, offsets, into, to


@pytest.mark.parametrize("name", LAYOUTS)
@few
@seeds
def test_blocks_against_numpy(name, seed):
    """Whole blocks, written and read, and single KVs read."""
    rng, layout = np.random.default_rng(seed), LAYOUTS[name]
    for tier, segments in enumerate(layout.tiers):
        n = segments.tokens
        kvs = blocks.Tokens(
            vectors(rng, 2, n, layout.head_dim),
            vectors(rng, 2, n, layout.head_dim),
            rng.standard_normal((2, n)).astype(np.float32),
            rng.integers(0, 9999, (2, n)).astype(np.int32),
        )
        pool = np.zeros((2, layout.rows, 128), np.uint32)
        for block in range(2):
            for i in range(n):
                block_of(pool, block, layout, tier).put(i, *(x[block, i] for x in kvs))
        words = pool.reshape(2, -1)
        np.testing.assert_array_equal(encode(blocks.Tokens(*map(jnp.asarray, kvs)), segments, layout.words), words)
        decoded = decode(words, segments, layout.head_dim)
        which, offsets = np.array([1, 0, 1]), rng.integers(0, n, 3)
        single = blocks.read_tokens(jnp.asarray(words), which, offsets, segments, layout.head_dim)
        for block in range(2):
            wanted = block_of(pool, block, layout, tier).read(n)
            for got, other in zip(decoded, wanted, strict=True):
                np.testing.assert_array_equal(got[block], other)
        for got, whole in zip(single, decoded, strict=True):
            np.testing.assert_array_equal(got, whole[which, offsets])
        if 128 % layout.head_dim == 0:
            taken = take(jnp.asarray(pool), which, offsets, segments, layout.head_dim)
            for got, wanted in zip(taken, single, strict=True):
                np.testing.assert_array_equal(got, wanted)


encode = jax.jit(blocks.encode, static_argnums=(1, 2))
decode = jax.jit(blocks.decode, static_argnums=(1, 2))
write = jax.jit(partial(write_kvs, implementation="xla"), static_argnums=6)
lower = jax.jit(partial(lower_kvs, implementation="xla"), static_argnums=5)


@pytest.mark.parametrize("name", LAYOUTS)
@few
@seeds
def test_new_kvs_against_numpy(name, seed):
    rng, layout = np.random.default_rng(seed), LAYOUTS[name]
    pool, kvs = garbage(rng, layout), new_kvs(rng, layout)
    got = write(jnp.asarray(pool), *map(jnp.asarray, kvs), layout)
    for key, value, position, block, offset in zip(*kvs, strict=True):
        block_of(pool, block, layout, 0).put(offset, key, value, 0.0, position)
    np.testing.assert_array_equal(np.asarray(got)[1:], pool[1:])


@pytest.mark.parametrize("name", LAYOUTS)
@few
@seeds
def test_lowered_kvs_against_numpy(name, seed):
    rng, layout = np.random.default_rng(seed), LAYOUTS[name]
    pool, *slots = lowered(rng, layout)
    got = lower(jnp.asarray(pool), *map(jnp.asarray, slots), layout)
    for source, offset, block, to in zip(*slots, strict=True):
        block_of(pool, block, layout, 1).put(to, *block_of(pool, source, layout, 0).get(offset))
    np.testing.assert_array_equal(np.asarray(got)[1:], pool[1:])


@pytest.mark.parametrize("operation", ["write", "lower"])
def test_the_reference_copies_no_pool(operation):
    rng, layout = np.random.default_rng(), LAYOUTS["plain"]
    arguments = new_kvs(rng, layout) if operation == "write" else lowered(rng, layout)[1:]
    call = partial({"write": write_kvs, "lower": lower_kvs}[operation], layout=layout, implementation="xla")
    pool = jax.ShapeDtypeStruct((2**14, layout.rows, 128), jnp.uint32)
    memory = jax.jit(call, donate_argnums=0).lower(pool, *arguments).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 4 * pool.size
    assert memory.temp_size_in_bytes < pool.size


def check_writes(interpreter, layout, **options):
    """Both operations, to the bit."""
    rng = np.random.default_rng()
    pool, kvs = garbage(rng, layout), new_kvs(rng, layout)
    arguments = jnp.asarray(pool), *map(jnp.asarray, kvs), layout
    got = interpreter.run(tpu.write_kvs, *arguments, **options)
    np.testing.assert_array_equal(np.asarray(got)[1:], np.asarray(write(*arguments))[1:])
    arguments = *map(jnp.asarray, lowered(rng, layout)), layout
    got = interpreter.run(tpu.lower_kvs, *arguments, **options)
    np.testing.assert_array_equal(np.asarray(got)[1:], np.asarray(lower(*arguments))[1:])


def test_tpu(interpreter):
    check_writes(interpreter, LAYOUTS["plain"])


def test_tpu_with_groups(eager):
    check_writes(eager, LAYOUTS["groups"])


def test_tpu_in_several_steps_and_calls(eager):
    """Four KVs of six patches, one a step; a KV takes 13 entries of the 30 that SMEM is said to hold."""
    check_writes(eager, layout_of("K8V4", "K4V2", tokens=256), a_step=1, smem_entries=30)


def test_formats_by_name():
    assert str(Format.named("k4v2/2,4")) == "K4V2/2,4"
    assert Format.named("K8V4").bits == 12
    for wrong in ("K8", "K3V4", "K8V4/0,1", "8,4", "K8V4/2"):
        with pytest.raises(ValueError, match=r"of \(8, 4, 2, 1\) bits"):
            Format.named(wrong)


@pytest.mark.parametrize(("head_dim", "tokens", "tile"), [(64, 128, 1), (64, 256, 8), (128, 128, 8), (96, 64, 1)])
def test_both_tiers_fit_in_a_block(head_dim, tokens, tile):
    layout = layout_of("K8V4", "K4V2", head_dim=head_dim, tokens=tokens, tile=tile)
    assert layout.rows % tile == 0
    assert layout.tiers[0].tokens == tokens
    for tier in layout.tiers:
        assert tier.end <= layout.words


@pytest.mark.parametrize(
    ("low", "options", "rows", "tokens"),
    [
        ("K4V2", {"head_dim": 128}, 26, 112),
        ("K4V2", {"head_dim": 128, "low_step": 64}, 28, 128),
        ("K4V2", {"low_step": 64}, 16, 128),
        ("K4V2", {"tokens": 256, "tile": 8, "low_step": 256}, 64, 512),
        ("K4V2", {"head_dim": 128, "tokens": 128, "tile": 8, "low_step": 128}, 56, 256),
        ("K8V2", {"head_dim": 128, "low_step": 64}, 26, 64),  # for 128 a block would be far larger
        ("K4V2", {"tokens": 32, "low_step": 64}, 7, 32),  # high blocks aren't whole either
    ],
)
def test_low_blocks_are_whole_where_it_costs_little(low, options, rows, tokens):
    layout = layout_of("K8V4", low, **{"tile": 1, **options})
    assert (layout.rows, layout.tiers[1].tokens) == (rows, tokens)
    assert layout.tiers[1].end <= layout.words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 40}, "holds a multiple of 16 tokens, got 40"),
        ({"tokens": 0}, "holds a multiple of 16 tokens, got 0"),
        ({"high": Format.named("K8V4/3,1")}, "groups must divide the head dimension"),
        ({"low": Format.named("K8V8")}, "takes more bits than the high one"),
        ({"low": Format.named("K4V4/16,16")}, "a block holds 64 tokens at K8V4, but 32 at K4V4/16,16"),
        ({"low": Format.named("K4V2/32,32")}, "but 0 at K4V2/32,32"),
        ({"head_dim": 8}, "a multiple of 16, got 8"),
        ({"head_dim": 40}, "a multiple of 16, got 40"),
    ],
)
def test_layouts_that_do_not_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BlockLayout(**{"head_dim": 64, "high": Format.named("K8V4"), "low": Format.named("K4V2"), **options})


@pytest.mark.parametrize("head_dim", [16, 48, 64, 128])
@pytest.mark.parametrize("bits", ["K8V4", "K8V1", "K4V1", "K2V1"])
def test_what_a_block_holds_does_not_overrun_it(bits, head_dim):
    layout = BlockLayout(head_dim=head_dim, high=Format.named("K8V8"), low=Format.named(bits))
    assert all(tier.end <= layout.words for tier in layout.tiers)


def test_what_does_not_belong_together_is_refused():
    layout, rng = LAYOUTS["plain"], np.random.default_rng()
    pool, kvs = garbage(rng, layout), new_kvs(rng, layout)
    with pytest.raises(ValueError, match="one vector a slot"):
        write_kvs(pool, kvs[0][:, :32], *kvs[1:], layout)
    with pytest.raises(ValueError, match="not of this layout"):
        write_kvs(pool[:, 1:], *kvs, layout)
    with pytest.raises(ValueError, match="not of this layout"):
        lower_kvs(pool, *[kvs[3]] * 4, LAYOUTS["wide"])
