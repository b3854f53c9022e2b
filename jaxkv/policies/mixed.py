"""Any policy's ranking in two tiers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

from jaxkv.checks import shown
from jaxkv.compression.budget import Budget
from jaxkv.compression.placement import Placement
from jaxkv.compression.policy import Method, Policy
from jaxkv.compression.scorer import Scorer
from jaxkv.compression.tiered import K4V2, K8V4
from jaxkv.compression.two_precisions import TwoPrecisions
from pallas_kernels.quantised_block import Format


@dataclass(frozen=True, kw_only=True)
class InTwoPrecisions(Method):
    """Settings of ``TwoPrecisions``, of which a subclass names the scorer."""

    high: Format = K8V4
    low: Format = K4V2
    block_tokens: int = 64
    """KVs in a high block."""
    hadamard: bool = False
    """K and V are turned by a Hadamard matrix before they are quantised: for keys with outlier channels."""
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
