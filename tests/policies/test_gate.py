"""The learned gate: its scores against plain numpy, whenever a KV was written; and what training makes of texts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import train_gate
from oracles.attention import dense_attention
from training import corpus

from jaxkv import LLM, Gate, GateWeights, KNorm, LearnedGate, Policy, Ratio, SamplingParams, compress, decode, prefill
from jaxkv.cache.contents import contents
from jaxkv.cache.home import GONE
from jaxkv.policies import gate as gates
from models.shapes import SHAPES

pytestmark = pytest.mark.once

LENGTH, STEPS = 120, 12
FREQUENCIES = train_gate.frequencies_of(tiny.MODEL)
WEIGHTS = GateWeights(
    linear=np.random.default_rng(0).standard_normal((2, 2, 65)).astype(np.float32), frequencies=FREQUENCIES
)
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
    seen = np.concatenate([keys, values, keys**2, values**2, np.ones((*keys.shape[:-1], 1))], -1)
    return np.einsum("lthf,lhf->lht", seen, WEIGHTS.linear.astype(np.float64))


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


def test_the_models_own_gate_is_taken(monkeypatch, tmp_path):
    policy, sizes = Gate(budget=Ratio(ratio=3)), tiny.CONFIG
    with pytest.raises(ValueError, match="no gate is shipped for this model: train one"):
        policy.for_model(sizes)
    (tmp_path / "gates").mkdir()
    WEIGHTS.save(tmp_path / "gates" / "tiny.npz")
    monkeypatch.setattr(gates, "__file__", str(tmp_path / "gate.py"))
    monkeypatch.setitem(gates.SHIPPED, gates.Family(2, 32, 101), "tiny")
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
    assert weights.frequencies[0] == 1.0


def test_a_gate_that_is_none_is_refused(tmp_path):
    path = tmp_path / "gate.npz"
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"gate.npz' is no gate of scripts/train_gate.py"):
        GateWeights.load(path)
    np.savez(path, linear=np.zeros((2, 2, 64)), frequencies=np.zeros(8))
    with pytest.raises(ValueError, match=r"got \(2, 2, 64\) beside \(8,\)"):
        GateWeights.load(path)
    np.savez(path, linear=np.full((2, 2, 65), np.nan), frequencies=np.zeros(8))
    with pytest.raises(ValueError, match="must be finite"):
        GateWeights.load(path)
    WEIGHTS.save(path)
    assert GateWeights.load(path) == WEIGHTS
    with pytest.raises(ValueError, match=r"weights \(1, 2, 65\), and the model needs \(2, 2, 65\)"):
        GateWeights(linear=WEIGHTS.linear[:1], frequencies=FREQUENCIES).check(tiny.CONFIG)
    unknown = Policy(budget=Ratio(ratio=3), scorer=LearnedGate(weights=None))
    with pytest.raises(ValueError, match="for_model"):
        answered(tiny.empty_cache(), *tiny.padded([tiny.prompt(20)]), unknown)


def test_training_tells_scores_of_texts_that_it_has_not_seen(tmp_path):
    reader = train_gate.Reader(tiny.MODEL, 128)
    texts = [tiny.prompt(128, seed=seed).tolist() for seed in range(10)]
    kept = tmp_path / "sums.npz"
    part = train_gate.learn(reader, iter(texts), 4, FREQUENCIES, kept)
    whole = train_gate.learn(reader, iter(texts), 8, FREQUENCIES, kept)  # goes on after the fourth
    assert np.allclose(part.squares[..., -1, -1], 4 * 128)
    assert np.allclose(whole.squares[..., -1, -1], 8 * 128)
    linear = whole.fit(1e-4)
    mean = np.zeros_like(linear)
    mean[..., -1] = whole.products[..., -1] / whole.squares[..., -1, -1]
    learnt, heads_alone = (
        float(train_gate.judge(reader, texts[8:], each, FREQUENCIES).split()[1].rstrip(";")) for each in (linear, mean)
    )
    assert learnt > heads_alone + 0.05


def test_texts_are_of_all_kinds_and_follow_from_the_seed():
    def some(seed):
        stream = corpus.texts([train_gate.TEXT], 200, seed)
        return [next(stream) for _ in range(8)]

    assert some(1) == some(1) != some(2)
    assert all(len(text.split()) > 60 for text in some(1))
