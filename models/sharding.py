"""Tensor parallelism: a model whose matrices are split over devices, each of which runs some of its heads.

As in Megatron-LM (arXiv 1909.08053): what makes heads or hidden units is split by its outputs, what takes them by its
inputs, and there the devices' parts are summed, twice a layer. A model says in ``splits`` which of its modules are
which; ``models.layers.Linear`` and ``Embed`` do the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.interface import ModelSizes, ParameterPath, Shard, Shardable, Split
from models.layers import is_stacked
from models.quantised import Grouped, Packed, Quantised

_DIMS = {
    ("kernel", Split.OUTPUTS): -1,
    ("kernel", Split.INPUTS): -2,
    ("bias", Split.OUTPUTS): -1,
    ("embedding", Split.OUTPUTS): -2,
}
"""Which dimension of a parameter is split, counted from the last, whether layers are stacked or not; else none is."""


def shard(model: Shardable, *, axis: str = "heads", count: int) -> Shardable:
    """The model as each of ``count`` devices runs it, to be called inside a ``jax.shard_map`` over that mesh axis.

    Its leaves are still whole: ``weight_specs`` says how to split them. The given model stays as it is, but codes
    that are packed along a split dimension are laid out anew, so take the leaves from the one that is returned.

    Raises:
      ValueError: heads or matrices that can't be split so, with the counts that can.
    """
    check_count(model, count)
    graph, weights = nnx.split(model)
    model = nnx.merge(graph, jax.tree.map(lambda array: array, weights))  # variables of its own over the same arrays
    config = model.config
    model.config = replace(config, num_heads=config.num_heads // count, num_kv_heads=config.num_kv_heads // count)
    for module, split in _split_modules(model, count):
        module.shard = Shard(axis=axis, count=count, split=split)
        for name, dim in _dims(module, split):
            value: Any = getattr(module, name).get_value()
            if isinstance(value, Quantised):
                getattr(module, name).set_value(_in_parts(value, dim, count))
    return model


def weight_specs(model: Shardable, axis: str = "heads") -> Any:
    """How to split the leaves of a model from ``shard``: its ``nnx.state`` with a ``PartitionSpec`` for each array."""
    graph, weights = nnx.split(model)
    specs = nnx.merge(graph, jax.tree.map(lambda _: PartitionSpec(), weights))
    for whole, part in zip(_modules(model), _modules(specs), strict=True):
        if whole.shard is not None:
            for name, dim in _dims(whole, whole.shard.split):
                getattr(part, name).set_value(_specs(getattr(whole, name).get_value(), dim, axis))
    return nnx.state(specs)


def place(weights: Any, specs: Any, mesh: Mesh) -> Any:
    """The leaves on a mesh's devices, each with its part; those that are there already stay."""
    return jax.tree.map(partial(_on_mesh, mesh), weights, specs)


def as_read(model: Shardable, path: ParameterPath, value: Any, mesh: Mesh | None) -> Any:
    """A parameter's values, just read, on the devices of a mesh, each with its part; None: on the default device.

    Args:
      model: whose parameters have no memory yet.
      path: of the parameter, whose layers aren't stacked.
      value: NumPy's or JAX's arrays, which all processes have.
    """
    if mesh is None:
        return jax.device_put(value)
    return jax.tree.map(partial(_on_mesh, mesh), value, specs_of(model, path, value, mesh))


def specs_of(model: Shardable, path: ParameterPath, value: Any, mesh: Mesh) -> Any:
    """A ``PartitionSpec`` for each array, or shape, of a parameter. Arguments as for ``as_read``."""
    module = ("layers", *path[2:-1]) if path[0] == "layers" else path[:-1]
    split = model.splits.get(".".join(module))
    dim = split and _DIMS.get((path[-1], Split.OUTPUTS if split is Split.VOCABULARY else split))
    if dim is None or not _divides(value, dim, mesh.size):
        return jax.tree.map(lambda _: PartitionSpec(), value)
    return _specs(value, dim, mesh.axis_names[0])


