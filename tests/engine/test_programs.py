"""What ``program`` makes of a method: compiled once a shape and a static value, bounded in number, with the weights."""

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx

from jaxkv.engine import programs
from jaxkv.engine.programs import ModelPrograms, program

pytestmark = pytest.mark.once


class Sums(ModelPrograms):
    traced = 0

    @program(donate=("total",), static=("times",))
    def add(self, total, more, *, times=1):
        Sums.traced += 1
        assert isinstance(self.model.logits(jnp.zeros(tiny.CONFIG.hidden_size)), jax.core.Tracer)
        return total + times * more


@pytest.fixture
def sums():
    Sums.traced = 0
    return Sums(tiny.MODEL)


def test_a_program_is_compiled_once_for_shapes_and_static_values(sums):
    assert sums.add(jnp.zeros(3), 2).tolist() == [2, 2, 2]
    assert sums.add(jnp.zeros(3), more=5).tolist() == [5, 5, 5]
    assert Sums.traced == 1
    seconds = sums.compile_seconds
    assert seconds > 0
    assert sums.add(jnp.zeros(3), 5, times=2).tolist() == [10, 10, 10]
    assert sums.add(jnp.zeros(2), 5).tolist() == [5, 5]
    assert Sums.traced == 3
    assert sums.compile_seconds > seconds


def test_what_is_donated_is_gone(sums):
    total = jnp.zeros(3)
    sums.add(total, 1)
    assert total.is_deleted()


def test_only_the_programs_used_last_are_kept(sums, monkeypatch):
    monkeypatch.setattr(programs, "MOST_PROGRAMS", 2)
    for times in (1, 2, 1, 3, 1):
        sums.add(jnp.zeros(3), 1, times=times)
    assert Sums.traced == 3
    sums.add(jnp.zeros(3), 1, times=2)
    assert Sums.traced == 4


def test_the_model_outside_is_the_one_that_was_given(sums):
    sums.add(jnp.zeros(3), 1)
    assert sums.model is tiny.MODEL


def test_weights_that_changed_are_taken_and_programs_are_kept_where_they_still_fit(sums):
    model = tiny.random_model()
    sums.refresh(model)
    sums.add(jnp.zeros(3), 1)
    before = sums._leaves
    sums.refresh(model)
    assert sums._leaves is before
    nnx.update(model, jax.tree.map(lambda x: x + 1, nnx.state(model)))
    sums.refresh(model)
    sums.add(jnp.zeros(3), 1)
    assert Sums.traced == 1
    sums.refresh(tiny.random_model(dtype=jnp.bfloat16))
    sums.add(jnp.zeros(3), 1)
    assert Sums.traced == 2
