"""Learns a gate for a model: a KV's score in a second reading, told from the KV alone.

    python scripts/train_gate.py --model smollm2-135m --output gate.npz [--texts 48] [--tokens 1536] [--text FILE ...]

Each text is read through the cache and then a second time, as ``auto`` does without a gate; that reading's scores are
what is to be told. For each KV head it is a ridge regression of their logarithms on K before RoPE, V and their squares:
its sums are all that is kept of a text, in ``OUTPUT.sums.npz``, so a run that is started again goes on. Texts that it
doesn't learn from say how well it does: the correlation over all KVs, and of the KVs that the second reading keeps at
4x, 8x and 16x, over all heads, the share that the gate keeps too.
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from evaluation.scoring import Runner
from jax import Array, lax
from tqdm import tqdm
from training.corpus import texts

from jaxkv import KVzip, PagedCache, Ratio
from jaxkv.cache.contents import contents
from jaxkv.cli.commands import keep_compiled_programs
from jaxkv.engine.programs import program
from jaxkv.generation.scoring import kvs_of
from jaxkv.policies.gate import GateWeights, features
from models import Decoder, load_model, load_tokenizer, resolve

TEXT = Path(__file__).parent / "data" / "emma-chapters-1-10.txt"
TEACHER = KVzip(budget=Ratio(ratio=4), group=jnp.mean)
FLOOR = 1e-6
"""Scores below count as this: what nobody attends to is equally worthless."""
RATIOS = (4, 8, 16)


class Sums(NamedTuple):
    """Of what texts say of each head, ``f64[layers, kv_heads, ...]``: all that a least-squares fit needs."""

    squares: np.ndarray
    """``[..., n, n]``: products of features, summed."""
    products: np.ndarray
    """``[..., n]``: of features and targets."""

    def fit(self, ridge: float) -> np.ndarray:
        """``f32[layers, kv_heads, n]``; the penalty is a part of each feature's own mean square, of the last none."""
        n = self.products.shape[-1]
        penalty = np.einsum("...ii->...i", self.squares) * ridge
        penalty[..., -1] = 0
        linear = np.linalg.solve(self.squares + penalty[..., None] * np.eye(n), self.products[..., None])
        return linear[..., 0].astype(np.float32)


class Reader(Runner):
    """Reads texts as the teacher and as the gate see them."""

    @program()
    def sums(self, cache: PagedCache, frequencies: Array) -> tuple[Array, Array]:
        """``Sums`` of the one sequence of a scored cache."""
        now = contents(cache)

        def of_layer(layer: Array) -> tuple[Array, Array]:
            keys, values, positions = kvs_of(cache, now, layer)
            held, seen = now.held[layer, 0, ..., None], self._seen_by_gate(keys, values, positions, frequencies)
            seen = jnp.where(held, jnp.concatenate([seen, jnp.ones_like(seen[..., :1])], axis=-1), 0.0)
            target = jnp.log(jnp.maximum(now.scores[layer, 0], FLOOR))
            return jnp.einsum("hkf,hkg->hfg", seen, seen), jnp.einsum("hkf,hk->hf", seen, target)

        return lax.map(of_layer, jnp.arange(now.held.shape[0], dtype=jnp.int32))

    @program()
    def compared(self, cache: PagedCache, linear: Array, frequencies: Array) -> tuple[Array, Array, Array]:
        """Logarithms of the scores, what a gate makes of them, and which are KVs; ``[layers, kv_heads, kvs]``."""
        now = contents(cache)

        def of_layer(layer: Array) -> Array:
            keys, values, positions = kvs_of(cache, now, layer)
            seen = self._seen_by_gate(keys, values, positions, frequencies)
            return jnp.einsum("hkf,hf->hk", seen, linear[layer, :, :-1]) + linear[layer, :, -1:]

        told = lax.map(of_layer, jnp.arange(now.held.shape[0], dtype=jnp.int32))
        return jnp.log(jnp.maximum(now.scores[:, 0], FLOOR)), told, now.held[:, 0]

    def _seen_by_gate(self, keys: Array, values: Array, positions: Array, frequencies: Array) -> Array:
        width = 2 * frequencies.shape[0]
        return features(keys[0, ..., :width], values[0, ..., :width], positions[0], frequencies)

    def taught(self, tokens: list[int]) -> PagedCache:
        """The cache of a text with the second reading's scores."""
        return self.scored(self.read(tokens, TEACHER), (), TEACHER)[0]


