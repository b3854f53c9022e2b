"""StreamingLLM (arXiv 2309.17453): the first tokens, which soak up attention, and the newest."""

from dataclasses import dataclass

from jax import Array

from jaxkv.compression.evict import Evict
from jaxkv.compression.placement import Placement
from jaxkv.compression.policy import Method
from jaxkv.compression.scorer import Scorer
from jaxkv.compression.shares import PerHead, Shares


@dataclass(frozen=True, kw_only=True)
class Newest(Scorer):
    """Oldest first."""

    @property
    def settled(self) -> bool:
        return True

    @property
    def ranks_decoded(self) -> bool:
        return True

    def rank(self, scores: Array, positions: Array) -> Array:
        return positions.astype(scores.dtype)


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Method):
    """Oldest first, but for the sinks. Keys keep the rotation of their place in the text, gaps and all."""

    sinks: int = 4
    shares: Shares = PerHead()

    def parts(self) -> tuple[Scorer, Placement]:
        return Newest(), Evict(shares=self.shares)
