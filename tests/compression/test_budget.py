"""How many blocks each form of budget leaves, and what it refuses."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from oracles.kv_compress import evict_count

from jaxkv.cache import CacheConfig
from jaxkv.compression.budget import Footprint
from jaxkv.compression.shares import PerHead
from jaxkv.policies import (
    Auto,
    ExpectedAttention,
    KeepFraction,
    KVCompress,
    KVzip,
    LeanKV,
    MaxBytes,
    MaxTokens,
    Mixed,
    Ratio,
    SnapKV,
)

HEADS = 4


def cache_with(lengths, tokens, block_size=16):
    cache = tiny.empty_cache(block_size=block_size, max_context=4096, num_blocks=9)
    cache = tiny.with_tables(cache, lengths=jnp.asarray(lengths, jnp.int32)[:, None])
    return replace(cache, num_tokens=jnp.array([tokens], jnp.int32))


def evicted(budget, cache, window):
    """Blocks that a sequence gives up."""
    room = budget.unquantised_blocks(Footprint.of_sequence(cache, cache.num_tokens[0], window))
    return max(int(cache.raw.tables.blocks_held().sum()) - int(room), 0)


lengths = st.lists(st.lists(st.integers(1, 2000), min_size=2, max_size=2), min_size=2, max_size=2)


@given(lengths=lengths, tokens=st.integers(1, 4096))
def test_max_tokens_follows_the_papers_formula(lengths, tokens):
    cache = cache_with(lengths, 2000)
    got = evicted(MaxTokens(tokens=tokens), cache, 32)
    assert got == evict_count(np.array(lengths), 16, 2000, max_cache_tokens=tokens, protected_window=32)


@given(length=st.integers(1, 4096), percent=st.integers(1, 100), window=st.integers(1, 100))
def test_keep_fraction_follows_the_papers_formula(length, percent, window):
    full = np.full((2, 2), length)
    got = evicted(KeepFraction(fraction=percent / 100), cache_with(full, length), window)
    wanted = evict_count(full, 16, length, keep_ratio=np.float32(percent / 100), protected_window=window)
    assert abs(got - wanted) <= (0 if percent in (25, 50, 100) else 1)  # float32 may round a product up


def test_keeping_everything_evicts_nothing():
    cache = cache_with(np.full((2, 2), 777), 777)
    assert evicted(KeepFraction(fraction=1.0), cache, 32) == 0
    assert evicted(Ratio(ratio=1), cache, 32) == 0
    assert evicted(MaxTokens(tokens=777), cache, 32) == 0


@given(tokens=st.integers(64, 4096), ratio=st.one_of(st.integers(1, 64), st.floats(1, 64)))
def test_ratio_divides_the_full_caches_blocks(tokens, ratio):
    full = HEADS * -(-tokens // 16)
    gone = evicted(Ratio(ratio=ratio), cache_with(np.full((2, 2), tokens), tokens), 32)
    kept = full - gone
    least = HEADS * 2
    assert kept == max(least, int(full / np.float32(ratio))) or kept == max(least, int(full / ratio))
    assert kept == least or kept * ratio <= full * (1 + 1e-6)


@given(length=st.integers(100, 4096), size=st.integers(1, 10_000_000))
def test_max_bytes_holds_at_most_so_many(length, size):
    cache = cache_with(np.full((2, 2), length), length)
    block = 16 * (2 * 16 * 4 + 8)
    held = HEADS * -(-length // 16)
    kept = held - evicted(MaxBytes(size=size), cache, 32)
    assert kept == min(held, size // block)


@pytest.mark.parametrize("budget", [MaxTokens(tokens=15), MaxTokens(tokens=31), MaxBytes(size=1000)])
def test_an_impossible_budget_is_refused_with_its_value(budget):
    config = CacheConfig.for_model(tiny.CONFIG, batch=1, max_context=256)
    with pytest.raises(
        ValueError, match=r"leaves .* tokens a head, but a head keeps at least one block of 16"
    ) as error:
        budget.check(config, 32)
    assert str(getattr(budget, "tokens", 1000)) in str(error.value)


def test_a_possible_budget_is_accepted():
    config = CacheConfig.for_model(tiny.CONFIG, batch=1, max_context=256)
    for budget in (MaxTokens(tokens=32), Ratio(ratio=64), MaxBytes(size=HEADS * 2 * config.block_bytes)):
        budget.check(config, 32)


@pytest.mark.parametrize("ratio", [0.5, 0, -1, float("nan")])
def test_a_ratio_below_one_is_refused(ratio):
    with pytest.raises(ValueError, match="ratio must be at least 1"):
        Ratio(ratio=ratio)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1])
def test_a_fraction_outside_zero_to_one_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction kept must be in"):
        KeepFraction(fraction=fraction)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaxBytes(size=1e9), "max_cache_bytes must be a whole number, got 1000000000.0"),
        (lambda: MaxTokens(tokens=33.5), "max_cache_tokens must be a whole number, got 33.5"),
        (lambda: MaxTokens(tokens=True), "max_cache_tokens must be a whole number, got True"),
        (lambda: Ratio(ratio="8"), "ratio must be a number, got '8'"),
        (lambda: Ratio(ratio=None), "ratio must be a number, got None"),
        (lambda: KeepFraction(fraction="half"), "fraction must be a number, got 'half'"),
        (lambda: KVCompress(budget=8), r"budget must be one, got 8; write ratio=8, or budget=Ratio\(8\)"),
        (lambda: KVCompress(budget=Ratio(ratio=2), protected_window=32.5), "protected_window must be a whole number"),
        (lambda: KVCompress(budget=Ratio(ratio=2), window=1.5), "window must be a whole number, got 1.5"),
        (lambda: KVCompress(budget=Ratio(ratio=2), sinks="4"), "sinks must be a whole number, got '4'"),
        (lambda: SnapKV(budget=Ratio(ratio=2), pool=5.0), "pool must be a whole number, got 5.0"),
        (lambda: KVzip(budget=Ratio(ratio=2), power=0), "power must be at least 1"),
        (lambda: ExpectedAttention(budget=Ratio(ratio=2), future=0), "future must be at least 1 position"),
        (lambda: LeanKV(high_threshold="1"), "high_threshold must be a number, got '1'"),
        (lambda: LeanKV(high="K8V4"), r"high must be a format, such as Format.named\('K8V4'\), got 'K8V4'"),
        (lambda: Auto(budget=Ratio(ratio=2), unquantised_window=1), "unquantised_window must be true or false, got 1"),
        (lambda: Auto(budget=Ratio(ratio=2), block_tokens=64.0), "block_tokens must be a whole number, got 64.0"),
        (lambda: Mixed(budget=Ratio(ratio=2), scoring=Ratio(ratio=2)), "scoring must be a policy"),
        (lambda: PerHead(floor="0.2"), "floor must be a number, got '0.2'"),
        (lambda: config(batch=2.0), "batch must be a whole number, got 2.0"),
        (lambda: config(dtype="int8"), "the cache's dtype must be float32 or bfloat16, got 'int8'"),
        (lambda: config(dtype=jnp.float64), "the cache's dtype must be float32 or bfloat16"),
        (lambda: config(memory=1e9), "memory must be a whole number, got 1000000000.0"),
    ],
)
def test_values_of_another_type_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_numbers_of_numpy_are_pythons_own():
    policy = KVCompress(budget=MaxTokens(tokens=np.int64(64)), sinks=np.uint8(4))
    assert policy == KVCompress(budget=MaxTokens(tokens=64), sinks=4)
    assert {type(x) for x in (policy.budget.tokens, policy.sinks)} == {int}


def config(*, batch=1, **sizes):
    return CacheConfig.for_model(tiny.CONFIG, batch=batch, max_context=256, **sizes)
