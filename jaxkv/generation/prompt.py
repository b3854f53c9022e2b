"""A prompt that is being read, chunk by chunk: what is known of it so far beside the cache."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import Array

from jaxkv.cache.shards import by_head
from jaxkv.cache.state import PagedCache
from jaxkv.compression.observation import ExpectedQueries, Nothing, Observation
from jaxkv.compression.policy import Policy
from jaxkv.generation.query_moments import QueryMoments
from models.interface import Decoder, Rotary


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PromptState:
    """What reading has found so far."""

    mass: Array | None = field(metadata=by_head(2))
    """``f32[layers, batch, heads, capacity]``: observed attention on each KV so far; None: none is observed."""
    end: Array
    """``i32[batch]``: position after the prompt's last token."""
    lengths: Array
    """``i32[batch]``: tokens of this prompt."""
    hidden: Array
    """``[batch, hidden]`` of the last token read."""
    granted: Array
    """``bool[]``: all chunks so far found room. What comes after one that did not is read no more."""
    queries: QueryMoments | None = None
    """Of this prompt's queries so far, where a policy expects others like them."""
    fresh: bool = field(default=False, metadata={"static": True})
    """The sequences held nothing before, so there is nothing quantised to read."""

    def rows(self, which: Array) -> PromptState:
        """Of only these prompts, ``i32[n]``; see ``with_rows``."""
        return replace(
            self,
            mass=None if self.mass is None else self.mass[:, which],
            end=self.end[which],
            lengths=self.lengths[which],
            hidden=self.hidden[which],
            queries=None if self.queries is None else self.queries.rows(which),
        )

    def with_rows(self, part: PromptState, which: Array) -> PromptState:
        """Of all prompts again: ``which`` of them from ``part``, the others from this one."""
        queries = None if self.queries is None or part.queries is None else self.queries.with_rows(part.queries, which)
        return replace(
            self,
            mass=None if self.mass is None else self.mass.at[:, which].set(part.mass),
            end=self.end.at[which].set(part.end),
            lengths=self.lengths.at[which].set(part.lengths),
            hidden=self.hidden.at[which].set(part.hidden),
            granted=self.granted & part.granted,
            queries=queries,
        )


def start_prompt(
    model: Decoder, cache: PagedCache, lengths: Array, policy: Policy | None, *, fresh: bool = False
) -> PromptState:
    """Before the first chunk of prompts of ``i32[batch]`` lengths; ``fresh`` where the sequences hold nothing."""
    sizes, observes = model.sizes, observation_of(policy)
    layers, batch, _ = cache.raw.lengths.shape
    mass = jnp.zeros((layers, batch, sizes.num_heads, cache.capacity), jnp.float32) if observes.watches else None
    return PromptState(
        mass=mass,
        end=cache.num_tokens + lengths,
        lengths=jnp.copy(lengths),  # the caller's own outlives the state's donation
        hidden=jnp.zeros((batch, sizes.hidden_size), jnp.float32),
        granted=jnp.bool_(True),
        queries=QueryMoments.none(sizes, batch) if isinstance(observes, ExpectedQueries) else None,
        fresh=fresh,
    )


def rotary(model: Decoder) -> Rotary:
    """The model, as one that tells its rotation.

    Raises:
      ValueError: it doesn't.
    """
    if not isinstance(model, Rotary):
        raise ValueError(
            f"the policy expects queries at later positions, and {type(model).__name__} has no rotation(layer, "
            "positions) to turn them there (models.Rotary); give it one, or take another policy"
        )
    return model


def observation_of(policy: Policy | None) -> Observation:
    """Whose attention a policy wants to know of; without a policy nobody's."""
    return Nothing() if policy is None else policy.scorer.observes
