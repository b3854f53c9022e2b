"""Our own checkpoints: an Orbax directory of weights, the config as JSON, and the tokenizer's files."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.typing import DTypeLike

from models import families
from models.checkpoints.assemble import (
    abstract_model,
    as_held,
    check_quantised,
    inputs_axis,
    parameters_of,
    weights_of,
)
from models.checkpoints.described import arrays_of, describe, rebuild
from models.errors import CheckpointError
from models.families import Model, family_of_config
from models.family import Family
from models.fields import Fields, read_json
from models.layers import is_stacked
from models.quantised import CODES, Quantised
from models.sharding import as_read, check_count, specs_of

WEIGHTS = "weights"
"""The directory of the arrays."""
QUANTISED = "quantised.json"
"""Where weights are codes with scales: by a parameter's name, of what arrays they are made and how."""
_MARKS = ("_CHECKPOINT_METADATA", "_METADATA")
"""By one of these files a directory is Orbax's."""
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
COMPANIONS = (*_TOKENIZER_FILES, "generation_config.json")
"""What is kept beside the weights."""


def config_files() -> tuple[str, ...]:
    """Names of which a checkpoint's directory has one."""
    return tuple(family.config_file for family in families.FAMILIES)


def family_in(directory: Path) -> Family[Model] | None:
    """Of the checkpoint that ``save`` wrote there; None: there is none."""
    return next((family for family in families.FAMILIES if (directory / family.config_file).exists()), None)


def unfinished_parts(directory: Path) -> list[Path]:
    """What a save that was broken off left there: weights without the config, which is written last."""
    if family_in(directory):
        return []
    weights = directory / WEIGHTS
    whole = [weights] if any((weights / name).exists() for name in _MARKS) else []
    return [*whole, *directory.glob(f"{WEIGHTS}.orbax-checkpoint-tmp*")]


def save(model: Model, directory: Path, *, tokenizer_from: Path | None = None) -> None:
    """Write a model that ``restore`` reads.

    Args:
      directory: created; must not hold a checkpoint yet. What is left there of a save that was broken off is replaced.
      tokenizer_from: a directory whose tokenizer files and generation_config.json are copied along.

    Raises:
      CheckpointError: ``directory`` holds a checkpoint, ``tokenizer_from`` no tokenizer, or the layers are stacked.
    """
    if is_stacked(model):
        raise CheckpointError("the model's layers are stacked, expected one by one. Save it before `stack_layers`.")
    family = family_of_config(model.config)
    directory = directory.absolute()
    unfinished = unfinished_parts(directory)
    if family_in(directory) or ((directory / WEIGHTS).exists() and directory / WEIGHTS not in unfinished):
        raise CheckpointError(f"{directory} already holds a checkpoint. Choose another directory, or remove that one.")
    beside = [tokenizer_from / name for name in COMPANIONS] if tokenizer_from is not None else []
    copied = [path for path in beside if path.is_file()]
    if tokenizer_from is not None and not any(path.name in _TOKENIZER_FILES for path in copied):
        raise CheckpointError(
            f"{tokenizer_from} has no tokenizer files, expected one of {', '.join(_TOKENIZER_FILES)}."
        )

    directory.mkdir(parents=True, exist_ok=True)
    for part in unfinished:
        shutil.rmtree(part)
    values: dict[str, Any] = {".".join(path): leaf.get_value() for path, leaf in parameters_of(model).items()}
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = [arrays_of(name, value) for name, value in values.items()]
        checkpointer.save(directory / WEIGHTS, {name: array for each in arrays for name, array in each.items()})
    for path in copied:  # after the weights, by which an unfinished save is known
        shutil.copyfile(path, directory / path.name)
    described = {name: describe(value) for name, value in values.items() if isinstance(value, Quantised)}
    (directory / QUANTISED).unlink(missing_ok=True)  # of a save that was broken off
    if described:
        (directory / QUANTISED).write_text(json.dumps(described) + "\n", encoding="utf-8")
    # Last, and in one step, so that a save that is broken off isn't taken for a checkpoint.
    part = directory / f"{family.config_file}.part"
    part.write_text(json.dumps(asdict(model.config), indent=2) + "\n", encoding="utf-8")
    part.replace(directory / family.config_file)


def stored_dtypes(directory: Path) -> set[np.dtype]:
    """Of the checkpoint that ``save`` wrote there.

    Raises:
      CheckpointError: its weights are missing or damaged.
    """
    return {np.dtype(leaf.dtype) for leaf in _stored_arrays(directory.absolute() / WEIGHTS).values()}


