"""Whether a prompt can be read in a pool, and how: whole where its full cache fits, else in parts.

Each part but the last is compressed to what the whole prompt's budget leaves, before the next is read. Parts are as
large as the pool allows beside that. They follow from the sizes of pool and prompt alone, not from what else runs, so
an answer is the same in any company.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from jaxkv.cache.config import CacheConfig
from jaxkv.compression.budget import Footprint
from jaxkv.policies import Policy
from jaxkv.requests import Request
from pallas_kernels.quantised_block import BlockLayout

LEAST_PART = 64
"""Tokens: smaller parts would compress more often than they read."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a prompt is read."""

    part: int
    """Tokens of a part; all of the prompt where it is read whole."""
    peak: int
    """Blocks that it holds at most while it is read."""


def plan_reading(request: Request, config: CacheConfig) -> Reading | None:
    """How to read a request's prompt with an otherwise empty pool; None where that can't be."""
    tokens, policy, blocks = len(request.prompt), request.policy, config.num_blocks - 1
    full = config.full_blocks(tokens)
    if full <= blocks:
        return Reading(part=tokens, peak=full)
    if policy is None:
        return None
    kept = blocks_between_parts(config, policy, tokens)
    most = (blocks - kept) // config.heads * config.block_size
    if most < least_part(config, policy):
        return None
    part = -(-tokens // -(-tokens // most))  # so many parts as there must be, as equal as can be
    return Reading(part=part, peak=kept + config.full_blocks(part))


def least_part(config: CacheConfig, policy: Policy) -> int:
    """Tokens of the smallest part worth reading: what is protected of it must not be all of it."""
    least = max(LEAST_PART, 2 * policy.protected_window)
    return -(-least // config.block_size) * config.block_size


@lru_cache(maxsize=64)
def blocks_between_parts(config: CacheConfig, policy: Policy, tokens: int) -> int:
    """Blocks that a prompt of so many tokens may hold after each part: its budget, and a half-filled block a head."""
    kept = policy.budget.unquantised_blocks(Footprint.of_prompt(config, tokens, policy.protected_window))
    return min(int(kept), config.full_blocks(tokens)) + config.heads


def refusal(request: Request, config: CacheConfig) -> str | None:
    """Why a request can never be served; None where it may be. What is left once it is compressed is checked then."""
    prompt, policy, blocks = len(request.prompt), request.policy, config.num_blocks - 1
    layout = policy.placement.layout(config.head_dim) if policy is not None else None
    if layout != (config.tiers.layout if config.tiers is not None else None):
        return (
            f"this cache holds {_blocks_of(config.tiers.layout if config.tiers is not None else None)}, and the "
            f"request's policy needs {_blocks_of(layout)}; give it a policy of the same kind, or run it by itself"
        )
    if policy is not None:
        try:
            policy.check(config)
        except ValueError as error:
            return str(error)
    if policy is None:
        need = config.full_blocks(prompt + request.limit)
        if need <= blocks:
            return None
        what = f"needs {need} blocks with its answer"
    else:
        if plan_reading(request, config) is not None:
            return None
        need = blocks_between_parts(config, policy, prompt) + config.full_blocks(least_part(config, policy))
        need = min(need, config.full_blocks(prompt))
        what = f"needs {need} blocks while it is read and compressed"
    more = more_memory(config, need)
    return f"the prompt has {prompt} tokens and {what}, but the pool has {blocks}; {more}, or shorten it"


def more_memory(config: CacheConfig, blocks: int, *, quantised: bool = False) -> str:
    """What to do about a pool that is too small for so many blocks."""
    if quantised and config.tiers is not None:
        config, blocks = replace(config, tiers=replace(config.tiers, num_blocks=blocks + 1)), config.num_blocks - 1
    return f"give cache_memory of at least {config.bytes_with(blocks + 1)} bytes"


def _blocks_of(layout: BlockLayout | None) -> str:
    return (
        "unquantised blocks" if layout is None else f"blocks of {layout.tokens} tokens {layout.high} and {layout.low}"
    )
