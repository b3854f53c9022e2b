"""Hugging Face directories: config.json beside safetensors weights, in one file or several."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from models.checkpoints.assemble import assemble
from models.checkpoints.compressed import Quantisation, quantisation_of
from models.checkpoints.hf_quantised import QuantisedTensors
from models.errors import CheckpointError
from models.families import Model, family_of_hf
from models.family import Family
from models.fields import Fields, read_json
from models.generation_config import ends_in

_FLOAT8 = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
_INDEX = "model.safetensors.index.json"


def load_safetensors(
    directory: Path, dtype: DTypeLike = jnp.float32, *, weights: str = "floats", mesh: Mesh | None = None
) -> Model:
    """Load a model from a directory as transformers' ``save_pretrained`` writes it.

    End-of-sequence tokens come from config.json and, where there is one, generation_config.json.

    Raises:
      CheckpointError: a file is absent, damaged, or not of a supported model.
    """
    family, config, quantisation = _read_config(directory)
    source = QuantisedTensors(_SafetensorsFiles(directory), quantisation)

    def harmless(name: str) -> bool:
        return _harmless(name) or source.adds_nothing(name)

    return assemble(
        family, config, source, names=family.hf_names, harmless=harmless, dtype=dtype, weights=weights, mesh=mesh
    )


def _harmless(name: str) -> bool:
    """Older checkpoints store RoPE's frequencies, and some with tied embeddings store the embedding twice."""
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


def _read_config(directory: Path) -> tuple[Family[Model], Any, Quantisation]:
    """The family, its config, and what that says of quantised layers."""
    path = directory / "config.json"
    try:
        values = read_json(path)
        family = family_of_hf(values)
        config, quantisation = family.config_from_hf(values), quantisation_of(values)
    except CheckpointError as error:
        raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}") from error
    ends = tuple(dict.fromkeys((*config.eos_token_ids, *ends_in(directory))))
    return family, replace(config, eos_token_ids=ends), quantisation


def tensor_kinds(directory: Path) -> set[str]:
    """What the matrices are stored as: BF16, F32, …

    Raises:
      CheckpointError: a file is absent or damaged.
    """
    return _SafetensorsFiles(directory).kinds()


class _SafetensorsFiles:
    """The mapped files of one directory, as ``hf_quantised.Tensors``."""

    def __init__(self, directory: Path):
        self.origin = directory
        self._files = {}  # tensor name -> the open file that holds it
        self._paths: dict[str, Path] = {}  # of the same
        self._bytes = cache(_bytes_of)
        index = directory / _INDEX
        if index.exists():
            self._open_shards(index)
        else:
            file = _open(path := _only_file(directory))
            self._files = dict.fromkeys(file.keys(), file)
            self._paths = dict.fromkeys(file.keys(), path)

    def names(self) -> Collection[str]:
        return self._files

    def kinds(self) -> set[str]:
        slices = [file.get_slice(name) for name, file in self._files.items() if "scale" not in name]
        return {part.get_dtype() for part in slices if len(part.get_shape()) > 1}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def nbytes(self, name: str) -> int:
        part = self._files[name].get_slice(name)
        bits = re.search(r"\d+", part.get_dtype())  # BF16, F8_E4M3, BOOL
        return prod(part.get_shape()) * (int(bits[0]) if bits else 8) // 8

    def values(self, name: str) -> np.ndarray:
        kind = self._files[name].get_slice(name).get_dtype()
        if kind in _FLOAT8:
            return self._bytes(self._paths[name])[name].view(_FLOAT8[kind])
        try:
            return self._files[name].get_tensor(name)
        except (SafetensorError, TypeError, AttributeError) as error:  # the last: numpy has no such dtype
            raise CheckpointError(
                f"{self.origin}: can't read tensor {name!r} of {kind} ({error}). Expected floats of 8 to 32 bits, or "
                "integers; use another checkpoint of the model."
            ) from error

    def _open_shards(self, index: Path) -> None:
        shards = {}
        weight_map = Fields(origin=str(index), values=read_json(index)).section("weight_map")
        if not weight_map.values:
            raise CheckpointError(f"{index} has no weight_map of tensors to shards. Download it again.")
        for name in weight_map.values:
            shard = weight_map.text(name)
            if Path(shard).name != shard:
                raise CheckpointError(f"{index}: {name!r} is in {shard!r}, expected the name of a file beside it.")
            if shard not in shards:
                shards[shard] = _open(self.origin / shard)
            self._files[name] = shards[shard]
            self._paths[name] = self.origin / shard
        held = {name for file in shards.values() for name in file.keys()}  # noqa: SIM118 (not a dict)
        if absent := sorted(self._files.keys() - held):
            raise CheckpointError(
                f"{self.origin}: the shards lack {absent[0]!r}, which {_INDEX} promises. Download the checkpoint again."
            )


def _bytes_of(path: Path) -> dict[str, np.ndarray]:
    """Tensors of one byte a value, as bytes: the library has checked the header, but has no dtype for FP8."""
    length = int(np.fromfile(path, "<u8", 1)[0])
    header = json.loads(np.fromfile(path, np.uint8, length, offset=8).tobytes())
    values = np.memmap(path, np.uint8, "r", offset=8 + length)
    return {
        name: values[slice(*entry["data_offsets"])].reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] in _FLOAT8
    }


def _only_file(directory: Path) -> Path:
    files = sorted(directory.glob("*.safetensors"))
    if len(files) != 1:
        raise CheckpointError(
            f"{directory} has {len(files)} .safetensors files, expected one, or several with a {_INDEX}. "
            "Download the checkpoint again."
        )
    return files[0]


def _open(path: Path) -> safe_open:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, expected one of the checkpoint's shards. Download it again.")
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is cut short, damaged, or not safetensors ({error}). "
            "Download it again."
        ) from error
