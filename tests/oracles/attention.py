"""Dense attention in float64."""

import numpy as np


def dense_attention(query, key, value, query_positions, key_positions, scale=None):
    """Causal: ``[t_q, heads, d]`` over ``[t_k, kv_heads, d]`` -> output, probabilities ``[heads, t_q, t_k]``."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[1] // key.shape[1]
    key, value = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
    scores = np.einsum("qhd,khd->hqk", query, key) * (scale or query.shape[-1] ** -0.5)
    scores = np.where(key_positions[None, :] <= query_positions[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, value), weights
