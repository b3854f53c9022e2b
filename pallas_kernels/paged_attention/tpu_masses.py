"""What a row's queries put on its KVs, once its softmax is known: a second pass over the logits, in a TPU kernel."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.types import Observe
from pallas_kernels.tpu_tiles import Tiling
from pallas_kernels.tpu_values import LANES, ceil_div, floor_div

TOGETHER = 2
"""Tiles of a pass, whose latencies overlap, and of a copy."""
STAGES = 4
"""Copies under way, a power of two."""


def passes(tiles: Tiling) -> int:
    """Of a row as long as its table."""
    return -(-tiles.tiles // TOGETHER)


def _of_a_pass(tiles: Tiling) -> tuple[int, int]:
    """Its masses in rows of 128: so they all are an array like that of the scores, and nothing lays it out anew."""
    lanes = math.gcd(tiles.kvs, LANES)
    return TOGETHER * tiles.kvs // lanes, lanes


def masses_shape(tiles: Tiling, rows: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows * passes(tiles), *_of_a_pass(tiles)), jnp.float32)


class Kept:
    """A row's logits, and masses on their way to HBM. What a row doesn't hold is not written, but for an odd tile."""

    def __init__(self, observe: Observe, masses: Any, logits: Any, stages: Any, stored: Any, turn: Any):
        """How masses are made, an array of ``masses_shape`` in HBM, and what ``scratch_shapes`` asked for."""
        self.observe, self.masses, self.logits = observe, masses, logits
        self.stages, self.stored, self.turn = stages, stored, turn

    @staticmethod
    def scratch_shapes(tiles: Tiling, group: int) -> tuple[Any, Any, Any, Any]:
        """Logits, masses and their semaphores, and how many copies there were."""
        return (
            pltpu.VMEM((passes(tiles), TOGETHER, group, tiles.kvs), jnp.float32),
            pltpu.VMEM((STAGES, *_of_a_pass(tiles)), jnp.float32),
            pltpu.SemaphoreType.DMA((STAGES,)),
            pltpu.SMEM((1,), jnp.int32),
        )

    def start(self) -> None:
        """Before the first row."""
        self.turn[0] = 0

    def keep(self, tile: Array, logits: Array) -> None:
        part = floor_div(tile, TOGETHER)
        self.logits[part, tile - TOGETHER * part] = logits

    def store(self, row: Array, tiles: Array, maximum: Array, share: Array) -> None:
        """Begins to copy the masses of a row's tiles, of which all logits are kept.

        Args:
          row: whose.
          tiles: that it has.
          maximum: of its logits, ``[group, 1]``.
          share: 1 / the sum of its softmax, ``[group, 1]``.
        """

        def normalise(part: Array, _: None) -> None:
            masses = self.observe(jnp.exp(self.logits[part] - maximum) * share)
            turn = self.turn[0]
            stage = turn & (STAGES - 1)
            pl.when(turn >= STAGES)(lambda: self._wait(stage))
            height, lanes = self.stages.shape[1:]
            a_tile = height // TOGETHER
            for i in range(a_tile):
                self.stages[stage, pl.ds(i, TOGETHER, a_tile)] = masses[:, i * lanes : (i + 1) * lanes]
            target = self.masses.at[row * self.logits.shape[0] + part]
            pltpu.make_async_copy(self.stages.at[stage], target, self.stored.at[stage]).start()
            self.turn[0] = turn + 1

        lax.fori_loop(0, ceil_div(tiles, TOGETHER), normalise, None)

    def end(self) -> None:
        """After the last row."""
        for stage in range(STAGES):
            pl.when(self.turn[0] > stage)(partial(self._wait, stage))

    def _wait(self, stage: Array | int) -> None:
        pltpu.make_async_copy(self.stages.at[stage], self.stages.at[stage], self.stored.at[stage]).wait()
