"""Keeps what the prompt's last queries attend to most, like SnapKV, and the first four tokens."""

from dataclasses import dataclass

from jaxkv import Policy, Ratio, Scorer
from jaxkv.compression import LastQueries


@dataclass(frozen=True, kw_only=True)
class MeanAttention(Scorer):
    """The mean attention of the last queries."""

    queries: int = 16

    @property
    def observes(self):
        return LastQueries(count=self.queries)

    def score(self, mass, held):
        # mass: f32[layers, batch, kv_heads, group, kvs], summed over the observed queries
        return mass.mean(-2) / self.queries


policy = Policy(scorer=MeanAttention(), budget=Ratio(ratio=4), protected_window=16, sinks=4)
