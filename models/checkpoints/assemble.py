"""Build a model out of a checkpoint's tensors, one at a time, each checked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from models.checkpoints.progress import one_by_one
from models.errors import CheckpointError
from models.family import Family, Model, Rows, Stacked, Stored
from models.interface import ModelSizes, ParameterPath
from models.quantised import CODES, Quantised, quantise
from models.sharding import as_read, check_count

WEIGHTS = ("floats", "stored", *CODES)
"""What a model's matrices may be loaded as."""
_INPUTS = {"kernel": 0, "embedding": 1}
"""Along which axis a matrix has its inputs, by the parameter's name."""


class TensorSource(Protocol):
    """A checkpoint's tensors by name, linear weights and embeddings as ``[out, in]``."""

    @property
    def origin(self) -> Path: ...

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def nbytes(self, name: str) -> int:
        """Of the tensor as it is stored."""
        ...

    def read(self, name: str, *, stored: bool) -> np.ndarray | Quantised:
        """The tensor's values, as floats of any width or, as the file holds them, as codes with scales.

        Args:
          stored: whether codes with scales are wanted, where the source can give floats too.
        """
        ...


def abstract_model(build: Callable[..., Model], config: ModelSizes, dtype: DTypeLike) -> Model:
    """A model whose parameters are shapes and dtypes, without memory.

    Args:
      build: as ``Family.build``, of a model whose layers are alike.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating point type, got {dtype}")
    one_layer = replace(config, num_layers=1, specs=config.specs[:1])
    model = nnx.eval_shape(lambda: build(one_layer, rngs=nnx.Rngs(0), dtype=dtype))
    model.config = config
    model.layers = nnx.List([nnx.clone(model.layers[0]) for _ in range(config.num_layers)])  # tracing: seconds
    return model


def parameters_of(model: Any) -> dict[ParameterPath, nnx.Variable[Any]]:
    """The model's own variables, by path; setting one's value changes the model."""
    return {tuple(str(part) for part in path): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assemble(
    family: Family[Model],
    config: ModelSizes,
    source: TensorSource,
    *,
    names: Callable[[ParameterPath, Any], Stored],
    harmless: Callable[[str], bool],
    dtype: DTypeLike,
    weights: str = "floats",
    mesh: Mesh | None = None,
) -> Model:
    """Read each of the model's parameters, convert it to ``dtype`` and place it on the default device, or on those of
    ``mesh``, each with its part.

    The host holds one parameter at a time beside mapped files, at most three times over. Linear weights are transposed
    to ``[in, out]``.

    Args:
      names: the family's, for this format: where a parameter is in the checkpoint.
      harmless: whether a tensor that the model doesn't use may be left unread.
      weights: of ``WEIGHTS``: what kernels and embeddings are held as.

    Raises:
      CheckpointError: a tensor is missing, unexpected, of the wrong shape, or not finite.
    """
    check_weights(weights)
    if config.num_layers > len(source.names()):  # before so many layers are built
        raise CheckpointError(
            f"{source.origin} has {len(source.names())} tensors, too few for the {config.num_layers} layers that its "
            "config calls for. Check that config and weights belong together."
        )
    model = abstract_model(family.build, config, dtype)
    if mesh is not None:
        check_count(model, mesh.size)
    parameters = parameters_of(model)
    stored = {path: names(path, config) for path in parameters}
    _check_names({name for place in stored.values() for name in place.names}, source, harmless)
    read = _Reader(source=source, dtype=np.dtype(dtype), rows=_rows_of_shared(stored.values()), weights=weights)
    sizes = {path: sum(map(source.nbytes, place.names)) for path, place in stored.items()}
    all_of_them = [(path, parameter, sizes[path]) for path, parameter in parameters.items()]
    for path, parameter in one_by_one(all_of_them, sum(sizes.values())):
        axis, held = inputs_axis(path, parameter.shape), weights_of(path, weights)
        exact = axis is not None and held in CODES
        values = read(stored[path], parameter.shape, transposed=path[-1] == "kernel", exact=exact)
        if values.shape != parameter.shape:
            raise ValueError(f"{path} has shape {parameter.shape}, but {values.shape} of {stored[path]}: fix {names}")
        parameter.set_value(as_read(model, path, as_held(values, held, axis=axis, dtype=dtype), mesh))
    return model


def check_weights(weights: str) -> None:
    """Raises ValueError where it is none of ``WEIGHTS``."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")


def weights_of(path: ParameterPath, weights: str) -> str:
    """What a matrix is held as, where the model is to be held as ``weights``.

    FP8 is for layers alone, as in published checkpoints: at the head it costs almost as much as in all of them.
    """
    return "floats" if weights == "fp8" and path[0] != "layers" else weights


