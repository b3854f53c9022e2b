"""LeanKV (arXiv 2412.03131; version 3: DiffKV): significance decides between high precision, low precision, nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from jax import Array

from jaxkv.compression.budget import Budget, Unlimited
from jaxkv.compression.observation import LastQueries
from jaxkv.compression.placement import Placement
from jaxkv.compression.policy import Method
from jaxkv.compression.scorer import Scorer
from jaxkv.compression.significance import QUERIES, Significance
from jaxkv.compression.tiered import K4V2, K8V4
from jaxkv.policies.calibrated import GENERAL, Thresholds, thresholds_for
from models.interface import ModelSizes
from pallas_kernels.quantised_block import Format

UNLIMITED = Unlimited()


@dataclass(frozen=True, kw_only=True)
class HighestOfGroup(Scorer):
    """Attention of the last queries, of the query heads that share a KV the highest."""

    @property
    def observes(self) -> LastQueries:
        return LastQueries(count=QUERIES)

    def score(self, mass: Array, held: Array) -> Array:
        return mass.max(-2)


@dataclass(frozen=True, kw_only=True)
class LeanKV(Method):
    """Significance against two thresholds, or with a budget against both raised until the blocks fit; see
    ``compression.significance``."""

    budget: Budget = UNLIMITED
    high_threshold: float | None = None
    """None: that which was calibrated for the model, where ``for_model`` is told of one (``policies.calibrated``)."""
    low_threshold: float | None = None
    """None: likewise, and no higher than the other."""
    protected_window: int = 64
    by_position: bool = False
    """Compare with ``threshold / (position + 1)`` in place of ``threshold / N``, as the paper's section 4 does."""
    high: Format = K8V4
    low: Format = K4V2
    block_tokens: int = 64
    """KVs in a high block."""
    hadamard: bool = False
    """K and V are turned by a Hadamard matrix before they are quantised: for keys with outlier channels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks:
            raise ValueError(f"leankv protects no sinks, got sinks={self.sinks}; leave it out, or take mixed or auto")

    def parts(self) -> tuple[Scorer, Placement]:
        high, low = self.thresholds
        placement = Significance(
            high_threshold=high,
            low_threshold=low,
            window=self.protected_window,
            by_position=self.by_position,
            high=self.high,
            low=self.low,
            block_tokens=self.block_tokens,
            hadamard=self.hadamard,
        )
        return HighestOfGroup(), placement

    @property
    def thresholds(self) -> Thresholds:
        """The model's own fill in only by ``for_model``: here the general ones do."""
        return self._filled(GENERAL)

    def for_model(self, sizes: ModelSizes) -> Self:
        high, low = self._filled(thresholds_for(sizes))
        return replace(self, high_threshold=high, low_threshold=low)

    def _filled(self, calibrated: Thresholds) -> Thresholds:
        high = calibrated.high if self.high_threshold is None else self.high_threshold
        return Thresholds(high, min(calibrated.low, high) if self.low_threshold is None else self.low_threshold)
