"""GGUF files, quantised or not."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf.quants import dequantize
from jax.sharding import Mesh
from jax.typing import DTypeLike

from models.checkpoints.assemble import assemble
from models.checkpoints.gguf_blocks import kept
from models.checkpoints.gguf_file import GgufFile, GgufTensor
from models.errors import CheckpointError
from models.families import Model, family_of_gguf
from models.interface import ModelSizes
from models.quantised import Quantised

_OF_THE_VOCABULARY = ("_token_id", "_token_ids", ".model", ".tokens")  # what tells the tokens that end an answer
_AT_ONCE = 1 << 18  # values that are dequantised together
_ROPE_DIVISORS = "rope_freqs.weight"  # Llama 3.1's frequency scaling, one f32 a pair


def load_gguf(
    path: Path, dtype: DTypeLike = jnp.float32, *, weights: str = "floats", mesh: Mesh | None = None
) -> Model:
    """Load a model from one GGUF file.

    Args:
      dtype: of floats.
      weights: of ``assemble.WEIGHTS``; "stored" keeps blocks of 4 to 8 bits, but Q2_K and Q3_K become floats.

    Raises:
      CheckpointError: the file is absent, damaged, not a GGUF, or not of a supported architecture.
    """
    file = GgufFile(path)
    metadata = file.metadata(lambda key: not key.startswith("tokenizer.") or key.endswith(_OF_THE_VOCABULARY))
    if "token_embd.weight" in file.tensors:
        vocab_size = file.tensors["token_embd.weight"].shape[0]
        metadata.setdefault(f"{metadata.get('general.architecture')}.vocab_size", vocab_size)
    stored = file.tensors.get(_ROPE_DIVISORS)
    divisors = None if stored is None else _dequantise(path, _ROPE_DIVISORS, stored).ravel().tolist()
    try:
        family = family_of_gguf(metadata)
        config = family.config_from_gguf(metadata, tensor_names=file.tensors, rope_divisors=divisors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    source = _GgufTensors(file, config, interleaved=metadata["general.architecture"] in family.gguf_interleaved)
    return assemble(
        family,
        config,
        source,
        names=family.gguf_names,
        harmless=lambda name: name == _ROPE_DIVISORS,
        dtype=dtype,
        weights=weights,
        mesh=mesh,
    )


class _GgufTensors:
    """A ``TensorSource`` over a mapped GGUF file."""

    def __init__(self, file: GgufFile, config: ModelSizes, *, interleaved: bool):
        self.origin = file.path
        self._tensors = file.tensors
        self._interleaved_heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if interleaved else {}

    def names(self) -> Collection[str]:
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def nbytes(self, name: str) -> int:
        return self._tensors[name].data.nbytes

    def read(self, name: str, *, stored: bool) -> np.ndarray | Quantised:
        tensor = self._tensors[name]
        heads = self._interleaved_heads.get(name.split(".")[-2])
        made = kept(tensor.kind) if stored and len(tensor.shape) == 2 else None
        if made is None:
            values = _dequantise(self.origin, name, tensor)
            return halves_from_interleaved(values, heads) if heads else values
        rows = halves_from_interleaved(tensor.data, heads) if heads else tensor.data
        return made(rows.reshape(len(rows), -1, GGML_QUANT_SIZES[tensor.kind][1]))


def halves_from_interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder each head's rows ``[heads * head_dim, ...]`` from RoPE pairs (2i, 2i + 1) to (i, i + head_dim / 2)."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _dequantise(path: Path, name: str, tensor: GgufTensor) -> np.ndarray:
    """The tensor's values as floats, in the row-major shape ``[out, in]``."""
    try:
        rows = tensor.data.reshape(-1, tensor.data.shape[-1])
        step = max(_AT_ONCE // tensor.shape[-1], 1)
        values = np.empty((len(rows), tensor.shape[-1]), np.float32)
        for start in range(0, len(rows), step):  # at once it would make two of the whole
            values[start : start + step] = dequantize(rows[start : start + step], tensor.kind)
        return values.reshape(tensor.shape)
    except (NotImplementedError, ValueError) as error:
        raise CheckpointError(
            f"{path}: tensor {name!r} is {tensor.kind.name}, which can't be dequantised ({error}). Use "
            "a file of F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 or Q2_K to Q6_K."
        ) from error
