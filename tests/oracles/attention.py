"""Attention in float64: over one dense sequence, and over heads that hold different numbers of KVs.

Query heads are grouped contiguously: query head ``h`` reads KV head ``h // (heads // kv_heads)``. What can see no key
gives zeros.
"""

import numpy as np


def dense_attention(query, key, value, query_positions, key_positions, scale=None):
    """Causal by position, all heads over the same keys.

    Args:
      query: ``[t_q, heads, d]``.
      key: ``[t_k, kv_heads, d]``.
      value: like ``key``.
      query_positions: ``[t_q]``; a query sees the keys at its own position and before.
      key_positions: ``[t_k]``.
      scale: of the scores; None is ``d ** -0.5``.

    Returns:
      Output ``[t_q, heads, d]`` and probabilities ``[heads, t_q, t_k]``.
    """
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[1] // key.shape[1]
    key, value = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
    scores = np.einsum("qhd,khd->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    visible = np.asarray(key_positions)[None, :] <= np.asarray(query_positions)[:, None]
    probabilities = _softmax(np.where(visible, scores, -np.inf))
    return np.einsum("hqk,khd->qhd", probabilities, value), probabilities


def ragged_attention(query, keys, values, scale=None):
    """One query over what each KV head holds; the query comes after all of it, so nothing is masked.

    Args:
      query: ``[heads, d]``.
      keys: for each KV head ``[n_h, d]``.
      values: like ``keys``.
      scale: of the scores; None is ``d ** -0.5``.

    Returns:
      Output ``[heads, d]``, and for each KV head two arrays ``[n_h]``: the probabilities that its query group gives
      to each KV, summed over the group, and their squares, summed over the group.
    """
    query = np.asarray(query, np.float64)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outs, mass, squared = [], [], []
    for group, key, value in zip(np.split(query, len(keys)), keys, values, strict=True):
        probabilities = _softmax(group @ np.asarray(key, np.float64).T * scale)
        outs.append(probabilities @ np.asarray(value, np.float64))
        mass.append(probabilities.sum(0))
        squared.append((probabilities**2).sum(0))
    return np.concatenate(outs), mass, squared


def _softmax(scores):
    highest = scores.max(-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total > 0, total, 1)
