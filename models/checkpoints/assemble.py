"""Build a `Llama` out of a checkpoint's tensors, one at a time, each checked."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from models.config import LlamaConfig
from models.errors import CheckpointError
from models.llama import Layer, Llama

ParameterPath = tuple[str, ...]  # such as ("layers", "3", "attention", "query", "kernel")


class TensorSource(Protocol):
    """A checkpoint's tensors by name, linear weights as [out, in]."""

    @property
    def origin(self) -> Path: ...

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> np.ndarray:
        """The tensor's values, as floats of any width."""
        ...


def abstract_model(config: LlamaConfig, dtype: DTypeLike) -> Llama:
    """A `Llama` whose parameters are shapes and dtypes, without memory."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating point type, got {dtype}")
    model, layer = nnx.eval_shape(
        lambda: (
            Llama(replace(config, num_layers=1), rngs=nnx.Rngs(0), dtype=dtype),
            Layer(config, rngs=nnx.Rngs(0), dtype=dtype),
        )
    )
    model.config = config
    model.layers = nnx.List([nnx.clone(layer) for _ in range(config.num_layers)])  # tracing each would take seconds
    return model


def parameters_of(model: Llama) -> dict[ParameterPath, nnx.Variable[jax.Array]]:
    """The model's own variables, by path; setting one's value changes the model."""
    return {tuple(str(part) for part in path): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assemble(
    config: LlamaConfig,
    source: TensorSource,
    *,
    name_of: Callable[[ParameterPath], str],
    harmless: Callable[[str], bool],
    dtype: DTypeLike,
) -> Llama:
    """Read each of the model's parameters, convert it to `dtype` and place it on the default device.

    Only one tensor at a time is held twice. Linear weights are transposed to [in, out].

    Args:
        name_of: a parameter's name in the checkpoint.
        harmless: whether a tensor that the model doesn't use may be left unread.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of the wrong shape, or not finite.
    """
    if config.num_layers > len(source.names()):  # before so many layers are built
        raise CheckpointError(
            f"{source.origin} has {len(source.names())} tensors, too few for the {config.num_layers} layers that its "
            "config calls for. Check that config and weights belong together."
        )
    model = abstract_model(config, dtype)
    parameters = parameters_of(model)
    _check_names({name_of(path) for path in parameters}, source, harmless)
    for path, parameter in parameters.items():
        transposed = path[-1] == "kernel"
        parameter.set_value(_load(source, name_of(path), parameter.shape, transposed, np.dtype(dtype)))
    return model


def _check_names(needed: set[str], source: TensorSource, harmless: Callable[[str], bool]) -> None:
    present = set(source.names())
    if missing := sorted(needed - present):
        raise CheckpointError(
            f"{source.origin} lacks {len(missing)} of the {len(needed)} tensors that its config calls for, first "
            f"{missing[0]!r}. Download the checkpoint again, or check that config and weights belong together."
        )
    if unexpected := sorted(name for name in present - needed if not harmless(name)):
        raise CheckpointError(
            f"{source.origin} has {len(unexpected)} tensors that a model of its config doesn't use, first "
            f"{unexpected[0]!r}. Check that config and weights belong together and that the model is a plain Llama, "
            "Mistral, Qwen2 or Qwen3."
        )


def _load(source: TensorSource, name: str, shape: tuple[int, ...], transposed: bool, dtype: np.dtype) -> jax.Array:
    stored = shape[::-1] if transposed else shape
    if source.shape(name) != stored:
        raise CheckpointError(
            f"{source.origin}: tensor {name!r} has shape {source.shape(name)}, expected {stored} by the config. "
            "Check that config and weights belong together."
        )
    values = source.read(name)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise CheckpointError(
            f"{source.origin}: tensor {name!r} holds {values.dtype}, expected floats. Use the unquantised checkpoint, "
            "or a GGUF file for quantised weights."
        )
    # Always a copy of its own: JAX may keep a NumPy buffer without copying, and this one may be a mapped file.
    values = np.array(values.T if transposed else values, dtype=dtype, order="C")
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"{source.origin}: tensor {name!r} has NaN or infinite values as {dtype}. The checkpoint is damaged, "
            f"or its values don't fit in {dtype}; download it again or load it as float32."
        )
    return jax.device_put(values)
