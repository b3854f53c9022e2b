"""H2O (arXiv 2306.14048): heavy hitters, the KVs that got the most attention of all queries so far."""

from dataclasses import dataclass

from jaxkv.compression.evict import Evict
from jaxkv.compression.observation import AllQueries
from jaxkv.compression.placement import Placement
from jaxkv.compression.policy import Method
from jaxkv.compression.scorer import Scorer
from jaxkv.compression.shares import PerHead, Shares


@dataclass(frozen=True, kw_only=True)
class SummedAttention(Scorer):
    """Attention summed over the whole prompt and over what is decoded."""

    @property
    def observes(self) -> AllQueries:
        return AllQueries()

    @property
    def observes_decoding(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class H2O(Method):
    """Attention summed over the whole prompt and, where it compresses again, over what is decoded."""

    shares: Shares = PerHead()

    def parts(self) -> tuple[Scorer, Placement]:
        return SummedAttention(), Evict(shares=self.shares)
