"""Runs TPU kernels in the interpreter, under both orders of copying, with races looked for and scratch full of NaN."""

import jax
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

MODES = ("on_wait", "eager")
"""A copy happens when it is waited for, or at once: a missing wait shows in the one, an early copy in the other."""


class Interpreter:
    def __init__(self, mode: str):
        self.params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", dma_execution_mode=mode)

    def run(self, kernel, *arguments, **options):
        """What the kernel returns; fails where it raced."""
        try:
            results = kernel(*arguments, interpret=self.params, **options)
            jax.block_until_ready(results)
        except BaseException:
            pltpu.reset_tpu_interpret_mode_state()
            raise
        if interpret_pallas_call.races.races_found:
            raise RaceError(kernel.__name__)
        return results


@pytest.fixture
def eager():
    """One order of copying, which is enough for what changes the arithmetic alone."""
    yield Interpreter("eager")
    pltpu.reset_tpu_interpret_mode_state()


class RaceError(AssertionError):
    """Two accesses of one memory, at least one a write, that nothing orders."""


@pytest.fixture(params=MODES)
def interpreter(request):
    yield Interpreter(request.param)
    pltpu.reset_tpu_interpret_mode_state()
