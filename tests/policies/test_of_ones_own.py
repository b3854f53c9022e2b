"""A policy, a placement and a model of one's own go through every layer above them: verbs, engine, evaluation."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from evaluation.scoring import Runner
from evaluation.tasks import Item
from flax import nnx

from jaxkv import (
    LLM,
    CacheConfig,
    KVCompress,
    Policy,
    Ratio,
    SamplingParams,
    compress,
    decode,
    decode_step,
    init_cache,
    prefill,
    stats,
)
from jaxkv.cache import PagedCache
from jaxkv.policies import H2O
from models import Decoder
from tests.examples import all_k8v4, last_queries
from tests.models.granite import TINY_GRANITE, Granite

pytestmark = pytest.mark.once

LENGTHS = 200, 150
STEPS = 12


@dataclass(frozen=True, kw_only=True)
class Case:
    model: Decoder
    policy: Policy
    ratio: float
    """Of bytes at 16 bits a value, that it can keep."""


CASES = {
    "policy": Case(model=tiny.MODEL, policy=last_queries.policy, ratio=4),
    "placement": Case(model=tiny.MODEL, policy=all_k8v4.everything, ratio=1.25),
    "model": Case(
        model=Granite(TINY_GRANITE, rngs=nnx.Rngs(0)),
        policy=KVCompress(budget=Ratio(ratio=4), window=16, protected_window=16),
        ratio=4,
    ),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def prompts() -> list[np.ndarray]:
    return [tiny.prompt(length, seed) for seed, length in enumerate(LENGTHS)]


def empty_cache(model: Decoder, policy: Policy | None) -> PagedCache:
    layout = policy and policy.placement.layout(model.sizes.head_dim)
    return init_cache(CacheConfig.for_model(model.sizes, batch=2, max_context=256, layout=layout))


@cache
def verbs(name: str) -> Any:
    """The full cache, the compressed one, and what is decoded from it, by functions that are jitted here."""
    case = CASES[name]
    graph, weights = nnx.split(case.model)

    @jax.jit
    def read(weights, cache, tokens, lengths):
        return prefill(nnx.merge(graph, weights), cache, tokens, lengths, case.policy)

    @jax.jit
    def write(weights, cache, last):
        limits = jnp.full(2, STEPS - 1)
        return decode(nnx.merge(graph, weights), cache, last, limits, steps=STEPS - 1, policy=case.policy)

    full, logits = read(weights, empty_cache(case.model, case.policy), *tiny.padded(prompts()))
    small = jax.jit(lambda cache: compress(cache, case.policy))(full)
    first = logits.argmax(-1).astype(jnp.int32)
    return full, small, first, write(weights, small, first)


@pytest.mark.parametrize("name", CASES)
def test_the_verbs_take_it(name):
    full, small, _, made = verbs(name)
    assert stats(small).bytes_held < stats(full).bytes_held
    assert made.counts.tolist() == [STEPS - 1] * 2
    assert (made.cache.num_tokens - full.num_tokens).tolist() == [STEPS - 1] * 2
    assert np.isfinite(np.asarray(made.logprobs)).all()


@pytest.mark.parametrize("name", CASES)
def test_an_llm_answers_as_the_verbs_do(name):
    case = CASES[name]
    llm = LLM(case.model, compression=case.policy)
    params = SamplingParams(max_tokens=STEPS, ignore_eos=True)
    answers = [llm.generate(prompt.tolist(), params)[0] for prompt in prompts()]
    _, _, first, made = verbs(name)
    for row, answer in enumerate(answers):
        assert answer.token_ids == [int(first[row]), *made.tokens[row].tolist()]


def test_the_policy_frees_three_blocks_of_four_and_keeps_the_sinks():
    full, small, _, _ = verbs("policy")
    assert stats(small).blocks_held <= stats(full).blocks_held // 4
    for layer, row, head in np.ndindex(2, 2, 2):
        assert set(range(4)) <= set(tiny.by_position(small, small.raw.scores, layer, row, head))


def test_the_policy_takes_the_settings_that_every_policy_has():
    with pytest.raises(ValueError, match="MeanAttention doesn't rank what is decoded"):
        replace(last_queries.policy, compress_every=16)


def test_the_placement_quantises_all_and_evicts_nothing():
    full, small, _, _ = verbs("placement")
    held = stats(small)
    assert (held.kvs_high, held.kvs_low) == (held.kvs_full, 0) == (stats(full).kvs_held, 0)
    assert not np.asarray(small.raw.lengths).any()


def test_what_is_decoded_after_the_placement_is_appended_unquantised():
    _, small, _, made = verbs("placement")
    assert (np.asarray(made.cache.raw.lengths) == STEPS - 1).all()
    np.testing.assert_array_equal(made.cache.tiers.tables.lengths, small.tiers.tables.lengths)


def test_a_step_after_the_placement_attends_to_all_that_is_quantised():
    full, small, first, _ = verbs("placement")
    step = jax.jit(lambda cache: decode_step(tiny.MODEL, cache, first, jnp.ones(2, bool), all_k8v4.everything)[1])
    exact, near = np.asarray(step(full)), np.asarray(step(small))
    assert np.abs(exact - near).max() > 0
    assert np.corrcoef(exact.ravel(), near.ravel())[0, 1] > 0.97  # near 0 where the quantised KVs are left out


@pytest.mark.parametrize("scoring", [all_k8v4.everything, H2O(budget=Ratio(ratio=1))])
def test_the_placement_quantises_again_what_was_decoded(scoring):
    every = replace(all_k8v4.everything, scorer=scoring.scorer, compress_every=8)
    _, small, first, _ = verbs("placement")
    made = jax.jit(lambda c: decode(tiny.MODEL, c, first, jnp.full(2, 8), steps=8, policy=every))(small)
    # 200 is a multiple of 8, so its 8 tokens are quantised at 208; 150 isn't: 2 are at 152, and 6 are left at 158.
    assert np.asarray(made.cache.raw.lengths).tolist() == [[[0, 0], [6, 6]]] * 2
    assert np.asarray(made.cache.tiers.tables.lengths[..., 0]).tolist() == [[[208, 208], [152, 152]]] * 2
    expected = verbs("placement")[3]
    assert made.tokens[:, :2].tolist() == expected.tokens[:, :2].tolist()


@pytest.mark.parametrize("name", CASES)
def test_evaluation_takes_it(name):
    case = CASES[name]
    runner = Runner(case.model, 256)
    context = tiny.prompt(240).tolist()
    full, seconds = runner.scored(runner.read(context, case.policy), (), case.policy)
    small, took = runner.shrunk(full, case.policy, case.ratio)
    item = Item(id="0", context_id="a", question=(1, 2, 3), answer=(4, 5))
    [outcome] = runner.ask(small, [item], read=seconds, compress=took)
    assert outcome.bytes_held == stats(small).bytes_held <= outcome.bytes_full / case.ratio
    assert outcome.bytes_full == runner.bytes_full(full)
    assert outcome.nll is not None
    assert np.isfinite(outcome.nll)
