"""Why somebody can't be answered after all, though its prompt could be read: what it says then."""

from __future__ import annotations

import numpy as np

from jaxkv.cache.config import CacheConfig
from jaxkv.engine.block_counts import BlockCounts, Blocks
from jaxkv.engine.prompt_plan import compressed_blocks, more_memory
from jaxkv.engine.reading import PromptInProgress
from jaxkv.requests import Request


def too_large(config: CacheConfig, counts: BlockCounts, row: int, request: Request, more: Blocks) -> str | None:
    """Why an answer can't be given to a prompt that is read and compressed; None where it can."""
    total = counts.total
    if config.tiers is not None and counts.left_unquantised(row, request.policy):
        whole = config.heads * config.tiers.full_blocks(len(request.prompt) + request.limit)
        return (
            f"the prompt doesn't fit its {total.quantised} quantised blocks; "
            f"{more_memory(config, whole, quantised=True)}, a smaller budget, or shorten it"
        )
    held, policy, tokens = counts.held(row), request.policy, request.until_compressed
    if policy is not None and tokens < request.limit:
        whole = len(request.prompt) + request.limit
        held = held.or_more(compressed_blocks(config, policy, whole))
        if not policy.placement.quantises_decoding:
            more = more.or_more(Blocks(raw=config.full_blocks(tokens)))
    if held + more <= total:
        return None
    quantised, held, more = bool(np.all(held.raw + more.raw <= total.raw)), held.fullest, more.fullest
    have, grows = (held.quantised, more.quantised) if quantised else (held.raw, more.raw)
    when = "once it is read" if tokens == request.limit else "whenever it is compressed"
    return (
        f"the prompt holds {have} blocks {when}, but {tokens} more tokens may need {grows}; "
        f"{more_memory(config, have + grows, quantised=quantised)}, or ask for fewer tokens"
    )


def parts_too_large(config: CacheConfig, counts: BlockCounts, prompt: PromptInProgress) -> str | None:
    """Why the next part can't be read beside what is left of those before; None where it can."""
    held = counts.held(prompt.row).fullest.raw
    need = held + config.full_blocks(prompt.part_length)
    if need <= prompt.most.raw:
        return None
    return (
        f"the prompt holds {held} blocks once {prompt.read} of its {prompt.total} tokens are read and compressed, "
        f"so {need} with the next part, and may hold {prompt.most.raw}; protect less, or give more memory"
    )


def alone_too_large(counts: BlockCounts, row: int) -> str:
    """What is said where an answer can't go on though nobody else is left."""
    held, total = counts.held(row).fullest, counts.total
    return (
        f"the answer can't go on: a device holds {held.raw} of its {total.raw} blocks for it alone, and "
        f"{held.quantised} of its {total.quantised} quantised ones; give more cache_memory, or ask for less"
    )
