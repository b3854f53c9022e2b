"""What a policy asks of a cache and of the engine around it: the one place here that looks into policies."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import jax.numpy as jnp

from jaxkv.cache.state import CacheConfig, init_cache
from jaxkv.policies import Policy, TierPolicy
from pallas_kernels.tiers import BlockLayout


def layout_of(policy: Policy | None, head_dim: int) -> BlockLayout | None:
    """That of the quantised blocks which a policy needs; None: it needs none."""
    return policy.layout(head_dim) if isinstance(policy, TierPolicy) else None


def quantises_decoding(policy: Policy | None) -> bool:
    """Whether a decoded token is quantised at once."""
    return isinstance(policy, TierPolicy) and policy.quantises_decoding


def unquantised_tokens(policy: Policy | None) -> int | None:
    """KVs of a head that may stay unquantised when it is compressed; None: all may."""
    if not isinstance(policy, TierPolicy):
        return None
    return policy.protected_window + policy.sinks if policy.unquantised_window else 0


def decides_in_decoding(policy: Policy | None) -> Policy | None:
    """What a policy is for decoding: None where it neither observes it, nor compresses again, nor quantises."""
    if policy is None or policy.observes_decoding or policy.compress_every is not None:
        return policy
    return policy if isinstance(policy, TierPolicy) else None


def rereads(policy: Policy | None) -> bool:
    """Whether a prompt is read twice, since the policy scores by what that attends to."""
    return policy is not None and policy.rereads


def own_tokens(policy: Policy | None) -> int | None:
    """Last tokens of a prompt that nobody else may read for it: those that its policy observes, at least one.

    None: all, for a policy that observes all queries, or expects others like them.
    """
    if policy is None:
        return 1
    if policy.observed_queries is None or policy.expected_queries:
        return None
    return max(policy.observed_queries, 1)


@lru_cache(maxsize=64)
def blocks_between_parts(config: CacheConfig, policy: Policy, tokens: int) -> int:
    """Blocks that a prompt of so many tokens may hold after each part: its budget, and a half-filled block a head."""
    one = replace(config, batch=1, num_blocks=2, max_context=config.block_size, tiers=None)
    lengths = jnp.full((config.num_layers, 1, config.num_kv_heads), tokens)
    whole = replace(init_cache(one), lengths=lengths, num_tokens=jnp.array([tokens]))
    evicted = int(policy.budget.evict_blocks(whole, policy.protected_window)[0])
    return config.full_blocks(tokens) - evicted + config.heads
