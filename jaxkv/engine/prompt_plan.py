"""Whether a prompt can be read in a pool, and how: whole where its full cache fits, else in parts.

Each part but the last is compressed to what the whole prompt's budget leaves, before the next is read. Parts are as
large as the pool allows beside that. They follow from the sizes of pool and prompt alone, not from what else runs, so
an answer is the same in any company; but for requests that may be split to join sooner (``Scheduler``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from jaxkv.cache.config import CacheConfig
from jaxkv.compression.budget import Footprint
from jaxkv.engine.block_counts import Blocks
from jaxkv.policies import Policy
from jaxkv.requests import Request
from pallas_kernels.quantised_block import BlockLayout

UNEVEN = 1.25
"""Times the mean that one device is expected to hold of a compressed sequence at most, where heads are split over
several: a guess, which ``scripts/fullest_device.py`` measures."""
LEAST_PART = 64
"""Tokens: smaller parts would compress more often than they read."""


@dataclass(frozen=True, kw_only=True)
class PromptPlan:
    """How a prompt is read."""

    part: int
    """Tokens of a part; all of the prompt where it is read whole."""
    peak_blocks: int
    """Unquantised blocks that it holds at most while it is read."""


@dataclass(frozen=True, kw_only=True)
class Unservable:
    """Why a request can never be served."""

    reason: str


def plan_prompt(request: Request, config: CacheConfig) -> PromptPlan | Unservable:
    """How to read a request's prompt with an otherwise empty pool, or why that can't be.

    What is left once it is compressed is not known before; the engine checks it then.
    """
    tokens, policy, blocks = len(request.prompt), request.policy, config.num_blocks - 1
    here, needed = config.tiers and config.tiers.layout, policy and policy.placement.layout(config.head_dim)
    if request.context:
        return PromptPlan(part=tokens, peak_blocks=config.full_blocks(tokens) + config.heads)
    if here != needed:
        return Unservable(
            reason=f"this cache holds {_blocks_of(here)}, and the request's policy needs {_blocks_of(needed)}; "
            "give it a policy of the same kind, or run it by itself"
        )
    full, forks = config.full_blocks(tokens), forked_blocks(config, request).raw
    if policy is None:
        need = max(config.full_blocks(tokens + request.limit), full + forks)
        if need > blocks:
            return _too_large(config, tokens, need, "with its answer")
        return PromptPlan(part=tokens, peak_blocks=full + forks)
    try:
        policy.check(config)
    except ValueError as error:
        return Unservable(reason=str(error))
    if full + forks <= blocks:
        return PromptPlan(part=tokens, peak_blocks=full + forks)
    plan = plan_parts(request, policy, config, blocks)
    if plan is None:
        kept, least = blocks_between_parts(config, policy, tokens), least_part(config, policy)
        need = min(kept + config.full_blocks(least), full)
        answered = kept + config.heads + config.full_blocks(request.limit)
        return _too_large(config, tokens, need, "while it is read and compressed", advise=max(need, answered))
    return plan


def plan_parts(request: Request, policy: Policy, config: CacheConfig, blocks: int) -> PromptPlan | None:
    """How to read a prompt in as few parts as go into so many blocks; None: it can't be."""
    tokens, forks = len(request.prompt), forked_blocks(config, request).raw
    kept = blocks_between_parts(config, policy, tokens) + forks
    most = (blocks - kept) // config.heads * config.block_size
    if most < least_part(config, policy):
        return None
    part = -(-tokens // -(-tokens // most))  # as equal as can be
    return PromptPlan(part=part, peak_blocks=kept + config.full_blocks(part))


def forked_blocks(config: CacheConfig, request: Request) -> Blocks:
    """What the others that answer its prompt take at once: their own last blocks, or of what a policy changes while it
    decodes, all."""
    others, policy = request.params.n - 1, request.policy
    if request.choice or not others:
        return Blocks()
    if policy is None or not policy.acts_in_decoding:
        return Blocks(raw=others * config.heads)
    each = compressed_blocks(config, policy, len(request.prompt))
    return Blocks(raw=others * (each.raw + config.heads), quantised=others * each.quantised)


def left_blocks(config: CacheConfig, request: Request, takes: Blocks, more: int) -> Blocks:
    """What a request holds once each of its answers has so many tokens, of what its prompt took."""
    policy, answers = request.policy, 1 if request.choice else request.params.n
    if policy is None:
        return takes + Blocks(raw=answers * config.full_blocks(more))
    kept = compressed_blocks(config, policy, len(request.prompt)) + forked_blocks(config, request)
    if policy.placement.quantises_decoding:
        assert config.tiers is not None
        return kept + Blocks(quantised=answers * config.heads * config.tiers.full_blocks(more))
    return kept + Blocks(raw=answers * config.full_blocks(more))


@lru_cache(maxsize=4096)
def blocks_between_parts(config: CacheConfig, policy: Policy, tokens: int) -> int:
    """Blocks of a device that a prompt of so many tokens may hold after each part: its budget, and a half-filled block
    a head."""
    kept = policy.budget.unquantised_blocks(Footprint.of_prompt(config, tokens, policy.protected_window))
    return min(_of_device(int(kept), config), config.full_blocks(tokens)) + config.heads


def _of_device(blocks: int, config: CacheConfig) -> int:
    """Of so many blocks of a sequence, which its heads share as they need, those that one device holds at most."""
    devices = config.shards.count
    return blocks if devices == 1 else min(blocks, ceil(blocks / devices * UNEVEN))


@lru_cache(maxsize=4096)
def compressed_blocks(config: CacheConfig, policy: Policy, tokens: int) -> Blocks:
    """What a prompt of so many tokens may hold once it is compressed."""
    placement, window = policy.placement, policy.protected_window
    stays = placement.raw_tokens(window, policy.sinks)
    if config.tiers is None or stays is None:
        return Blocks(raw=blocks_between_parts(config, policy, tokens) - config.heads)
    layout, heads = config.tiers.layout, config.heads
    room = int(policy.budget.blocks(Footprint.of_prompt(config, tokens, window), layout.block_bytes))
    protected = -(-(window + policy.sinks) // layout.tokens)
    least, most = heads * max(protected, 1), heads * config.tiers.full_blocks(tokens)  # any device may hold so many
    raw = config.full_blocks(stays) + heads if stays else 0
    return Blocks(raw=raw, quantised=min(max(room, least) + heads, most, config.tiers.num_blocks - 1))


def least_part(config: CacheConfig, policy: Policy) -> int:
    """Tokens of the smallest part worth reading: what is protected of it must not be all of it."""
    least = max(LEAST_PART, 2 * policy.protected_window)
    return -(-least // config.block_size) * config.block_size


def more_memory(config: CacheConfig, blocks: int, *, quantised: bool = False) -> str:
    """What to do about a pool that is too small for so many blocks."""
    if quantised and config.tiers is not None:
        config, blocks = replace(config, tiers=replace(config.tiers, num_blocks=blocks + 1)), config.num_blocks - 1
    return f"give cache_memory of at least {config.bytes_with(blocks + 1)} bytes"


def _too_large(config: CacheConfig, tokens: int, need: int, when: str, *, advise: int | None = None) -> Unservable:
    return Unservable(
        reason=f"the prompt has {tokens} tokens and needs {need} blocks {when}, but the pool has "
        f"{config.num_blocks - 1}; {more_memory(config, advise or need)}, or shorten it"
    )


def _blocks_of(layout: BlockLayout | None) -> str:
    return (
        "unquantised blocks"
        if layout is None
        else f"blocks of {layout.tokens} tokens {layout.high} and {layout.low}{', turned' * layout.hadamard}"
    )
