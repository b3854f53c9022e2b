"""The engine over several virtual devices; ``test_devices.py`` runs this file in a process that has eight."""

import jax
import numpy as np
import pytest
from devices_functional import policy_named
from eight_kv_heads import CONFIG, MODEL, assert_no_block_is_lost
from flax import nnx
from tiny import answers, prompt

from jaxkv import LLM, KVCompress, LeanKV, Mixed, Ratio, SamplingParams
from jaxkv.cache.shards import WHOLE
from jaxkv.requests import Finished, Refused
from tests.models.granite import TINY_GRANITE, Granite

GREEDY = SamplingParams(max_tokens=24)
SHARED = prompt(160, seed=40)
PROMPTS = [
    prompt(150, seed=1),
    np.concatenate([SHARED, prompt(20, seed=2)]),
    prompt(60, seed=3),
    np.concatenate([SHARED, prompt(33, seed=4)]),
    prompt(180, seed=5),
    np.concatenate([SHARED, prompt(7, seed=6)]),
]


def ended(llm, prompts, params, context=256):
    """Token ids, or the error, by prompt."""
    events = list(llm.run([(p, q) for p, q in zip(prompts, params, strict=True)], max_context=context))
    made = {e.request: e.completion.token_ids for e in events if isinstance(e, Finished)}
    return made | {e.request: e.error for e in events if isinstance(e, Refused)}


def assert_empty(llm) -> None:
    """Nothing is held on any device once all is answered."""
    counts = np.reshape(llm.engine.cache.raw.tables.free.count, -1)
    assert (counts == llm.engine.config.num_blocks - 1).all()


@pytest.mark.parametrize("devices", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_answers_are_those_of_one_device(devices):
    policy = policy_named("kv-compress")
    params = [GREEDY] * 5 + [SamplingParams(max_tokens=24, compression=None)]
    one, split = (LLM(MODEL, compression=policy, max_batch=4, devices=n) for n in (1, devices))
    assert ended(split, PROMPTS, params) == ended(one, PROMPTS, params)
    assert split.engine.borrowed_tokens == one.engine.borrowed_tokens > 0
    assert_no_block_is_lost(split.engine.cache)
    assert_empty(split)
    assert split.model.sizes == CONFIG  # the model itself stays whole


@pytest.mark.parametrize(
    "policy",
    [
        KVCompress(budget=Ratio(ratio=3), window=16, protected_window=16, compress_every=16),
        pytest.param(LeanKV(), marks=pytest.mark.slow),
        pytest.param(
            Mixed.over(KVCompress, budget=Ratio(ratio=3), window=16, protected_window=16), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_tiers_and_later_compressions_answer_the_same(policy):
    one, split = (LLM(MODEL, compression=policy, max_batch=2, devices=n) for n in (1, 4))
    assert answers(split, PROMPTS[:4], GREEDY) == answers(one, PROMPTS[:4], GREEDY)
    assert_no_block_is_lost(split.engine.cache)


def test_memory_is_of_all_devices_and_who_is_put_back_answers_the_same():
    policy = KVCompress(budget=Ratio(ratio=3), window=16, protected_window=16)
    need = LLM(MODEL, max_batch=1)._new_config(None, 256, rows=1).nbytes
    params = [SamplingParams(max_tokens=70)] * len(PROMPTS)
    one, split = (LLM(MODEL, compression=policy, max_batch=4, cache_memory=int(1.6 * need), devices=n) for n in (1, 4))
    assert ended(split, PROMPTS, params) == ended(one, PROMPTS, params)
    assert split.engine.config.nbytes <= 1.6 * need
    assert_no_block_is_lost(split.engine.cache)
    assert_empty(split)


@pytest.mark.slow
def test_an_uncompressed_job_that_must_put_somebody_back_answers_the_same():
    need = LLM(MODEL, max_batch=1)._new_config(None, 256, rows=1).nbytes
    params = [SamplingParams(max_tokens=70)] * 4
    prompts = [prompt(100, seed=50 + i) for i in range(4)]
    one, split = (LLM(MODEL, max_batch=4, cache_memory=int(1.3 * need), devices=n) for n in (1, 4))
    assert ended(split, prompts, params) == ended(one, prompts, params)
    assert_empty(split)


def test_a_prompt_larger_than_the_pool_is_read_in_the_same_parts():
    policy = KVCompress(budget=Ratio(ratio=8), window=16, protected_window=16)
    whole = LLM(MODEL, max_batch=1)._new_config(None, 512, rows=1).nbytes
    long = [prompt(480, seed=60)]
    one, split = (LLM(MODEL, compression=policy, max_batch=1, cache_memory=whole // 2, devices=n) for n in (1, 2))
    assert ended(split, long, [GREEDY], 512) == ended(one, long, [GREEDY], 512)
    assert isinstance(ended(split, long, [GREEDY], 512)[0], list)
    assert_empty(split)


def test_sampled_tokens_are_the_same():
    params = [SamplingParams(max_tokens=24, temperature=0.8, top_p=0.9, seed=i) for i in range(3)]
    one, split = (LLM(MODEL, max_batch=4, devices=n) for n in (1, 2))
    assert ended(split, PROMPTS[:3], params) == ended(one, PROMPTS[:3], params)


def test_devices_may_be_named_so_that_two_engines_stand_side_by_side():
    first, second = (LLM(MODEL, max_batch=2, devices=jax.devices()[at : at + 4]) for at in (0, 4))
    assert answers(first, PROMPTS[:2], GREEDY) == answers(second, PROMPTS[:2], GREEDY)
    assert {d.id for d in second.engine.cache.raw.pool.devices()} == {4, 5, 6, 7}


def test_one_device_has_neither_a_mesh_nor_shards():
    llm = LLM(MODEL, devices=1)
    answers(llm, PROMPTS[:1], GREEDY)
    assert llm.engine.cache.shards is WHOLE
    assert len(llm.engine.cache.raw.pool.devices()) == 1


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        (3, "can't be split over 3 devices: it has 8 KV heads; take 1, 2, 4, 8"),
        (9, "devices must lie between 1 and the 8 that JAX sees here"),
        (0, "devices must lie between 1 and the 8"),
        ("2", "devices must be a whole number, got '2'"),
        ([], "devices must be a number or some of jax.devices"),
    ],
)
def test_what_can_not_be_is_refused(devices, said):
    with pytest.raises(ValueError, match=said):
        LLM(MODEL, devices=devices)


def test_a_model_that_does_not_say_how_it_is_split_is_refused():
    with pytest.raises(ValueError, match="Granite says in no splits how its weights are split over devices"):
        LLM(Granite(TINY_GRANITE, rngs=nnx.Rngs(0)), devices=2)