def restore(
    directory: Path, dtype: DTypeLike = jnp.float32, *, weights: str = "floats", mesh: Mesh | None = None
) -> Model:
    """Read a model that ``save`` wrote, floats converted to ``dtype``, onto the default device, or those of ``mesh``,
    each with its part, whatever it was saved from.

    Args:
      weights: of ``assemble.WEIGHTS``.

    Raises:
      CheckpointError: a file is absent or damaged, or a tensor isn't what the config calls for, or not finite.
    """
    directory = directory.absolute()
    family = family_in(directory)
    if family is None and unfinished_parts(directory):
        raise CheckpointError(f"{directory} holds a save that was broken off. Save the model there again.")
    if family is None:
        files = " or ".join(config_files())
        raise CheckpointError(f"{directory} has no {files}. Give the directory of a checkpoint that `save` wrote.")
    config = _config_from_json(directory / family.config_file, family)
    stored = _stored_arrays(directory / WEIGHTS)
    if config.num_layers > len(stored):  # before so many layers are built
        raise CheckpointError(
            f"{directory} has {len(stored)} tensors, too few for the {config.num_layers} layers of its config. Save "
            "the model again."
        )
    model = abstract_model(family.build, config, dtype)
    parameters = {".".join(path): (path, leaf) for path, leaf in parameters_of(model).items()}
    described = read_json(directory / QUANTISED) if (directory / QUANTISED).exists() else {}
    if mesh is not None:
        check_count(model, mesh.size)
    expected: dict[str, jax.ShapeDtypeStruct] = {}
    whole = PartitionSpec()
    for name, (path, leaf) in parameters.items():
        if name in described:
            arrays = arrays_of(name, rebuild(name, described[name], stored))
            expected |= {part: _placed(array.shape, array.dtype, whole, mesh) for part, array in arrays.items()}
        else:
            exact = weights_of(path, weights) in CODES and inputs_axis(path, leaf.shape) is not None
            kind = np.dtype(np.float32 if exact else dtype)
            spec = whole if mesh is None else specs_of(model, path, leaf.get_value(), mesh)
            expected[name] = _placed(leaf.shape, kind, spec, mesh)
    loaded = _restore_weights(directory / WEIGHTS, stored, expected)
    for name, (path, leaf) in parameters.items():
        value = rebuild(name, described.get(name), loaded)
        if isinstance(value, Quantised):
            check_quantised(value, leaf.shape, f"{directory}: tensor {name!r}")
        elif not bool(jnp.isfinite(value).all()):
            raise CheckpointError(
                f"{directory}: tensor {name!r} has NaN or infinite values as {value.dtype}. The checkpoint is damaged, "
                "or its values don't fit; save it again or load it as float32."
            )
        axis, held = inputs_axis(path, leaf.shape), weights_of(path, weights)
        value = as_held(value, held, axis=axis, dtype=dtype)
        leaf.set_value(as_read(model, path, value, mesh))
    return model


def _placed(shape: tuple[int, ...], dtype: Any, spec: PartitionSpec, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    place = SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def _config_from_json(path: Path, family: Family[Model]) -> Any:
    fields = Fields(origin=str(path), values=read_json(path))
    try:
        return family.config_from_saved(fields)
    except (TypeError, CheckpointError) as error:
        raise CheckpointError(f"{path} isn't a config that `save` wrote ({error}). Save the model again.") from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is missing, incomplete or damaged, expected the weights that `save` wrote. Save the model again "
        f"({type(error).__name__})."
    )


def _stored_arrays(path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes by the tensors' names."""
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            found = checkpointer.metadata(path).item_metadata.items()
            return {name: jax.ShapeDtypeStruct(tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in found}
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise _damaged(path, error) from error


def _restore_weights(
    path: Path, stored: dict[str, jax.ShapeDtypeStruct], expected: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    wanted, found = ({name: leaf.shape for name, leaf in leaves.items()} for leaves in (expected, stored))
    if found != wanted:
        name = min(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise CheckpointError(
            f"{path}: tensor {name!r} has shape {found.get(name)}, expected {wanted.get(name)} by the config. "
            "Save the model again."
        )
    largest = max(leaf.size for leaf in expected.values()) * 4
    at_once = ceil(2 * largest / 1e9)  # else 96 GB pass the host at once
    handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=at_once)
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            return checkpointer.restore(path, args=ocp.args.StandardRestore(expected))
        except Exception as error:
            raise _damaged(path, error) from error