def _on_mesh(mesh: Mesh, array: Any, spec: PartitionSpec) -> jax.Array:
    sharding = NamedSharding(mesh, spec)
    if isinstance(array, jax.Array) and array.sharding.device_set == sharding.device_set:
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])


def check_count(model: Shardable, count: int) -> None:
    """Raises ValueError where a model can't be split over so many devices, with the counts that it can."""
    if faults := _faults(model, count):
        sizes: ModelSizes = model.sizes
        good = [n for n in range(1, sizes.num_kv_heads + 1) if not _faults(model, n)]
        raise ValueError(
            f"this model can't be split over {count} devices: {faults[0]}; take {', '.join(map(str, good))}, and more "
            "engines where there are more devices"
        )


def _faults(model: Shardable, count: int) -> list[str]:
    sizes: ModelSizes = model.sizes
    if count < 1 or sizes.num_kv_heads % count:
        return [f"it has {sizes.num_kv_heads} KV heads"]
    faults = []
    for module, split in _split_modules(model, count):
        for name, dim in _dims(module, split):
            value: Any = getattr(module, name).get_value()
            if not _divides(value, dim, count):
                faults.append(f"a {name} of shape {value.shape} and its {split.name.lower()} don't divide evenly")
    return faults


def _modules(model: Any) -> list[Any]:
    """Those that can have a ``Shard``, in an order of the model's own."""
    return [module for _, module in nnx.iter_modules(model) if hasattr(module, "shard")]


def _split_modules(model: Shardable, count: int) -> Iterator[tuple[Any, Split]]:
    """The modules that the model's ``splits`` name; a vocabulary that doesn't divide stays whole on each device."""
    layers = [model.layers] if is_stacked(model) else model.layers
    for name, split in model.splits.items():
        of_layers = name.removeprefix("layers.")
        for owner in [model] if of_layers == name else layers:
            module = reduce(getattr, of_layers.split("."), owner)
            if module is None:  # a head that is tied to the embeddings
                continue
            if split is not Split.VOCABULARY:
                yield module, split
            elif all(_divides(getattr(module, leaf).get_value(), dim, count) for leaf, dim in _dims(module, split)):
                yield module, Split.OUTPUTS


def _dims(module: Any, split: Split) -> Iterator[tuple[str, int]]:
    """Names of a module's parameters that are split, and along which dimension."""
    kind = Split.OUTPUTS if split is Split.VOCABULARY else split
    for (name, of), dim in _DIMS.items():
        if of is kind and getattr(module, name, None) is not None:
            yield name, dim


def _divides(value: Any, dim: int, count: int) -> bool:
    """Whether a matrix can be split evenly, with whole blocks where values share entries."""
    size, rest = divmod(value.shape[dim], count)
    if rest or not isinstance(value, Grouped):
        return not rest
    if dim == value.axis - 2 and (value.order is not None or (isinstance(value.codes, Packed) and size % 8)):
        return False
    for entries in (value.scales, value.zeros, value.offsets):
        if entries is not None and entries.shape[dim] > 1:
            nested = not isinstance(entries, Grouped) or _divides(entries, dim, count)
            if size % value.block[dim] or not nested:
                return False
    return True


def _in_parts(value: Quantised, dim: int, count: int) -> Quantised:
    """With codes that are packed along a split dimension packed in so many parts, each by itself."""
    if not isinstance(value, Grouped):
        return value
    scales, offsets = (
        _in_parts(x, dim, count) if isinstance(x, Quantised) else x for x in (value.scales, value.offsets)
    )
    codes = value.codes
    if isinstance(codes, Packed) and codes.axis - 2 == dim:
        codes = codes.in_parts(count)
    return replace(value, codes=codes, scales=scales, offsets=offsets)


def _specs(value: Any, dim: int, axis: str) -> Any:
    """A ``PartitionSpec`` for each array of a parameter."""

    def spec(array: Any) -> PartitionSpec:
        return PartitionSpec() if array.shape[dim] == 1 else PartitionSpec(*[None] * (array.ndim + dim), axis)

    if isinstance(value, Grouped) and value.order is not None:
        return replace(_specs(replace(value, order=None), dim, axis), order=PartitionSpec())
    return jax.tree.map(spec, value)
