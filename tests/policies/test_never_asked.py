"""A policy whose scorer nobody would ask is refused when it is made; one that observes nothing can still rank."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
import tiny

from jaxkv import Policy, Scorer, compress, prefill
from jaxkv.compression import ExpectedQueries, LastQueries
from jaxkv.policies import POLICIES, make_policy
from tests.examples.at_random import at_random

pytestmark = pytest.mark.once


@dataclass(frozen=True, kw_only=True)
class Scores(Scorer):
    def score(self, mass, held):
        return mass.max(-2)


@dataclass(frozen=True, kw_only=True)
class Weighs(Scorer):
    def weigh(self, probability):
        return probability**3


@dataclass(frozen=True, kw_only=True)
class Decodes(Scorer):
    def score_decoded(self, probability):
        return probability.max(-2)


@dataclass(frozen=True, kw_only=True)
class Expects(Weighs):
    @property
    def observes(self):
        return ExpectedQueries(count=16)


@dataclass(frozen=True, kw_only=True)
class Observes(Scores):
    @property
    def observes(self):
        return LastQueries(count=16)


@pytest.mark.parametrize(
    ("scorer", "what"), [(Scores, "score"), (Weighs, "weigh"), (Decodes, "score_decoded"), (Expects, "weigh")]
)
def test_a_verb_that_nobody_calls_is_refused(scorer, what):
    with pytest.raises(ValueError, match=f"{scorer.__name__} has a {what} that nobody calls, .* override observes"):
        Policy(scorer=scorer(), ratio=4)


def test_what_is_asked_is_taken():
    assert Policy(scorer=Observes(), ratio=4).scorer == Observes()
    assert Policy(scorer=Scorer(), ratio=4)
    for name in POLICIES:
        if name != "gate":
            assert make_policy(name, None, ratio=4) is not None


def test_random_eviction_keeps_a_quarter_of_all_layers():
    tokens, lengths = tiny.padded([tiny.prompt(200)])
    cache, _ = jax.jit(lambda c: prefill(tiny.MODEL, c, tokens, lengths, at_random))(tiny.empty_cache())
    cache = jax.jit(lambda c: compress(c, at_random))(cache)
    held = np.asarray(cache.lengths)[:, 0]
    assert 32 <= held.min() <= held.max() < 100
    kept = [set(tiny.by_position(cache, cache.raw.scores, layer, 0, head)) for layer, head in np.ndindex(2, 2)]
    assert all(a != b for i, a in enumerate(kept) for b in kept[:i])
    assert all(set(range(169, 200)) <= each for each in kept)
