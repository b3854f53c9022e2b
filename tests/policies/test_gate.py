"""The learned gate: its scores against plain numpy, whenever a KV was written; and what training makes of texts."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import train_gate
from evaluation import prose
from oracles.attention import dense_attention
from training import corpus, fitting, teacher

from jaxkv import (
    LLM,
    Auto,
    Gate,
    GateWeights,
    KNorm,
    LearnedGate,
    Policy,
    Ratio,
    SamplingParams,
    compress,
    decode,
    prefill,
)
from jaxkv.cache.contents import contents
from jaxkv.cache.home import GONE
from jaxkv.policies import gate as gates
from jaxkv.policies import make_policy
from jaxkv.requests import Finished
from models.shapes import SHAPES

pytestmark = pytest.mark.once

LENGTH, STEPS = 120, 12
FREQUENCIES = teacher.frequencies_of(tiny.MODEL)


def some_weights(units=3):
    rng = np.random.default_rng(0)
    shapes = {"linear": (2, 2, 65), "hidden": (2, 2, 33, units), "output": (2, 2, units)}
    # As they come from a file, which holds half of the bits.
    arrays = {name: rng.standard_normal(shape).astype(np.float16).astype(np.float32) for name, shape in shapes.items()}
    return GateWeights(**arrays, frequencies=FREQUENCIES)


WEIGHTS = some_weights()
GATED = Policy(budget=Ratio(ratio=3), scorer=LearnedGate(weights=WEIGHTS), protected_window=2, compress_every=8)


def kvs(ids):
    """K before RoPE and V of each layer, ``[layers, tokens, kv_heads, head_dim]``, of the plain model in float64."""
    before, values = [], []

    def attend(state, layer, query, key, value):
        q, k, v = (np.asarray(x[0], np.float64) for x in (query, key, value))
        pairs = k[..., :8] + 1j * k[..., 8:]
        pairs *= np.exp(-1j * np.arange(len(ids))[:, None, None] * FREQUENCIES.astype(np.float64))
        before.append(np.concatenate([pairs.real, pairs.imag], -1))
        values.append(v)
        out, _ = dense_attention(q, k, v, np.arange(len(ids)), np.arange(len(ids)))
        return state, jnp.asarray(out[None], jnp.float32)

    tiny.MODEL(jnp.asarray(ids)[None], jnp.arange(len(ids))[None], attend, None)
    return np.stack(before), np.stack(values)


def expected(ids):
    """Scores ``[layers, kv_heads, tokens]``."""
    keys, values = kvs(ids)
    one = np.ones((*keys.shape[:-1], 1))
    seen = np.concatenate([keys, values, keys**2, values**2, one], -1)
    units = np.einsum("lthf,lhfu->lhtu", np.concatenate([keys, values, one], -1), WEIGHTS.hidden.astype(np.float64))
    told = np.einsum("lthf,lhf->lht", seen, WEIGHTS.linear.astype(np.float64))
    return told + np.einsum("lhtu,lhu->lht", np.maximum(units, 0), WEIGHTS.output.astype(np.float64))


@partial(jax.jit, static_argnames="policy")
def answered(cache, tokens, lengths, policy):
    cache, logits = prefill(tiny.MODEL, cache, tokens, lengths, policy)
    first = jnp.argmax(logits, -1)
    return first, decode(tiny.MODEL, compress(cache, policy), first, jnp.array([STEPS]), steps=STEPS, policy=policy)


def test_scores_are_those_of_the_kvs_whether_read_or_decoded():
    ids = tiny.prompt(LENGTH)
    first, made = answered(tiny.empty_cache(), *tiny.padded([ids]), GATED)
    text = [*ids, int(first[0]), *made.tokens[0].tolist()]
    wanted, kept = expected(text), 0
    for layer, head in np.ndindex(2, 2):
        stored = tiny.by_position(made.cache, made.cache.raw.scores, layer, 0, head)
        # It was compressed last at 128; what was decoded saw, from the second layer on, no longer all of the text.
        scored = {place: score for place, score in stored.items() if place < (LENGTH if layer else 128)}
        kept += len(scored)
        np.testing.assert_allclose(list(scored.values()), wanted[layer, head, list(scored)], rtol=1e-3, atol=1e-3)
    assert LENGTH < kept < 2 * LENGTH  # of four heads, a third and what was decoded since


def _stored(made, at):
    layer, head = at
    return tiny.by_position(made.cache, made.cache.raw.scores, layer, 0, head)


def test_other_scores_of_kvs_alone_rank_what_is_decoded_too():
    ids, policy = tiny.prompt(LENGTH), KNorm(budget=Ratio(ratio=3), protected_window=2, compress_every=8)
    _, made = answered(tiny.empty_cache(), *tiny.padded([ids]), policy)
    stored = _stored(made, (0, 0))
    decoded = [score for place, score in stored.items() if LENGTH <= place < 128]
    assert decoded
    assert all(score < 0 for score in decoded)


def test_tiers_keep_scores_of_what_is_quantised():
    policy = Gate(budget=Ratio(ratio=3), weights=WEIGHTS, compress_every=8, block_tokens=16)
    cache = tiny.empty_cache(layout=policy.placement.layout(16))
    ids = tiny.prompt(LENGTH)
    _, made = answered(cache, *tiny.padded([ids]), policy)
    now, wanted = contents(made.cache), expected(ids)
    for layer, head in np.ndindex(2, 2):
        held = (np.asarray(now.home) != GONE)[layer, 0, head] & (np.asarray(now.positions)[layer, 0, head] < LENGTH)
        places = np.asarray(now.positions)[layer, 0, head][held]
        np.testing.assert_allclose(
            np.asarray(now.scores)[layer, 0, head][held], wanted[layer, head, places], rtol=1e-3, atol=1e-3
        )


def test_the_models_own_gate_is_taken(request):
    policy, sizes = Gate(budget=Ratio(ratio=3)), tiny.CONFIG
    with pytest.raises(ValueError, match="no gate is shipped for this model: train one"):
        policy.for_model(sizes)
    request.getfixturevalue("shipped")
    assert policy.for_model(sizes) == Gate(budget=Ratio(ratio=3), weights=WEIGHTS)
    assert hash(policy.for_model(sizes)) == hash(policy.for_model(sizes))
    ids = tiny.prompt(LENGTH)
    [answer] = LLM(tiny.MODEL, compression=policy).generate([ids.tolist()], SamplingParams(max_tokens=4))
    cache = tiny.empty_cache(layout=policy.placement.layout(16))
    first, made = answered(cache, *tiny.padded([ids]), policy.for_model(sizes))
    assert answer.token_ids[:4] == [int(first[0]), *made.tokens[0, :3].tolist()]


def test_a_gate_is_shipped_for_the_real_model():
    weights = gates.gate_for(SHAPES["smollm2-135m"])
    assert weights.linear.shape == (30, 3, 257)
    assert weights.output.shape[:2] == (30, 3)
    assert weights.frequencies[0] == 1.0


def test_a_gate_that_is_none_is_refused(tmp_path):
    path = tmp_path / "gate.npz"
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"gate.npz' is no gate of scripts/train_gate.py"):
        GateWeights.load(path)
    arrays = {name: getattr(WEIGHTS, name) for name in ("linear", "hidden", "output", "frequencies")}
    np.savez(path, linear=WEIGHTS.linear, frequencies=FREQUENCIES)
    with pytest.raises(ValueError, match=r"gate.npz' is no gate of scripts/train_gate.py: .*hidden"):
        GateWeights.load(path)
    np.savez(path, **arrays | {"linear": np.zeros((2, 2, 64))})
    with pytest.raises(ValueError, match=r"got \(2, 2, 64\), \(2, 2, 33, 3\), \(2, 2, 3\) beside \(8,\)"):
        GateWeights.load(path)
    np.savez(path, **arrays | {"output": np.full((2, 2, 3), np.nan)})
    with pytest.raises(ValueError, match="must be finite"):
        GateWeights.load(path)
    WEIGHTS.save(path)
    assert GateWeights.load(path) == WEIGHTS
    assert hash(GateWeights.load(path)) == hash(WEIGHTS)
    with pytest.raises(ValueError, match=r"weights \(1, 2, 65\), and the model needs \(2, 2, 65\)"):
        GateWeights(**{k: v if k == "frequencies" else v[:1] for k, v in arrays.items()}).check(tiny.CONFIG)
    unknown = Policy(budget=Ratio(ratio=3), scorer=LearnedGate(weights=None))
    with pytest.raises(ValueError, match="for_model"):
        answered(tiny.empty_cache(), *tiny.padded([tiny.prompt(20)]), unknown)


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """``WEIGHTS`` come with the package for the tiny model."""
    (tmp_path / "gates").mkdir()
    WEIGHTS.save(tmp_path / "gates" / "tiny.npz")
    monkeypatch.setattr(gates, "__file__", str(tmp_path / "gate.py"))
    monkeypatch.setitem(gates.SHIPPED, gates.Family(2, 32, 101), "tiny")


def test_auto_is_the_gate_where_it_may_be_and_a_model_has_one(shipped):
    ids, ask = tiny.prompt(LENGTH).tolist(), SamplingParams(max_tokens=6, ignore_eos=True)
    made = {}
    for name, settings in ("auto", {"reread": False}), ("gate", {}), ("auto", {}):
        llm = LLM(tiny.MODEL, compression=make_policy(name, Ratio(ratio=4), **settings))
        [answer] = llm.generate([ids], ask)
        made[name, *settings] = answer.token_ids, answer.cache.blocks_per_head.tolist()
        assert llm.compression.scorer.observes.rereads == (name == "auto" and not settings)
    assert made["auto", "reread"] == made["gate",] != made["auto",]
    again = Auto(budget=Ratio(ratio=4), compress_every=8, reread=False).for_model(tiny.CONFIG)
    assert again.scorer == LearnedGate(weights=WEIGHTS)


def test_auto_rereads_where_there_is_no_gate():
    auto = Auto(budget=Ratio(ratio=4), reread=False)
    assert auto.for_model(tiny.CONFIG) == Auto(budget=Ratio(ratio=4))
    own = replace(auto, weights=WEIGHTS)
    assert own.for_model(tiny.CONFIG).scorer == LearnedGate(weights=WEIGHTS)
    with pytest.raises(ValueError, match="Auto doesn't rank what is decoded"):
        replace(auto, compress_every=8).for_model(tiny.CONFIG)
    with pytest.raises(ValueError, match="give reread=False, or leave the weights out"):
        replace(own, reread=True)
    with pytest.raises(ValueError, match="for_model"):  # not what was decoded evicted as if it scored nothing
        answered(
            tiny.empty_cache(layout=auto.placement.layout(16)),
            *tiny.padded([tiny.prompt(20)]),
            replace(auto, compress_every=8),
        )


@pytest.mark.parametrize("policy", [GATED, Gate(budget=Ratio(ratio=3), weights=WEIGHTS, block_tokens=16)])
def test_a_document_is_read_once_and_answers_are_as_if_it_were_not(policy):
    document = tiny.prompt(160, seed=1).tolist()
    jobs = [(document + tiny.prompt(9 + i, seed=i).tolist(), SamplingParams(max_tokens=9, seed=i)) for i in range(4)]
    answers = []
    for share in True, False:
        llm = LLM(tiny.MODEL, compression=policy, max_batch=2, share_prefixes=share)
        done = {e.request: e.completion for e in llm.run(iter(jobs), max_context=256) if isinstance(e, Finished)}
        answers.append([(done[i].token_ids, done[i].cache.blocks_per_head.tolist()) for i in range(4)])
        assert llm.engine.borrowed_tokens == (3 * 160 if share else 0)
    assert answers[0] == answers[1]


def test_training_tells_scores_of_texts_that_it_has_not_seen(tmp_path):
    reader = teacher.Reader(tiny.MODEL, 128)
    texts = [tiny.prompt(100, seed=seed).tolist() for seed in range(10)]
    files = teacher.lessons(reader, iter(texts[:8]), 8, FREQUENCIES, tmp_path)
    apart = teacher.lessons(reader, iter(texts[8:]), 2, FREQUENCIES, tmp_path / "apart")
    keys, values = kvs(np.array(texts[0]))
    lesson = np.load(files[0]).astype(np.float32)
    # The cache that is taught from holds bfloat16.
    np.testing.assert_allclose(lesson[..., :16], keys.swapaxes(1, 2), atol=0.04)
    np.testing.assert_allclose(lesson[..., 16:32], values.swapaxes(1, 2), atol=0.04)
    files[0].unlink()
    teacher.lessons(reader, iter(texts), 4, FREQUENCIES, tmp_path)  # goes on: the first alone is missing
    np.testing.assert_array_equal(np.load(files[0]).astype(np.float32), lesson)

    def correlation(weights):
        return float(fitting.judge(apart, weights).split()[1].rstrip(";"))

    recipe = fitting.Recipe(units=0)
    linear = fitting.fit(files, FREQUENCIES, recipe)
    deep = fitting.fit(files, FREQUENCIES, replace(recipe, units=4, epochs=4, batch=100))
    means = replace(linear, linear=np.zeros_like(linear.linear))
    means.linear[..., -1] = np.mean([np.load(file)[..., -1].mean(-1) for file in files], axis=0)
    assert min(correlation(linear), correlation(deep)) > correlation(means) + 0.05
    linear.save(tmp_path / "gate.npz")
    assert correlation(GateWeights.load(tmp_path / "gate.npz")) == pytest.approx(correlation(linear), abs=0.01)


def test_weights_of_what_is_normalised_are_made_those_of_what_is_not():
    rng = np.random.default_rng(1)
    mean, scale, x = rng.normal(3, 1, (2, 32)), rng.uniform(0.5, 9, (2, 32)), rng.normal(3, 4, (2, 50, 32))
    weights = {name: getattr(WEIGHTS, name)[0].astype(np.float64) for name in ("linear", "hidden", "output")}
    normal = gates.told(**weights, x=(x - mean[:, None]) / scale[:, None])
    np.testing.assert_allclose(gates.told(**fitting.of_raw(weights, mean, scale), x=x), normal, rtol=1e-4, atol=1e-3)


def test_texts_are_of_all_kinds_and_follow_from_the_seed():
    def some(seed):
        stream = corpus.texts([corpus.paragraphs(train_gate.TEXT)], 200, seed)
        return [next(stream) for _ in range(14)]

    assert some(1) == some(1) != some(2)
    assert all(len(text.split()) > 60 for text in some(1))
    asked = re.compile("secret word|magic number|" + "|".join(prose.CITIES))
    assert not any(asked.search(fact) for fact in corpus.FACTS + corpus.TOWNS)
