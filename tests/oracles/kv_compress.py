"""KV-Compress (arXiv 2410.00161) step by step, as its text and its authors' code say.

Where these two differ, the code decides: the prompt's metric is pooled in each query head before the group is joined.

How ties break. Heads are those of one sequence over all layers, flat in (layer, head) order. A head's KVs are ordered
by (score, index). To give up its row ``j`` (its ``j + 1``-th block) a head must lose the first ``j * b + hang`` of
them, ``hang`` being the KVs in its last block; the score of the last of these is the row's threshold. Rows go in the
order of (threshold, head, row). A walk over single KVs frees a row when it comes to the row's last KV, so a walk in
the order of (score, head, index) frees rows in just that order, whatever scores are equal: within a score it finishes
one head before the next. A walk in the order of (score, index, head) would not.
"""

import math

import numpy as np

NORMS = {"l1": np.positive, "l2": np.square}
GROUPS = {"sum": np.sum, "mean": np.mean, "max": np.max}


def prefill_metric(probabilities, kv_heads, window, norm="l2", group="sum", pool=7, buffer=0):
    """Section 3: what a prompt's queries give to each of its KVs, ``[kv_heads, t_k]``.

    Square, mask, sum over queries, max-pool over keys in each query head, join the query group.

    Args:
      probabilities: ``[heads, t_q, t_k]`` of all keys of the prompt and its last ``t_q`` queries.
      kv_heads: how many.
      window: how many of the last queries count; None counts all.
      norm: ``"l2"`` squares probabilities, ``"l1"`` takes them as they are.
      group: ``"sum"``, ``"mean"`` or ``"max"`` over a KV head's query heads.
      pool: odd width of the max-pool; 1 pools nothing.
      buffer: a query counts for the keys at least so many positions before it.
    """
    if pool % 2 == 0:
        raise ValueError(f"a max-pool has an odd width: {pool=}")
    heads, queries, keys = probabilities.shape
    query_positions = np.arange(keys - queries, keys)
    counts = np.arange(keys)[None, :] <= query_positions[:, None] - buffer
    if window is not None:
        counts &= query_positions[:, None] >= keys - window
    summed = np.where(counts, NORMS[norm](probabilities), 0).sum(1)
    pooled = np.zeros_like(summed)
    for j in range(keys):
        pooled[:, j] = summed[:, max(0, j - pool // 2) : j + pool // 2 + 1].max(1)
    return GROUPS[group](pooled.reshape(kv_heads, heads // kv_heads, keys), axis=1)


def decode_metric(probabilities, kv_heads, key_positions, query_position, norm="l2", group="sum", buffer=0):
    """Equation 20: what one decoded query adds to each KV, ``[kv_heads, t_k]``.

    ``probabilities``: ``[heads, t_k]``. ``key_positions``: ``[t_k]``, or ``[kv_heads, t_k]`` where heads differ. The
    rest as for ``prefill_metric``.
    """
    heads, keys = probabilities.shape
    grouped = NORMS[norm](probabilities).reshape(kv_heads, heads // kv_heads, keys)
    counts = np.asarray(key_positions)[..., None, :] <= query_position - buffer
    return GROUPS[group](np.where(counts, grouped, 0), axis=1)


def evict_count(lengths, block_size, prompt_length, *, max_cache_tokens=None, keep_ratio=None, protected_window):
    """Blocks that a sequence should give up; ``max_evictable`` says how many it can.

    Args:
      lengths: ``[layers, heads]`` KVs held.
      block_size: KVs a block.
      prompt_length: tokens read so far.
      max_cache_tokens: a cap on tokens a head, on average over heads; it rounds up to whole blocks.
      keep_ratio: or the fraction of the KVs that stays, not counting the protected ones, all of which do.
      protected_window: newest tokens that stay.
    """
    if (max_cache_tokens is None) == (keep_ratio is None):
        raise ValueError(f"give one of the two: {max_cache_tokens=} {keep_ratio=}")
    lengths = np.asarray(lengths)
    heads = lengths.size
    if max_cache_tokens is not None:
        held = sum(math.ceil(n / block_size) for n in lengths.flat)
        return max(0, held - math.ceil(max_cache_tokens / block_size) * heads)
    protected_tokens = math.ceil(protected_window / block_size) * block_size
    compressible = prompt_length - protected_tokens
    if compressible <= 0:
        return 0
    target = math.ceil(compressible * heads * float(keep_ratio)) + protected_tokens * heads
    return math.ceil(max(0, int(lengths.sum()) - target) / block_size)


def protected(positions, last_position, window, sinks):
    """KVs that always stay, ``bool`` like ``positions``: the newest and the first.

    ``last_position`` is that of the token that is sampled and not yet cached. It belongs to the window, so of the KVs
    that are cached ``window - 1`` are protected.
    """
    positions = np.asarray(positions)
    return (positions > last_position - window) | (positions < sinks)


def hang_of(length, block_size):
    """KVs in a head's last block, from 1 to the block size."""
    return (length - 1) % block_size + 1


def max_evictable(lengths, block_size, protected_counts):
    """Most blocks that a sequence can give up, from the KVs that each head holds and those of them that must stay.

    By definition: ``j + 1`` blocks of a head can go if ``j * b + hang`` of its KVs can. That equals
    ``ceil(length / b) - ceil(protected / b)``, in which only the number of protected KVs counts and not where they
    stand, since survivors move together. It holds with sinks too, provided that they are in the number; the window's
    ``window - 1`` alone would promise too much.
    """
    most = 0
    for length, kept in zip(np.ravel(lengths), np.ravel(protected_counts), strict=True):
        free_to_go, hang = int(length) - int(kept), hang_of(int(length), block_size)
        if free_to_go >= hang:
            most += (free_to_go - hang) // block_size + 1
    return most


def evict_greedy(scores, evictable, block_size, evict_blocks):
    """Section 4 as a walk: the lowest KVs go one by one, and a head frees a block when enough of its own have gone.

    Each head counts down from ``hang``, then from ``b``; at zero it has freed a block. The walk ends with
    ``evict_blocks`` blocks, or with no KV left, and what went since a head's last block stays after all.

    Args:
      scores: for each head ``[n_h]``, no NaN.
      evictable: for each head ``bool[n_h]``.
      block_size: KVs a block.
      evict_blocks: as many as there are, if fewer can be had.

    Returns:
      Blocks given up by each head, and the set of indices that each head loses.
    """
    _check(scores)
    left = [hang_of(len(head), block_size) for head in scores]
    gone: list[list[int]] = [[] for _ in scores]
    given = [0] * len(scores)
    evicted: list[set[int]] = [set() for _ in scores]
    walk = sorted((s, head, i) for head in range(len(scores)) for i, s in _candidates(scores, evictable, head))
    for _, head, index in walk:
        if sum(given) >= evict_blocks:
            break
        gone[head].append(index)
        left[head] -= 1
        if left[head] == 0:
            left[head] = block_size
            given[head] += 1
            evicted[head] = set(gone[head])
    return given, evicted


def evict_threshold(scores, evictable, block_size, evict_blocks):
    """Section 4 as a sort: each head prices its blocks, and the cheapest of all heads go. Like ``evict_greedy``."""
    _check(scores)
    ascending, rows = [], []
    for head in range(len(scores)):
        ascending.append(sorted((s, i) for i, s in _candidates(scores, evictable, head)))
        last = range(hang_of(len(scores[head]), block_size) - 1, len(ascending[head]), block_size)
        rows += [(ascending[head][at][0], head, row) for row, at in enumerate(last)]
    taken = sorted(rows)[: max(0, evict_blocks)]
    given = [sum(head == h for _, h, _ in taken) for head in range(len(scores))]
    lost = [evicted_kvs(len(s), k, block_size) for s, k in zip(scores, given, strict=True)]
    return given, [{i for _, i in order[:n]} for order, n in zip(ascending, lost, strict=True)]


def _candidates(scores, evictable, head):
    return [(i, float(s)) for i, s in enumerate(scores[head]) if evictable[head][i]]


def _check(scores):
    if any(np.isnan(np.asarray(head, np.float64)).any() for head in scores):
        raise ValueError("scores have no order where one of them is NaN")


def evicted_kvs(length, blocks, block_size):
    """KVs that a head loses with so many blocks."""
    return (blocks - 1) * block_size + hang_of(length, block_size) if blocks > 0 else 0


def after_lengths(lengths, k, block_size):
    """KVs that heads hold once each has given up ``k`` blocks, like ``lengths``; whole blocks where it gave any."""
    lengths, k = np.asarray(lengths), np.asarray(k)
    lost = [evicted_kvs(int(n), int(blocks), block_size) for n, blocks in zip(lengths.flat, k.flat, strict=True)]
    return lengths - np.array(lost, lengths.dtype).reshape(lengths.shape)


def compact(head_kvs, evicted):
    """Algorithm 1 with two fingers: survivors from the end of a head go into the holes at its beginning.

    Returns:
      Moves ``[(source, destination), ...]`` of logical indices, and how many KVs are left.
    """
    length = len(head_kvs)
    if not set(evicted) <= set(range(length)):
        raise ValueError(f"a head of {length} KVs can't lose {sorted(evicted)}")
    moves = []
    holes = sorted(evicted)
    for source in range(length - 1, -1, -1):
        if source in evicted:
            continue
        if len(moves) == len(holes) or holes[len(moves)] >= source:
            break
        moves.append((source, holes[len(moves)]))
    return moves, length - len(holes)


def apply_moves(head_kvs, moves, new_len):
    """A head's KVs after ``compact``, in their new order: a list or an array, as before."""
    moved = head_kvs.copy()
    for source, destination in moves:
        moved[destination] = head_kvs[source]
    return moved[:new_len]
