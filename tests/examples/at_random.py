"""Keeps KVs at random: the baseline that observes nothing."""

from dataclasses import dataclass

import jax

from jaxkv import Policy, Scorer


@dataclass(frozen=True, kw_only=True)
class AtRandom(Scorer):
    """A KV is worth what its place in the text, its head and the seed draw for it."""

    seed: int = 0

    @property
    def ranks_decoded(self):
        return True

    def rank(self, scores, positions):
        # positions: i32[layers, 1, kv_heads, kvs]; the same draw each time, whatever was evicted meanwhile
        layers, _, heads, _ = positions.shape
        keys = jax.random.split(jax.random.key(self.seed), (layers, 1, heads, 1))
        return jax.vmap(lambda key, at: jax.random.uniform(jax.random.fold_in(key, at)))(
            jax.numpy.broadcast_to(keys, positions.shape).reshape(-1), positions.reshape(-1)
        ).reshape(positions.shape)


at_random = Policy(scorer=AtRandom(), ratio=4)