def inputs_axis(path: ParameterPath, shape: tuple[int, ...]) -> int | None:
    """That of a matrix which may be codes with scales; None: the parameter is another thing."""
    return _INPUTS.get(path[-1]) if len(shape) == 2 else None


def as_held(values: Any, weights: str, *, axis: int | None, dtype: DTypeLike) -> Any:
    """A parameter's values, as floats or as codes with scales, as they are to be held.

    Args:
      weights: of ``WEIGHTS``.
      axis: that of the inputs; None: it is no matrix, and stays floats.
    """
    if axis is None or weights == "floats":
        return _floats(values, dtype=np.dtype(dtype)) if isinstance(values, Quantised) else values
    if weights in CODES:
        floats = values.widened() if isinstance(values, Quantised) else values
        return quantise(np.asarray(floats), weights, axis=axis)
    return values


@partial(jax.jit, static_argnames="dtype")
def _floats(values: Quantised, *, dtype: np.dtype) -> jax.Array:
    return values.widened().astype(dtype)


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
            f"{unexpected[0]!r}. Check that config and weights belong together and that the model is no variant "
            "of what its config names."
        )


def _rows_of_shared(places: Iterable[Stored]) -> dict[str, int]:
    """How many rows each tensor must have that several parameters share: up to the end of the last part."""
    rows: dict[str, int] = {}
    for place in places:
        if isinstance(place, Rows):
            rows[place.name] = max(place.stop, rows.get(place.name, 0))
    return rows


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Reads one parameter at a time, onto the host."""

    source: TensorSource
    dtype: np.dtype
    rows: Mapping[str, int]
    """What ``_rows_of_shared`` says."""
    weights: str
    """Of ``WEIGHTS``."""

    def __call__(
        self, place: Stored, shape: tuple[int, ...], *, transposed: bool, exact: bool
    ) -> np.ndarray | Quantised:
        """A parameter of that shape. ``exact``: floats in float32, since they are yet to be quantised."""
        if isinstance(place, Stacked):
            return np.stack([self._floats(name, shape[1:], transposed) for name in place.names])
        part = (place.start, place.stop - place.start) if isinstance(place, Rows) else None
        return self._tensor(place.name, shape, transposed, part, np.dtype(np.float32) if exact else self.dtype)

    def _floats(self, name: str, shape: tuple[int, ...], transposed: bool) -> np.ndarray:
        values = self._tensor(name, shape, transposed, None, self.dtype)
        return np.asarray(_floats(values, dtype=self.dtype)) if isinstance(values, Quantised) else values

    def _tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        transposed: bool,
        part: tuple[int, int] | None,
        dtype: np.dtype,
    ) -> np.ndarray | Quantised:
        """A tensor, or some of its rows. ``part``: first row and number of rows; ``dtype``: of floats."""
        source = self.source
        stored = shape[::-1] if transposed else shape
        stored = (self.rows.get(name, stored[0]), *stored[1:])
        if source.shape(name) != stored:
            raise CheckpointError(
                f"{source.origin}: tensor {name!r} has shape {source.shape(name)}, expected {stored} by the config. "
                "Check that config and weights belong together."
            )
        values = source.read(name, stored=self.weights == "stored")
        if isinstance(values, Quantised):
            check_quantised(values, stored, f"{source.origin}: tensor {name!r}")
            values = values if part is None else values.part(*part)
            return jax.tree.map(np.array, values.transposed() if transposed else values)
        values = values if part is None else values[part[0] : sum(part)]
        if not jnp.issubdtype(values.dtype, jnp.floating):
            raise CheckpointError(
                f"{source.origin}: tensor {name!r} holds {values.dtype}, expected floats: its config names no "
                "quantisation that says what they mean. Use a complete checkpoint."
            )
        # Always a copy of its own: JAX may keep a NumPy buffer without copying, and this one may be a mapped file.
        values = np.array(values.T if transposed else values, dtype=dtype, order="C")
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{source.origin}: tensor {name!r} has NaN or infinite values as {dtype}. The checkpoint is "
                f"damaged, or its values don't fit in {dtype}; download it again or load it as float32."
            )
        return values


def check_quantised(values: Quantised, shape: tuple[int, ...], what: str) -> None:
    """Raises CheckpointError, which begins with ``what``, where parts don't belong together or aren't finite."""
    if fault := values.fault(shape):
        raise CheckpointError(f"{what} {fault}. Check that config and weights belong together.")
    for part, array in jax.tree_util.tree_leaves_with_path(values):
        if jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(np.asarray(array)).all():
            raise CheckpointError(
                f"{what} has NaN or infinite values among its {jax.tree_util.keystr(part).strip('.')}. The checkpoint "
                "is damaged; download it again."
            )
