"""Any policy's ranking in two tiers, and ``Auto``, which is the one that kept most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Self

import jax.numpy as jnp

from jaxkv.checks import shown
from jaxkv.compression.budget import Budget
from jaxkv.compression.placement import Placement
from jaxkv.compression.policy import Method, Policy
from jaxkv.compression.scorer import Scorer
from jaxkv.compression.tiered import K4V2, K8V4
from jaxkv.compression.two_precisions import TwoPrecisions
from jaxkv.policies.gate import GateWeights, LearnedGate, gate_for
from jaxkv.policies.kvzip import SecondReading
from models.interface import ModelSizes
from pallas_kernels.quantised_block import Format


@dataclass(frozen=True, kw_only=True)
class InTwoPrecisions(Method):
    """Settings of ``TwoPrecisions``, of which a subclass names the scorer."""

    high: Format = K8V4
    low: Format = K4V2
    block_tokens: int = 64
    """KVs in a high block."""
    high_share: float = 0.5
    """Part of the budget's blocks that are of the high tier; at least those of what is protected."""
    unquantised_window: bool = False
    """What is protected, sinks and the recent window, stays as it was computed, paid for in the budget."""

    def placed(self) -> TwoPrecisions:
        return TwoPrecisions(**{each.name: getattr(self, each.name) for each in fields(TwoPrecisions)})


@dataclass(frozen=True, kw_only=True)
class Mixed(InTwoPrecisions):
    """Any policy's ranking: what ranks highest is kept at high precision, what comes next at low, the rest goes."""

    scoring: Policy
    """What ranks and protects KVs; its own budget and placement mean nothing here."""
    protected_window: int = field(init=False)
    """That of ``scoring``."""
    sinks: int = field(init=False)
    """Those of ``scoring``."""

    def __post_init__(self) -> None:
        if not isinstance(self.scoring, Policy):
            raise ValueError(f"scoring must be a policy, whose ranking is taken, got {shown(self.scoring)}")
        for name in ("protected_window", "sinks"):
            object.__setattr__(self, name, getattr(self.scoring, name))
        super().__post_init__()

    def parts(self) -> tuple[Scorer, Placement]:
        return self.scoring.scorer, self.placed()

    @classmethod
    def over(cls, scoring: Callable[..., Policy], *, budget: Budget, **settings) -> Mixed:
        """Tiers by the ranking that ``scoring`` makes of all settings that aren't the tiers' own."""
        own = {each.name: settings.pop(each.name) for each in fields(TwoPrecisions) if each.name in settings}
        ranking = scoring(budget=budget, **settings)
        return cls(budget=budget, scoring=ranking, compress_every=ranking.compress_every, **own)


@dataclass(frozen=True, kw_only=True)
class Auto(InTwoPrecisions):
    """What kept most, of all that docs/evaluation.md has: KVzip's ranking, mean over the group, in two precisions.

    For a model that has a gate (``policies.gate``) that tells the ranking, which costs nothing; for another, the prompt
    is read a second time.
    """

    protected_window: int = 2
    sinks: int = 4
    gate: GateWeights | None = None
    """None: that which is shipped for the model, where ``for_model`` is told of one that has any."""
    reread: bool = False
    """Whether the prompt is read a second time whatever the model."""

    @property
    def ranks_by(self) -> str:
        return "the model's gate" if isinstance(self.scorer, LearnedGate) else "a second reading of each prompt"

    def parts(self) -> tuple[Scorer, Placement]:
        gated = not self.reread and (self.gate is not None or self.compress_every is not None)
        return LearnedGate(weights=self.gate) if gated else SecondReading(group=jnp.mean), self.placed()

    def for_model(self, sizes: ModelSizes) -> Self:
        if self.reread:
            return self
        if self.gate is not None:
            self.gate.check(sizes)
            return self
        gate = gate_for(sizes)
        if gate is None and self.compress_every is not None:
            raise ValueError(
                f"auto with compress_every={self.compress_every} needs a gate, and none is shipped for this model: "
                "train one (scripts/train_gate.py) and give Auto(gate=GateWeights.load(...)), or leave it out"
            )
        return replace(self, gate=gate)
