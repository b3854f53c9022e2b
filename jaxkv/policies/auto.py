"""A second reading's ranking in two precisions, of all in docs/evaluation.md what kept most; or as a gate tells it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import jax.numpy as jnp

from jaxkv.compression.placement import Placement
from jaxkv.compression.scorer import Scorer
from jaxkv.policies.gate import GateWeights, LearnedGate, gate_for
from jaxkv.policies.kvzip import SecondReading
from jaxkv.policies.mixed import InTwoPrecisions
from models.interface import ModelSizes


@dataclass(frozen=True, kw_only=True)
class Auto(InTwoPrecisions):
    """KVzip's ranking, mean over the group; with ``reread=False`` a learned gate's prediction of it (``Gate``), where
    the model has one. Whether it has, ``for_model`` finds out; until then it is the second reading.

    Raises:
      ValueError: also for a gate's weights beside ``reread``.
    """

    protected_window: int = 2
    sinks: int = 4
    reread: bool = True
    """Read prompts a second time, whatever gate there is."""
    weights: GateWeights | None = None
    """The gate's; None: those that are shipped for the model, if any are."""

    def __post_init__(self) -> None:
        if self.reread and self.weights is not None:
            raise ValueError("a gate's weights are for reading once; give reread=False, or leave the weights out")
        super().__post_init__()

    def parts(self) -> tuple[Scorer, Placement]:
        """What is to be compressed again needs a gate: ``for_model`` must find one."""
        gated = not self.reread and (self.weights is not None or self.compress_every is not None)
        scorer = LearnedGate(weights=self.weights) if gated else SecondReading(group=jnp.mean)
        return scorer, self.placed()

    @property
    def method(self) -> str:
        """What scores, in words."""
        return "a gate learnt for this model" if self.weights is not None else "reading each prompt a second time"

    def for_model(self, sizes: ModelSizes) -> Self:
        """The policy with the model's gate, if it may have one; where none is shipped, one that rereads.

        Raises:
          ValueError: weights that aren't for a model of these sizes, or ``compress_every`` without a gate.
        """
        if self.reread:
            return self
        weights = self.weights or gate_for(sizes)
        if weights is None:
            return replace(self, reread=True)
        weights.check(sizes)
        return replace(self, weights=weights)
