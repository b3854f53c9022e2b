"""Quantises everything at K8V4 and evicts nothing."""

from dataclasses import dataclass

import jax.numpy as jnp

from jaxkv import Policy, Scorer, Unlimited
from jaxkv.cache import Goal, Home
from jaxkv.compression import Tiered


@dataclass(frozen=True, kw_only=True)
class AllHigh(Tiered):
    """Each KV goes to the high tier, K8V4 unless told otherwise. The ranking and the room mean nothing here."""

    def goal(self, cache, now, worth, room):
        # now.home: i32[layers, 1, kv_heads, kvs], GONE where there is no KV; what is quantised stays as it is
        home = jnp.where(now.home == Home.RAW, Home.HIGH, now.home)
        return Goal(home=home, positions=now.positions, raw_stays=False)

    def ranks_decoded(self, scorer):
        return True  # nothing is ranked, so what was decoded can be quantised, too


everything = Policy(scorer=Scorer(), budget=Unlimited(), placement=AllHigh())
