"""KV-Compress (arXiv 2410.00161) step by step, as its text and its authors' code say."""

import math

import numpy as np


def prefill_metric(probabilities, kv_heads, window, norm, group, pool, buffer):
    """Section 3: ``[heads, t, t]`` -> ``[kv_heads, t]``. Square, mask, sum over queries, pool, join the group."""
    heads, queries, keys = probabilities.shape
    counted = probabilities**2 if norm == "l2" else probabilities
    old_enough = np.arange(keys)[None, :] <= np.arange(queries)[:, None] - buffer
    first = 0 if window is None else max(0, queries - window)
    summed = (counted * old_enough)[:, first:].sum(1)
    reach = pool // 2
    pooled = np.stack([summed[:, max(0, j - reach) : j + reach + 1].max(1) for j in range(keys)], axis=1)
    return getattr(np, group)(pooled.reshape(kv_heads, heads // kv_heads, keys), axis=1)


def decode_metric(probabilities, kv_heads, key_positions, query_position, norm, group, buffer):
    """Equation 20: what one decoded query, ``[heads, t]``, adds to each KV, ``[kv_heads, t]``."""
    counted = probabilities**2 if norm == "l2" else probabilities
    counted = counted * (key_positions <= query_position - buffer)
    return getattr(np, group)(counted.reshape(kv_heads, -1, probabilities.shape[-1]), axis=1)


def evict_count(lengths, block_size, prompt_length, *, protected_window, max_cache_tokens=None, keep_ratio=None):
    """Blocks that a sequence gives up, by a cap on tokens a head or by the fraction of KVs that stays."""
    heads = lengths.size
    if max_cache_tokens is not None:
        held = sum(math.ceil(n / block_size) for n in lengths.flat)
        return max(0, held - math.ceil(max_cache_tokens / block_size) * heads)
    protected = math.ceil(protected_window / block_size) * block_size
    compressible = prompt_length - protected
    if compressible <= 0:
        return 0
    target = math.ceil(compressible * heads * float(keep_ratio)) + protected * heads
    return math.ceil(max(0, int(lengths.sum()) - target) / block_size)


def evict_greedy(scores, evictable, block_size, evict_blocks):
    """The greedy walk: all KVs in ascending (score, head, index); a head whose counter runs out frees a block.

    ``scores`` and ``evictable`` are lists over heads, scores all distinct. Returns blocks given up and the set of
    evicted indices of each head.
    """
    counters = [((len(s) - 1) % block_size) + 1 for s in scores]
    walked = [[] for _ in scores]
    given, gone, freed = [0] * len(scores), [set() for _ in scores], 0
    order = sorted((s[i], h, i) for h, s in enumerate(scores) for i in range(len(s)) if evictable[h][i])
    for _, head, index in order:
        if freed == evict_blocks:
            break
        walked[head].append(index)
        counters[head] -= 1
        if counters[head] == 0:
            given[head] += 1
            gone[head] = set(walked[head])
            counters[head] = block_size
            freed += 1
    return given, gone
