"""Every TPU kernel at real models' shapes, and whole steps of Llama 3.1 8B, by the real compiler."""

import compile_tpu
import jax
import jax.numpy as jnp
import pytest
import targets
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

CHIPS = ("v7x",) if jax.__version_info__ >= (0, 11) else ("v5e", "v5p", "v6e")
"""Each chip once: jax 0.10 doesn't know v7x, and the others take jax 0.11 just as well (docs/measurements.md)."""


MODELS = [name for name in compile_tpu.SHAPES if name != "mistral-7b"]  # which has Llama 3.1 8B's attention to the head
SLOW = [("v6e", compile_tpu.WHOLE), *(("v5p", model) for model in MODELS if model != "smollm2-135m")]
"""The whole model, a minute or more, is compiled for the smallest chip and for that which jax 0.10 doesn't know."""
LAYERS = {"v7x": 8}
"""Of the whole model where they are unrolled, each like the others: all take minutes."""


@pytest.mark.parametrize(
    ("chip", "model"),
    [
        pytest.param(chip, model, marks=pytest.mark.slow if (chip, model) in SLOW else ())
        for chip in CHIPS
        for model in MODELS
    ],
)
def test_programs_update_the_pool_in_place_and_fit(chip, model):
    if reason := targets.why_not(chip):
        pytest.skip(reason)
    rows = compile_tpu.in_a_process(chip, model, LAYERS.get(chip))
    assert len(rows) == 5 + (6 - (chip == "v7x")) * (model == compile_tpu.WHOLE) + 3 * (model in compile_tpu.TIERED)
    for row in rows:
        assert compile_tpu.faults(row) == [], row


def test_programs_compile_where_python_numbers_have_64_bits(monkeypatch):
    if reason := targets.why_not(CHIPS[0]):
        pytest.skip(reason)
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    assert len(compile_tpu.in_a_process(CHIPS[0], "smollm2-135m")) == 8


def test_faults_are_seen():
    row = {
        "pool": 100,
        "most": 25,
        "temporary": 30,
        "peak": 90,
        "memory": 80,
        "written": True,
        "aliased": 50,
        "copies": ["copy x"],
    }
    assert len(compile_tpu.faults(row)) == 4
    row |= {"temporary": 20, "memory": 90, "aliased": 100, "copies": []}
    assert compile_tpu.faults(row) == []


@pytest.mark.parametrize(("width", "is_copied"), [(64, True), (128, False)])
def test_a_pool_that_is_laid_out_anew_is_seen(width, is_copied):
    """Rows of 64 bfloat16 are padded to 128 lanes on the way in and cut on the way out; aliased bytes don't tell."""
    if reason := targets.why_not("v5e"):
        pytest.skip(reason)
    pool = jax.ShapeDtypeStruct((8192, 16, width), jnp.bfloat16)

    def kernel(pool, moved, done):
        copy = pltpu.make_async_copy(pool.at[1], moved.at[2], done)
        copy.start()
        copy.wait()

    def move(pool):
        here = pl.BlockSpec(memory_space=pltpu.HBM)
        options = {"input_output_aliases": {0: 0}, "scratch_shapes": [pltpu.SemaphoreType.DMA]}
        return pl.pallas_call(kernel, in_specs=[here], out_specs=here, out_shape=pool, **options)(pool)

    compiled = targets.compile_for_tpu("v5e", move, pool, donate=(0,))
    assert targets.sizes(compiled)["aliased"] >= pool.size * 2
    assert bool(targets.copies_of(compiled, pool.shape, 2)) == is_copied


@pytest.mark.parametrize("rows", [32, 512])
@pytest.mark.parametrize("kind", targets.abstract_weights())
def test_weights_as_codes_are_never_widened_whole(kind, rows):
    chip = CHIPS[0]
    if reason := targets.why_not(chip):
        pytest.skip(reason)
    held = targets.abstract_weights()[kind]
    x = jax.ShapeDtypeStruct((rows, held.shape[0]), jnp.bfloat16)
    compiled = targets.compile_for_tpu(chip, targets.product_of, held, x)
    assert targets.sizes(compiled)["temporary"] < held.shape[0] * held.shape[1] * 2 / 8
