"""From lessons to a gate's weights: each layer's heads by themselves, in closed form and then by descent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from numpy.typing import NDArray
from tqdm import tqdm

from jaxkv.policies.gate import GateWeights, told

KEPT = (0.71, 0.35, 0.18, 0.09, 0.045)
"""Parts of the KVs that two precisions keep at 4x, 8x, 16x, 32x and 64x: whether a KV is among them is what the gate
has to tell."""
RATIOS = (4, 8, 16, 32)
RIDGE = 1e-4
"""Penalty of the closed form, as a part of each feature's own mean square."""
Floats = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to fit."""

    units: int = 16
    """Of the hidden layer; 0: the closed form is all."""
    epochs: int = 8
    batch: int = 1536
    """KVs of each head a step."""
    rate: float = 3e-3
    slope: float = 4.0
    """How sharply a score has to tell that a KV is kept: it does so by e-fold in a ``slope``-th of its logarithm."""
    squares: float = 0.05
    """Weight of the logarithm's squared error beside that."""


def read(files: Sequence[Path], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """K before RoPE and V, ``f32[kv_heads, kvs, 2 * head_dim]``, and scores' logarithms, of all texts."""
    parts = [np.asarray(np.load(file, mmap_mode="r")[layer], np.float32) for file in files]
    whole = np.concatenate(parts, axis=1)
    return whole[..., :-1], whole[..., -1]


def thresholds(files: Sequence[Path]) -> np.ndarray:
    """``f32[len(KEPT)]``: scores' logarithms above which that part of all heads' KVs lies."""
    some = np.concatenate([np.load(file, mmap_mode="r")[..., ::7, -1].ravel() for file in files])
    return np.quantile(some.astype(np.float32), [1 - part for part in KEPT]).astype(np.float32)


def in_closed_form(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Ridge regression on ``x``, its squares and 1: ``f32[kv_heads, 2 * features + 1]``."""
    seen = np.concatenate([x, x**2, np.ones_like(x[..., :1])], axis=-1)
    fits = []
    for head, target in zip(seen, y, strict=True):
        products = head.T @ head
        penalty = np.diag(products) * RIDGE
        penalty[-1] = 0
        fits.append(np.linalg.solve(products.astype(np.float64) + np.diag(penalty), head.T @ target))
    return np.stack(fits).astype(np.float32)


def loss(weights: dict[str, Array], x: Array, y: Array, bounds: Array, recipe: Recipe) -> Array:
    """How well it is told which KVs are kept, at all ratios, and a little how well the logarithm itself."""
    said = told(**weights, x=x)
    kept = (y[..., None] > bounds).astype(jnp.float32)
    ranks = optax.sigmoid_binary_cross_entropy((said[..., None] - bounds) * recipe.slope, kept)
    return ranks.mean() + recipe.squares * ((said - y) ** 2).mean()


@partial(jax.jit, static_argnames="recipe")
def descend(weights: dict[str, Array], x: Array, y: Array, bounds: Array, key: Array, recipe: Recipe):
    """Weights after so many epochs of AdamW, of a layer."""
    kvs = x.shape[1]
    batch = min(recipe.batch, kvs)
    steps = kvs // batch
    rate = optax.cosine_onecycle_schedule(steps * recipe.epochs, recipe.rate, pct_start=0.1)
    adam = optax.adamw(rate, weight_decay=1e-4)

    def step(state, which):
        weights, memory = state
        slopes = jax.grad(loss)(weights, x[:, which], y[:, which], bounds, recipe)
        updates, memory = adam.update(slopes, memory, weights)
        return (optax.apply_updates(weights, updates), memory), None

    def epoch(state, key):
        order = jax.random.permutation(key, kvs)[: steps * batch].reshape(steps, batch)
        return jax.lax.scan(step, state, order)

    return jax.lax.scan(epoch, (weights, adam.init(weights)), jax.random.split(key, recipe.epochs))[0][0]


def fit_layer(x: np.ndarray, y: np.ndarray, bounds: np.ndarray, recipe: Recipe, seed: int) -> dict[str, np.ndarray]:
    """``GateWeights`` of one layer, by their names."""
    mean, scale = x.mean(1), x.std(1) + 1e-3
    x = (x - mean[:, None]) / scale[:, None]
    heads, _, width = x.shape
    first, later = jax.random.split(jax.random.key(seed))
    weights = {
        "linear": jnp.asarray(in_closed_form(x, y)),
        "hidden": jax.random.normal(first, (heads, width + 1, recipe.units)) / np.sqrt(width),
        "output": jnp.zeros((heads, recipe.units)),
    }
    if recipe.units:
        weights["hidden"] = weights["hidden"].at[:, -1].set(0.0)
        weights = descend(weights, jnp.asarray(x), jnp.asarray(y), jnp.asarray(bounds), later, recipe)
    return of_raw(jax.device_get(weights), mean, scale)


def of_raw(weights: dict[str, np.ndarray], mean: np.ndarray, scale: np.ndarray) -> dict[str, np.ndarray]:
    """The same function of what isn't normalised, from weights of ``(x - mean) / scale``."""
    first, second, one = np.split(weights["linear"], [mean.shape[1], 2 * mean.shape[1]], axis=-1)
    first, second = first / scale, second / scale**2
    one = one + (second * mean**2 - first * mean).sum(-1, keepdims=True)
    hidden = weights["hidden"][:, :-1] / scale[..., None]
    bias = weights["hidden"][:, -1:] - (hidden * mean[..., None]).sum(1, keepdims=True)
    return {
        "linear": np.concatenate([first - 2 * second * mean, second, one], axis=-1),
        "hidden": np.concatenate([hidden, bias], axis=1),
        "output": weights["output"],
    }


def fit(files: Sequence[Path], frequencies: np.ndarray, recipe: Recipe) -> GateWeights:
    """A gate that has learnt from these lessons."""
    layers, bounds = np.load(files[0], mmap_mode="r").shape[0], thresholds(files)
    each = [
        fit_layer(*read(files, layer), bounds, recipe, layer)
        for layer in tqdm(range(layers), unit="layer", disable=None)
    ]
    whole = {name: np.stack([layer[name] for layer in each]).astype(np.float32) for name in each[0]}
    return GateWeights(**whole, frequencies=frequencies)


def judge(files: Sequence[Path], weights: GateWeights) -> str:
    """How well a gate tells lessons that it hasn't learnt from: the correlation over all KVs, and of the KVs that the
    second reading ranks highest, over all heads, the share that the gate does too."""
    correlations, shares = [], []
    for file in files:
        pairs = [_compared(file, weights, layer) for layer in range(weights.linear.shape[0])]
        truth, guess = (np.concatenate(part, axis=None) for part in zip(*pairs, strict=True))
        correlations.append(np.corrcoef(truth, guess)[0, 1])
        orders = np.argsort(-truth, kind="stable"), np.argsort(-guess, kind="stable")
        best = [truth.size // ratio for ratio in RATIOS]
        shares.append([len(np.intersect1d(orders[0][:n], orders[1][:n])) / n for n in best])
    kept = ", ".join(f"{share:.3f} at {ratio}x" for ratio, share in zip(RATIOS, np.mean(shares, axis=0), strict=True))
    return f"correlation {np.mean(correlations):.3f}; of what a second reading ranks highest {kept}"


def _compared(file: Path, weights: GateWeights, layer: int) -> tuple[Floats, Floats]:
    x, y = read([file], layer)
    of = {name: jnp.asarray(getattr(weights, name)[layer]) for name in ("linear", "hidden", "output")}
    return y, np.asarray(told(**of, x=jnp.asarray(x)))
