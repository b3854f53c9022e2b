"""Loading a model from whatever format its weights are in."""

from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from models.checkpoints import orbax
from models.checkpoints.assemble import check_weights
from models.checkpoints.gguf import load_gguf
from models.checkpoints.gguf_file import ggufs_in
from models.checkpoints.safetensors import load_safetensors
from models.errors import CheckpointError
from models.families import Model
from models.hub import resolve

__all__ = ["load_model"]


def load_model(
    path: str | Path, dtype: DTypeLike = jnp.float32, *, weights: str = "floats", mesh: Mesh | None = None
) -> Model:
    """Load a model onto the default device, or onto several that share its weights.

    Args:
      path: as a text, a built-in name or one of the Hugging Face Hub (``org/name``), too. A .gguf file; or a directory
        with a checkpoint that ``orbax.save`` wrote, with config.json and safetensors,
        or with exactly one .gguf file; of a split one, the first part or its directory.
      dtype: of the computation outside norms, softmax, RoPE and logits, and of parameters that are floats.
      weights: what kernels and embeddings are held as: "floats"; "stored", codes with scales as the file has them;
        "int8" or "fp8", such codes with a scale for each output, of any checkpoint.
      mesh: of one axis, over which the weights are split as they are read (``models.sharding``): the host has a matrix
        at a time, and a device its part. None: all on the default device.

    Raises:
      CheckpointError: nothing is there, or it is none of these, or it is damaged or not of a supported model.
      ValueError: unknown ``weights``, a ``dtype`` that is no float, or more devices than the model can be split over.
    """
    check_weights(weights)
    path = resolve(path) if isinstance(path, str) else path
    if not path.exists():
        raise CheckpointError(f"{path} doesn't exist. Give the path of a .gguf file or of a checkpoint's directory.")
    if path.is_file():
        return load_gguf(path, dtype, weights=weights, mesh=mesh)
    if orbax.family_in(path) or orbax.unfinished_parts(path):
        return orbax.restore(path, dtype, weights=weights, mesh=mesh)
    if any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return load_safetensors(path, dtype, weights=weights, mesh=mesh)
    ggufs = ggufs_in(path)
    if len(ggufs) == 1:
        return load_gguf(ggufs[0], dtype, weights=weights, mesh=mesh)
    if ggufs:
        raise CheckpointError(
            f"{path} has {len(ggufs)} .gguf files ({', '.join(file.name for file in ggufs)}), expected one. "
            "Give the path of the file to load."
        )
    own = " or ".join(orbax.config_files())
    raise CheckpointError(
        f"{path} has no weights that can be loaded, expected config.json and *.safetensors, or one .gguf file, or "
        f"{own} and weights saved by this package. Give the directory of a complete checkpoint."
    )
