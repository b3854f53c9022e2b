"""A learned gate: what a second reading would say of a KV, told from the KV alone (as Fast KVzip, arXiv 2601.17668, and
KVzap, arXiv 2601.07891, do from the layer's input). ``scripts/train_gate.py`` makes one."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Self
from zipfile import BadZipFile

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxkv.cache.shards import WHOLE, HeadShards
from jaxkv.checks import shown
from jaxkv.compression.placement import Placement
from jaxkv.compression.scorer import Scorer
from jaxkv.policies.calibrated import Family
from jaxkv.policies.mixed import InTwoPrecisions
from models.interface import ModelSizes

SHIPPED = {Family(num_layers=30, hidden_size=576, vocab_size=49_152): "smollm2-135m"}
"""By whose name their weights lie in ``jaxkv/policies/gates``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GateWeights:
    """Of one model's KV heads, ``f32[layers, kv_heads, ...]``. Constants of the programs that use them, so they are
    hashed by what they are.

    A KV is told as ``x``, its K before RoPE and its V. Its score's logarithm is linear in ``x`` and its squares, and in
    the outputs of a hidden layer of ReLUs, which may have no unit at all.

    Raises:
      ValueError: shapes that don't belong together, or weights that aren't finite.
    """

    linear: np.ndarray
    """``[..., 4 * head_dim + 1]``: of ``x``, ``x**2``, and 1."""
    hidden: np.ndarray
    """``[..., 2 * head_dim + 1, units]``: of ``x``, and 1."""
    output: np.ndarray
    """``[..., units]``."""
    frequencies: np.ndarray
    """``f32[head_dim / 2]``: radians a token by which RoPE turns each pair of K's values; 0 where it turns none."""

    def __post_init__(self) -> None:
        heads, units, wanted = self.linear.shape[:2], self.output.shape[-1:], 8 * self.frequencies.size + 1
        shapes = (*heads, wanted), (*heads, wanted // 2 + 1, *units), (*heads, *units)
        given = self.linear.shape, self.hidden.shape, self.output.shape
        if len(heads) != 2 or len(units) != 1 or self.frequencies.ndim != 1 or given != shapes:
            raise ValueError(
                "a gate's weights must be [layers, kv_heads, ...] with [4 * head_dim + 1], [2 * head_dim + 1, units] "
                f"and [units], beside [head_dim / 2] frequencies, got {', '.join(map(str, given))} beside "
                f"{self.frequencies.shape}; train it anew"
            )
        if not all(np.isfinite(getattr(self, each.name)).all() for each in fields(self)):
            raise ValueError("a gate's weights must be finite; the file is damaged, train it anew")

    @cached_property
    def digest(self) -> str:
        arrays = [getattr(self, each.name) for each in fields(self)]
        return hashlib.sha256(b"".join(str(x.shape).encode() + x.tobytes() for x in arrays)).hexdigest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GateWeights) and self.digest == other.digest

    def __repr__(self) -> str:
        return f"GateWeights({self.digest[:8]})"

    @property
    def head_dim(self) -> int:
        return 2 * self.frequencies.size

    def check(self, sizes: ModelSizes) -> None:
        """Raises ValueError where they aren't of a model of these sizes."""
        wanted = sizes.num_layers, sizes.num_kv_heads, 4 * sizes.head_dim + 1
        if self.linear.shape != wanted:
            raise ValueError(
                f"this gate has weights {self.linear.shape}, and the model needs {wanted}, [layers, kv_heads, "
                "4 * head_dim + 1]; train one for it with scripts/train_gate.py"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one ``.npz`` file, of float16 but for the frequencies."""
        partial = Path(f"{os.fspath(path)}.partial")
        halves = {each.name: getattr(self, each.name).astype(np.float16) for each in fields(self)}
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **halves | {"frequencies": self.frequencies})
        partial.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GateWeights:
        """Raises ValueError for a file that is no gate."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {each.name: np.asarray(file[each.name], np.float32) for each in fields(cls)}
        except (ValueError, KeyError, EOFError, BadZipFile) as error:
            raise ValueError(f"{shown(os.fspath(path))} is no gate of scripts/train_gate.py: {error!s:.80}") from None
        return cls(**arrays)


def gate_for(sizes: ModelSizes) -> GateWeights | None:
    """That which is shipped for a model; None: there is none."""
    name = SHIPPED.get(Family(sizes.num_layers, sizes.hidden_size, sizes.vocab_size))
    path = Path(__file__).parent / "gates" / f"{name}.npz"
    if name is None or not path.exists():
        return None
    weights = _read_once(path)
    weights.check(sizes)
    return weights


_read_once = lru_cache(GateWeights.load)  # a job's lines may each bring a policy


def unrotated(keys: Array, positions: Array, frequencies: Array | np.ndarray) -> Array:
    """Keys as they were before RoPE: ``[..., kvs, head_dim]`` at positions ``i32[..., kvs]``."""
    angles = positions[..., None].astype(jnp.float32) * frequencies
    first, second = jnp.split(keys, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)


def told(linear: Array, hidden: Array, output: Array, x: Array) -> Array:
    """Scores' logarithms of KVs ``[..., kv_heads, kvs, 2 * head_dim]``, by the weights of one layer: see
    ``GateWeights``."""
    first, second, one = jnp.split(linear, [x.shape[-1], 2 * x.shape[-1]], axis=-1)
    scores = jnp.sum(x * (first[:, None] + x * second[:, None]), axis=-1) + one  # fused: the squares are never stored
    units = jnp.einsum("...hkf,hfu->...hku", x, hidden[:, :-1]) + hidden[:, -1:]
    return scores + jnp.einsum("...hku,hu->...hk", jnp.maximum(units, 0.0), output)


@dataclass(frozen=True, kw_only=True)
class LearnedGate(Scorer):
    """The logarithm of a KV's score in a second reading, as the gate predicts it."""

    weights: GateWeights | None
    """None: those that are shipped for the model, which only ``Policy.for_model`` knows."""
    shards: HeadShards = WHOLE
    """Whose heads are scored."""

    def of_shard(self, shards: HeadShards) -> LearnedGate:
        return replace(self, shards=shards)

    @property
    def settled(self) -> bool:
        return True

    def score_kvs(
        self, scores: Array, keys: Array, values: Array, positions: Array, held: Array, layer: Array
    ) -> Array:
        if self.weights is None:
            raise ValueError(
                "this gate is the model's own, which isn't known: call policy.for_model(model.sizes) first"
            )
        of, width = self.weights, self.weights.head_dim
        keys = unrotated(keys[..., :width], positions, of.frequencies)
        x = jnp.concatenate([keys, values[..., :width]], axis=-1)
        layers = (jnp.asarray(part)[layer] for part in (of.linear, of.hidden, of.output))
        linear, hidden, output = (self.shards.own(part, 0) for part in layers)
        return told(linear, hidden, output, x)


@dataclass(frozen=True, kw_only=True)
class Gate(InTwoPrecisions):
    """What the gate ranks highest is kept at high precision, what comes next at low: ``Auto`` without its reading."""

    protected_window: int = 2
    sinks: int = 4
    weights: GateWeights | None = None
    """None: those that are shipped for the model, which ``for_model`` fills in."""

    def parts(self) -> tuple[Scorer, Placement]:
        return LearnedGate(weights=self.weights), self.placed()

    def for_model(self, sizes: ModelSizes) -> Self:
        """Raises ValueError where no gate is shipped for the model, or the weights aren't for one of these sizes."""
        weights = self.weights or gate_for(sizes)
        if weights is None:
            raise ValueError(
                "no gate is shipped for this model: train one (python scripts/train_gate.py) and give "
                "Gate(weights=GateWeights.load(...)), or take auto, which reads prompts twice"
            )
        weights.check(sizes)
        return replace(self, weights=weights)