def frequencies_of(model: Decoder) -> np.ndarray:
    """``f32[head_dim / 2]``: what the model's RoPE turns each pair by, a token; read off the angles of one token."""
    rotation = getattr(model, "rotation", None)
    if rotation is None:
        return np.zeros(model.sizes.head_dim // 2, np.float32)
    cos, sin = (np.asarray(part, np.float64).reshape(-1) for part in rotation(0, jnp.ones((1, 1), jnp.int32)))
    return np.arctan2(sin, cos).astype(np.float32)


def save(path: Path, sums: Sums, count: int) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, count=count, **sums._asdict())
    partial.replace(path)


def resumed(path: Path) -> tuple[Sums | None, int]:
    """What an earlier run has learnt, and from how many texts."""
    if not path.exists():
        return None, 0
    with np.load(path) as file:
        return Sums(file["squares"], file["products"]), int(file["count"])


def learn(reader: Reader, tokens: Iterator[list[int]], count: int, frequencies: np.ndarray, kept: Path) -> Sums:
    """The sums of so many texts, those of an earlier run among them."""
    sums, done = resumed(kept)
    for at, text in enumerate(tqdm(islice(tokens, count), total=count, unit="text", disable=not sys.stderr.isatty())):
        if at < done:
            continue
        each = [np.asarray(part, np.float64) for part in reader.sums(reader.taught(text), jnp.asarray(frequencies))]
        sums = Sums(*each) if sums is None else Sums(*(old + new for old, new in zip(sums, each, strict=True)))
        save(kept, sums, at + 1)
    assert sums is not None
    return sums


def judge(reader: Reader, tokens: list[list[int]], linear: np.ndarray, frequencies: np.ndarray) -> str:
    """How well the gate does on texts that it hasn't learnt from."""
    correlations, shares = [], []
    for text in tokens:
        scores, told, held = reader.compared(reader.taught(text), jnp.asarray(linear), jnp.asarray(frequencies))
        held = np.asarray(held)
        truth, guess = np.asarray(scores)[held], np.asarray(told)[held]
        correlations.append(np.corrcoef(truth, guess)[0, 1])
        best = [truth.size // ratio for ratio in RATIOS]
        orders = np.argsort(-truth, kind="stable"), np.argsort(-guess, kind="stable")
        shares.append([len(np.intersect1d(orders[0][:n], orders[1][:n])) / n for n in best])
    kept = ", ".join(f"{share:.3f} at {ratio}x" for ratio, share in zip(RATIOS, np.mean(shares, axis=0), strict=True))
    return f"correlation {np.mean(correlations):.3f}; of what a second reading keeps {kept}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--output", type=Path, required=True, help="the gate, an .npz file")
    parser.add_argument("--text", type=Path, nargs="+", default=[TEXT], help="files of prose, in paragraphs")
    parser.add_argument("--texts", type=int, default=48, help="texts to learn from")
    parser.add_argument("--judged", type=int, default=6, help="further texts that say how well it does")
    parser.add_argument("--tokens", type=int, default=1536, help="of each text, at most")
    parser.add_argument("--ridge", type=float, nargs="+", default=[1e-4], help="penalties; the first is saved")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    keep_compiled_programs()
    path = resolve(options.model)
    model, tokenizer = load_model(path), load_tokenizer(path)

    def tokens(seed: int) -> Iterator[list[int]]:
        for text in texts(options.text, options.tokens, seed):
            yield list(tokenizer.encode(text, add_special=True))[: options.tokens]

    reader, frequencies = Reader(model, options.tokens), frequencies_of(model)
    kept = options.output.with_name(options.output.name + ".sums.npz")
    sums = learn(reader, tokens(options.seed), options.texts, frequencies, kept)
    held_apart = list(islice(tokens(options.seed + 10_000), options.judged))
    for at, ridge in enumerate(options.ridge):
        linear = sums.fit(ridge)
        if at == 0:
            GateWeights(linear=linear, frequencies=frequencies).save(options.output)
        print(f"{options.texts} texts, ridge {ridge:g}: {judge(reader, held_apart, linear, frequencies)}")


if __name__ == "__main__":
    main()
