"""GGUF files, quantised or not, of the architectures llama, qwen2 and qwen3."""

from collections.abc import Collection
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from jax.typing import DTypeLike

from models.checkpoints.assemble import assemble
from models.checkpoints.names import GGUF
from models.config import LlamaConfig
from models.errors import CheckpointError
from models.llama import Llama

_ROPE_DIVISORS = "rope_freqs.weight"  # Llama 3.1's frequency scaling, one f32 a pair


def load_gguf(path: Path, dtype: DTypeLike = jnp.float32) -> Llama:
    """Load a model from one GGUF file, dequantised to `dtype`.

    Raises:
        CheckpointError: the file is absent, damaged, not a GGUF, or not of a supported architecture.
    """
    reader = open_gguf(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        metadata = read_metadata(reader)
        divisors = _dequantise(path, tensors[_ROPE_DIVISORS]) if _ROPE_DIVISORS in tensors else None
        config = LlamaConfig.from_gguf(
            metadata, tensor_names=tensors, rope_divisors=None if divisors is None else divisors.ravel().tolist()
        )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    source = _GgufTensors(path, tensors, config, interleaved=metadata["general.architecture"] == "llama")
    return assemble(config, source, name_of=GGUF, harmless=lambda name: name == _ROPE_DIVISORS, dtype=dtype)


def read_metadata(reader: GGUFReader) -> dict[str, object]:
    """The file's key-value pairs as Python values, less the tokenizer's long lists.

    Where the vocabulary's size isn't given, it is taken from the token embedding.
    """
    metadata: dict[str, object] = {}
    for key, field in reader.fields.items():
        if not (key.startswith("tokenizer.") and len(field.data) > 1):
            try:
                metadata[key] = field.contents()
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{key} isn't text ({error}). The file is damaged; download it again.") from error
    embedding = next((tensor for tensor in reader.tensors if tensor.name == "token_embd.weight"), None)
    if embedding is not None:
        metadata.setdefault(f"{metadata.get('general.architecture')}.vocab_size", int(embedding.shape[-1]))
    return metadata


class _GgufTensors:
    """A `TensorSource` over a mapped GGUF file."""

    def __init__(self, origin: Path, tensors: dict[str, ReaderTensor], config: LlamaConfig, *, interleaved: bool):
        self.origin = origin
        self._tensors = tensors
        # The llama architecture stores query and key rows for interleaved RoPE: pair i is rows 2i and 2i + 1.
        self._interleaved_heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if interleaved else {}

    def names(self) -> Collection[str]:
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str) -> np.ndarray:
        values = _dequantise(self.origin, self._tensors[name])
        module = name.split(".")[-2]
        if heads := self._interleaved_heads.get(module):
            return halves_from_interleaved(values, heads)
        return values


def halves_from_interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder each head's rows [heads * head_dim, ...] from RoPE pairs (2i, 2i + 1) to pairs (i, i + head_dim / 2)."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


class _Reader(GGUFReader):
    """gguf's reader, but it stops at the end of the file: by itself, it walks a damaged length to its end."""

    def _get(self, offset, dtype, count=1, override_order=None):  # offset and count in bytes and items, as there
        if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError(f"{count} items of {np.dtype(dtype)} at byte {offset} are past the end")
        return super()._get(offset, dtype, count, override_order)


def open_gguf(path: Path) -> GGUFReader:
    """The file, mapped.

    Raises:
        CheckpointError: it can't be read, isn't a GGUF, or is damaged.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}. Give the path of a GGUF file.") from error
    if magic != b"GGUF":
        raise CheckpointError(
            f"{path} begins with {magic!r}, expected b'GGUF'. It isn't a GGUF file; download it again."
        )
    try:
        return _Reader(path)
    except Exception as error:  # the reader trusts the file, so damage surfaces as whatever its arithmetic meets
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is cut short or damaged, expected a whole GGUF file ({error}). "
            "Download it again."
        ) from error


def _dequantise(path: Path, tensor: ReaderTensor) -> np.ndarray:
    """The tensor's values as floats, in the row-major shape [out, in]."""
    try:
        return dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
        raise CheckpointError(
            f"{path}: tensor {tensor.name!r} is {tensor.tensor_type.name}, which can't be dequantised ({error}). Use "
            "a file of F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 or Q2_K to Q6_K."
        ) from error
