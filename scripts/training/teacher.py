"""What a gate learns from: the KVs of texts, and how the second reading scores them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from evaluation.scoring import Runner
from jax import Array, lax
from tqdm import tqdm

from jaxkv import KVzip, PagedCache, Ratio
from jaxkv.cache.contents import contents
from jaxkv.engine.programs import program
from jaxkv.generation.scoring import kvs_of
from jaxkv.policies.gate import unrotated
from models import Decoder

TEACHER = KVzip(budget=Ratio(ratio=4), group=jnp.mean)
FLOOR = 1e-6
"""Scores below count as this: what nobody attends to is equally worthless."""


class Reader(Runner):
    """Reads texts as the teacher and as the gate see them."""

    @program()
    def lesson(self, cache: PagedCache, frequencies: Array) -> Array:
        """``f32[layers, kv_heads, kvs, 2 * head_dim + 1]`` of the one sequence of a scored cache: K before RoPE, V, and
        the score's logarithm."""
        now, width = contents(cache), 2 * frequencies.shape[0]

        def of_layer(layer: Array) -> Array:
            keys, values, positions = (part[0] for part in kvs_of(cache, now, layer))
            keys = unrotated(keys[..., :width], positions, frequencies)
            target = jnp.log(jnp.maximum(now.scores[layer, 0], FLOOR))
            return jnp.concatenate([keys, values[..., :width], target[..., None]], axis=-1)

        return lax.map(of_layer, jnp.arange(now.held.shape[0], dtype=jnp.int32))

    def taught(self, tokens: list[int], frequencies: np.ndarray) -> np.ndarray:
        """The lesson of a text, ``f16[layers, kv_heads, tokens, 2 * head_dim + 1]``."""
        cache = self.scored(self.read(tokens, TEACHER), (), TEACHER)[0]
        return np.asarray(self.lesson(cache, jnp.asarray(frequencies)))[:, :, : len(tokens)].astype(np.float16)


def frequencies_of(model: Decoder) -> np.ndarray:
    """``f32[head_dim / 2]``: what the model's RoPE turns each pair by, a token; read off the angles of one token."""
    rotation = getattr(model, "rotation", None)
    if rotation is None:
        return np.zeros(model.sizes.head_dim // 2, np.float32)
    cos, sin = (np.asarray(part, np.float64).reshape(-1) for part in rotation(0, jnp.ones((1, 1), jnp.int32)))
    return np.arctan2(sin, cos).astype(np.float32)


def lessons(
    reader: Reader, tokens: Iterator[list[int]], count: int, frequencies: np.ndarray, folder: Path
) -> list[Path]:
    """Files of so many lessons; those of an earlier run are there already."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for at, text in enumerate(tqdm(islice(tokens, count), total=count, unit="text", disable=not sys.stderr.isatty())):
        path = folder / f"{at:04}.npy"
        if not path.exists():
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                np.save(file, reader.taught(text, frequencies))
            partial.replace(path)
        files.append(path)
    return files
