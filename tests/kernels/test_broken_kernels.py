"""Tests of the tests: each way in which a kernel is broken here must be caught by the checks of the whole ones."""

import numpy as np
import pytest
import test_quantised_writes
import test_tiered_attention
import test_tpu_kernels
from interpreted import MODES, Interpreter
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from tiered import LAYOUTS

from pallas_kernels.paged_attention.tpu_tiers_softmax import BlockStream
from pallas_kernels.tpu_tiles import TileStream

pytestmark = pytest.mark.once


def is_caught(check, **options) -> bool:
    """Whether either mode fails, by its values or by a race."""
    for mode in MODES:
        try:
            check(Interpreter(mode), **options)
        except AssertionError:
            return True
        finally:
            pltpu.reset_tpu_interpret_mode_state()
    return False


MANY_TILES = np.array([[75, 40], [2, 33]])
"""Of these cached KVs the first core streams more tiles than it has buffers, though all queries read them at once."""
CHECKS = {
    "decode": lambda interpreter: test_tpu_kernels.check_decode(interpreter, group=2),
    "prefill": lambda interpreter: test_tpu_kernels.check_prefill(interpreter, length=18, cached=MANY_TILES),
    "writes": lambda interpreter: test_tpu_kernels.check_writes(interpreter, length=3),
    "moves": lambda interpreter: test_tpu_kernels.check_moves(interpreter, counts=[31, 20, 31, 20]),
    "tiers": lambda interpreter: test_tiered_attention.check_tpu(
        interpreter, LAYOUTS["plain"], lengths=np.array([[[150, 130]]])
    ),
    "single KVs in tiers": lambda interpreter: test_quantised_writes.check_writes(interpreter, LAYOUTS["plain"]),
}
STREAMED = ("decode", "prefill", "moves", "tiers")


def test_the_whole_kernels_pass():
    for name, check in CHECKS.items():
        assert not is_caught(check), name


def test_a_missing_wait_is_caught(monkeypatch):
    class Forgotten:
        def __init__(self, copy):
            self.start = copy.start

        def wait(self):
            pass

    whole = pltpu.make_async_copy
    monkeypatch.setattr(pltpu, "make_async_copy", lambda *a: Forgotten(whole(*a)))
    for name, check in CHECKS.items():
        assert is_caught(check), name


def test_a_wait_for_half_of_a_tile_is_caught(monkeypatch):
    waiting = []

    def half_of(whole):
        def half(self, item, tile):
            first, end = whole(self, item, tile)
            return (first, (first + end) // 2) if waiting else (first, end)

        return half

    wait = TileStream._wait

    def hasty(self, *where):
        waiting.append(True)
        wait(self, *where)
        waiting.pop()

    for stream in (TileStream, BlockStream):
        monkeypatch.setattr(stream, "_entries", half_of(stream._entries))
    monkeypatch.setattr(TileStream, "_wait", hasty)
    for name in STREAMED:
        assert is_caught(CHECKS[name]), name


def test_a_wrong_buffer_slot_is_caught(monkeypatch):
    whole = TileStream.take
    monkeypatch.setattr(TileStream, "take", lambda self, *where: lax.rem(whole(self, *where) + 1, self.tiling.buffers))
    for name in STREAMED:
        assert is_caught(CHECKS[name]), name


def test_a_slot_filled_while_it_is_in_use_is_caught(monkeypatch):
    """One more tile under way than there are free buffers."""
    whole = TileStream.start

    def greedy(self):
        whole(self)
        self._copy_next()

    monkeypatch.setattr(TileStream, "start", greedy)
    for name in STREAMED:
        assert is_caught(CHECKS[name]), name
