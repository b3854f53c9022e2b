"""Any checkpoint as one of our own: weights as the model has them, config, tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax.numpy as jnp

from models.checkpoints import orbax
from models.checkpoints.gguf_file import GgufFile, ggufs_in
from models.checkpoints.safetensors import tensor_kinds
from models.errors import CheckpointError
from models.families import Model
from models.generation_config import FILE, sampling_defaults
from models.hub import resolve
from models.tokenizer import Tokenizer, load_tokenizer, save_tokenizer


def convert(source: Path, target: Path, load: Callable[[Path], Model]) -> Model:
    """Write a checkpoint that ``load_model`` and ``load_tokenizer`` read as they read ``source``.

    What an interrupted conversion left in ``target`` is replaced.

    Args:
      source: a ``.gguf`` file or a checkpoint's directory.
      target: a directory that doesn't exist, is empty, or holds an interrupted conversion.
      load: reads the model as its weights are to be written.

    Returns:
      The model.

    Raises:
      CheckpointError: ``source`` can't be read or has no tokenizer, or ``target`` holds something else.
    """
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file, expected a directory to write to. Choose another one.")
    there = sorted(path.name for path in target.iterdir()) if target.exists() else []
    if there and not orbax.unfinished_parts(target):
        held = "a checkpoint" if orbax.family_in(target) else f"{there[0]!r}"
        raise CheckpointError(
            f"{target} already holds {held}, expected an empty directory, a new one, or an interrupted conversion. "
            "Choose another one, or remove that."
        )
    with TemporaryDirectory() as folder:
        beside = source if (source / "tokenizer.json").exists() else _tokenizer_files(source, Path(folder))
        load_tokenizer(beside)  # before what takes long
        model = load(source)
        orbax.save(model, target, tokenizer_from=beside)
    return model


def save_model(model: Model, directory: str | Path, *, tokenizer: Any = None) -> None:
    """Write a checkpoint that ``load_model`` reads, and ``load_tokenizer`` where it is given a tokenizer.

    Args:
      model: as ``load_model`` gives it.
      directory: created; must not hold a checkpoint yet.
      tokenizer: a ``Tokenizer``, one of transformers or of tokenizers, or whatever ``load_tokenizer`` takes.

    Raises:
      CheckpointError: ``directory`` holds a checkpoint, or there is no tokenizer where one was said to be.
      TokenizerError: ``tokenizer`` is none.
    """
    with TemporaryDirectory() as folder:
        beside = None if tokenizer is None else _beside(tokenizer, Path(folder))
        orbax.save(model, Path(directory).expanduser(), tokenizer_from=beside)


def _beside(tokenizer: Any, folder: Path) -> Path:
    """A directory with a tokenizer's files."""
    if isinstance(tokenizer, str | Path):
        source = resolve(str(tokenizer))
        return source if (source / "tokenizer.json").exists() else _tokenizer_files(source, folder)
    own = Tokenizer.from_hf(tokenizer)
    save_tokenizer(own, folder)
    (folder / FILE).write_text(json.dumps({"eos_token_id": list(own.eos_ids)}), encoding="utf-8")
    return folder


def stored_dtype(path: Path) -> jnp.dtype:
    """In which no float of a checkpoint's matrices loses anything: bfloat16 where all of them are, else float32."""
    return jnp.dtype(jnp.bfloat16 if _kinds(path) & {"F32", "F16", "BF16"} == {"BF16"} else jnp.float32)


def _kinds(path: Path) -> set[str]:
    """What a checkpoint's matrices are stored as, by the names that safetensors and GGUF share."""
    if path.is_dir() and orbax.family_in(path):
        return {{"bfloat16": "BF16", "float32": "F32"}.get(kind.name, kind.name) for kind in orbax.stored_dtypes(path)}
    if path.is_dir() and any(path.glob("*.safetensors")):
        return tensor_kinds(path)
    file = path if path.is_file() else next(iter(ggufs_in(path)), path)
    return {tensor.kind.name for tensor in GgufFile(file).tensors.values() if len(tensor.shape) > 1}


def _tokenizer_files(source: Path, folder: Path) -> Path:
    """The folder, with what a GGUF file says of its tokenizer and of sampling as files of their own."""
    tokenizer, sampling = load_tokenizer(source), sampling_defaults(source)
    save_tokenizer(tokenizer, folder)
    chosen = {name: value for name, value in vars(sampling).items() if value is not None}
    samples = {"do_sample": True} if sampling.temperature else {}
    said = {"eos_token_id": list(tokenizer.eos_ids), **samples, **chosen}
    (folder / FILE).write_text(json.dumps(said, indent=2), encoding="utf-8")
    return folder
