"""H2O (arXiv 2306.14048): heavy hitters, the KVs that got the most attention of all queries so far."""

from dataclasses import dataclass

from jaxkv.compression.policy import ALL_QUERIES, Policy
from jaxkv.compression.shares import PerHead, Shares


@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """Attention summed over the whole prompt and, where it compresses again, over what is decoded."""

    shares: Shares = PerHead()

    @property
    def observed_queries(self) -> None:
        return ALL_QUERIES

    @property
    def observes_decoding(self) -> bool:
        return self.compress_every is not None
