"""An answer's figures, for machines and for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from jaxkv.cache.stats import CacheStats
from jaxkv.requests import Completion


def as_dict(completion: Completion) -> dict[str, Any]:
    """What ``generate --json`` prints; ``cache`` is as it was once the prompt was compressed."""
    timings = completion.timings
    made = len(completion.token_ids)
    result = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "timings": {
            **asdict(timings),
            "prefill_tokens_per_second": rate(completion.prompt_tokens, timings.prefill),
            "decode_tokens_per_second": rate(made - 1, timings.decode),
        },
        "cache": cache_dict(completion.cache),
        "cache_at_end": cache_dict(completion.cache_at_end),
    }
    if completion.logprobs is not None:
        result["logprobs"] = completion.logprobs
    if completion.top_logprobs is not None:
        result["top_logprobs"] = completion.top_logprobs
    return result


def cache_dict(cache: CacheStats) -> dict[str, Any]:
    return asdict(cache) | {"blocks_per_head": cache.blocks_per_head.tolist()}


def summary(completion: Completion) -> str:
    """A few lines: speed, cache bytes before and after, and what of it is quantised."""
    timings, cache = completion.timings, completion.cache
    prefill = rate(completion.prompt_tokens, timings.prefill)
    decode = rate(len(completion.token_ids) - 1, timings.decode)
    lines = [
        f"prompt  {completion.prompt_tokens} tokens in {timings.prefill:.2f} s ({prefill:.0f} tok/s)"
        f"    answer  {len(completion.token_ids)} tokens in {timings.decode:.2f} s ({decode:.1f} tok/s)",
        f"load {timings.load:.1f} s, compile {timings.compile:.1f} s, compress {1000 * timings.compress:.0f} ms",
        f"cache   {megabytes(cache.bytes_full)} before, {megabytes(cache.bytes_held)} after compression "
        f"({cache.bytes_full / cache.bytes_held:.2f}x): {blocks(cache)}, {cache.blocks_per_head.min()} to "
        f"{cache.blocks_per_head.max()} a head",
    ]
    if mix := tier_mix(cache):
        lines.append(f"tiers   {mix}")
    return "\n".join(lines)


def tier_mix(cache: CacheStats) -> str:
    """Each tier's share of the KVs, and what is held of the full cache; empty where nothing is quantised."""
    if cache.kvs_high + cache.kvs_low == 0:
        return ""
    shares = [100 * kvs / cache.kvs_full for kvs in (cache.kvs_high, cache.kvs_low)]
    return (
        f"{shares[0]:.1f} % of the KVs high, {shares[1]:.1f} % low; of the full cache at 16 bits "
        f"{100 * cache.nominal_share:.1f} % nominally, {100 * cache.bytes_held / cache.bytes_full_16bit:.1f} % held"
    )


def blocks(cache: CacheStats) -> str:
    """How many are kept."""
    if tier_mix(cache):
        return f"{cache.blocks_held} blocks of two precisions"
    return f"{cache.blocks_held} of {cache.blocks_full} blocks of {cache.block_size}"


def rate(count: int, seconds: float) -> float:
    """Per second; 0 where nothing was made."""
    return count / seconds if count > 0 and seconds > 0 else 0.0


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
