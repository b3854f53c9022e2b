"""The functional layer over 8 virtual devices; ``test_devices.py`` runs this file in a process that has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_kv_heads import CONFIG, MODEL, answer_on, answer_on_one, assert_no_block_is_lost, sizes
from flax import nnx

from jaxkv import Auto, GateWeights, KVCompress, MaxTokens, Ratio, stats
from jaxkv.cache.shards import ShardedHeads
from jaxkv.policies import POLICIES, make_policy
from models import Llama
from models.checkpoints.assemble import inputs_axis, parameters_of
from models.quantised import Grouped, Packed, quantise
from models.sharding import shard, weight_specs

SETTINGS = {"leankv": {}, "kv-compress": {"window": 16, "protected_window": 16}}
USUAL = ["kv-compress", "auto", "leankv"]


def gate() -> GateWeights:
    """One that tells the heads apart."""
    rng, heads = np.random.default_rng(3), (CONFIG.num_layers, CONFIG.num_kv_heads)
    x = 2 * CONFIG.head_dim
    return GateWeights(
        linear=rng.standard_normal((*heads, 2 * x + 1)).astype(np.float32),
        hidden=rng.standard_normal((*heads, x + 1, 2)).astype(np.float32),
        output=rng.standard_normal((*heads, 2)).astype(np.float32),
        frequencies=CONFIG.rope_theta ** (-np.arange(CONFIG.head_dim // 2) / (CONFIG.head_dim // 2)).astype(np.float32),
    )


def policy_named(name: str, compress_every: int | None = None):
    settings = {"compress_every": compress_every} if compress_every else {}
    if name == "gate":
        settings["weights"] = gate()
    if "window" in getattr(POLICIES[name], "__annotations__", {}):
        settings["window"] = 16
    return make_policy(name, Ratio(ratio=3), **settings)


def again(name: str) -> bool:
    """Whether the policy can compress more than once."""
    policy = policy_named(name)
    return policy.placement.ranks_decoded(policy.scorer)


def check(devices, policy, model=MODEL) -> None:
    one, split = answer_on_one(policy, model), answer_on(devices, policy, model)
    assert jax.device_get(split.tokens).tolist() == jax.device_get(one.tokens).tolist()
    assert jax.device_get(split.counts).tolist() == jax.device_get(one.counts).tolist()
    np.testing.assert_array_equal(split.cache.lengths, one.cache.lengths)
    np.testing.assert_array_equal(split.cache.raw.tables.blocks_held(), one.cache.raw.tables.blocks_held())
    if policy is not None and policy.placement.layout(CONFIG.head_dim) is not None:
        np.testing.assert_array_equal(split.cache.tiers.tables.lengths, one.cache.tiers.tables.lengths)
    assert_no_block_is_lost(split.cache)


def test_nothing_is_evicted_and_all_is_equal():
    check(8, None)


@pytest.mark.parametrize("name", USUAL)
def test_a_policy_does_the_same_over_eight_devices(name):
    check(8, policy_named(name))


@pytest.mark.parametrize(("devices", "name"), [(2, "kv-compress"), pytest.param(4, "mixed", marks=pytest.mark.slow)])
def test_a_policy_that_compresses_again_does_the_same_over_any_number(devices, name):
    check(devices, policy_named(name, 8))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in POLICIES if name not in USUAL])
def test_every_policy_does_the_same_over_eight_devices(name):
    check(8, policy_named(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in POLICIES if again(name)])
def test_every_policy_that_compresses_again_does_the_same(name):
    check(8, policy_named(name, 8))


def test_the_budget_is_the_sequences_exactly_and_heads_share_it_unevenly():
    policy = KVCompress(budget=MaxTokens(tokens=48), protected_window=16, compress_every=8)
    cache = answer_on(8, policy).cache
    held = np.asarray(cache.raw.tables.blocks_held())[..., 0]  # [layers, batch, kv_heads]
    assert (held.sum((0, 2)) <= 16 * 3 + 16).all()  # and a block a head that was begun since
    assert len(set(held.sum((0, 1)).tolist())) > 1  # devices hold different numbers
    assert stats(cache).blocks_held == held.sum()


@pytest.mark.slow
def test_turned_keys_and_values_do_the_same():
    check(8, Auto(budget=Ratio(ratio=3), hadamard=True))


def held_as(held) -> Llama:
    """The model with its matrices as ``held(values, axis)`` makes them of floats."""
    graph, weights = nnx.split(MODEL)
    model = nnx.merge(graph, jax.tree.map(lambda array: array, weights))
    for path, leaf in parameters_of(model).items():
        axis = inputs_axis(path, leaf.shape)
        if axis is not None:
            leaf.set_value(jax.tree.map(jnp.asarray, held(np.asarray(leaf.get_value()), axis)))
    return model


def in_groups(values, axis):
    """Six bits a value, a scale and an offset for each eight inputs, as files of many kinds have it."""
    rows = values if axis == 1 else values.T
    groups = rows.reshape(len(rows), -1, 8)
    offsets, scales = groups.min(-1), (groups.max(-1) - groups.min(-1)) / 63
    codes = np.rint((groups - offsets[..., None]) / scales[..., None]).clip(0, 63).astype(np.uint8)
    codes = Packed.of(codes.reshape(rows.shape), bits=6, axis=1)
    table = Grouped(axis=1, codes=codes, scales=scales, offsets=offsets, block=(1, 8))
    return table if axis == 1 else table.transposed()


@pytest.mark.parametrize(
    ("devices", "held"),
    [pytest.param(8, lambda values, axis: quantise(values, "int8", axis=axis), marks=pytest.mark.slow), (4, in_groups)],
    ids=["int8", "packed in groups"],
)
def test_quantised_weights_are_split_too(devices, held):
    policy, model = policy_named("kv-compress"), held_as(held)
    before = jax.tree.leaves(model)
    check(devices, policy, model)
    local = shard(model, count=devices)
    assert all(new is old for new, old in zip(jax.tree.leaves(model), before, strict=True))
    specs, whole = jax.tree.leaves(weight_specs(local)), jax.tree.leaves(nnx.state(local))
    halved = [array.size for spec, array in zip(specs, whole, strict=True) if "heads" in spec]
    assert sum(halved) > 0.95 * sum(array.size for array in whole)


def test_codes_packed_by_parts_are_each_parts_codes():
    codes = np.random.default_rng(0).integers(0, 64, (48, 6)).astype(np.uint8)
    packed = Packed.of(codes, bits=6, axis=0).in_parts(3)
    for part in range(3):
        low, high = (data[part * n : (part + 1) * n] for data, n in ((packed.low, 8), (packed.high, 4)))
        own = Packed(low=low, high=high, axis=0)
        np.testing.assert_array_equal(own.unpacked(), codes[part * 16 : (part + 1) * 16])


def test_what_does_not_divide_is_refused_with_the_counts_that_do():
    with pytest.raises(ValueError, match=r"over 3 devices: it has 8 KV heads; take 1, 2, 4, 8"):
        shard(MODEL, count=3)
    with pytest.raises(ValueError, match=r"8 KV heads can't be split evenly over 5 devices; take 1, 2, 4, 8"):
        sizes(None, shards=ShardedHeads(devices=5))
