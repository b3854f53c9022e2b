"""KV heads split over devices: what one device's part of a cache asks of the others', and which arrays are split.

Each device has some of the heads, with a pool, tables and a free list of their own, so reading, writing and allocating
concern nobody else. Sums over heads, rankings of all heads, and whatever a loop or a branch depends on do.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

Tree = TypeVar("Tree")
_HEADS = "heads"


@dataclass(frozen=True)
class HeadShards:
    """All KV heads are on one device: there is nobody to ask. Static to jit."""

    @property
    def count(self) -> int:
        """Devices."""
        return 1

    def sum(self, value: Array) -> Array:
        """Over all devices."""
        return value

    def everywhere(self, true: Array) -> Array:
        """``bool[]``: whether it is true on all devices."""
        return true

    def gather(self, values: Array, axis: int) -> Array:
        """All heads' values from each device's own, along an axis of the array."""
        return values

    def own(self, values: Array, axis: int) -> Array:
        """The device's own heads' values, of all heads'."""
        return values

    def of_each(self, number: int) -> Array:
        """A number that each device keeps for itself, ``i32[]``."""
        return jnp.int32(number)


WHOLE = HeadShards()


@dataclass(frozen=True, kw_only=True)
class ShardedHeads(HeadShards):
    """The KV heads are split over a mesh axis, in their order. What asks others runs inside a ``jax.shard_map``.

    A number that each device keeps for itself is ``i32[1]`` there, and ``i32[devices]`` outside.
    """

    axis: str = "heads"
    """Of the mesh."""
    devices: int
    """That the axis has."""

    @property
    def count(self) -> int:
        return self.devices

    def sum(self, value: Array) -> Array:
        return lax.psum(value, self.axis)

    def everywhere(self, true: Array) -> Array:
        return lax.pmin(true.astype(jnp.int32).reshape(()), self.axis) > 0

    def gather(self, values: Array, axis: int) -> Array:
        return lax.all_gather(values, self.axis, axis=axis, tiled=True)

    def own(self, values: Array, axis: int) -> Array:
        size = values.shape[axis] // self.devices
        return lax.dynamic_slice_in_dim(values, lax.axis_index(self.axis) * size, size, axis)

    def of_each(self, number: int) -> Array:
        return jnp.full(self.devices, number, jnp.int32)


def by_head(axis: int) -> dict[str, int]:
    """Metadata of a dataclass field whose arrays are split over devices along that axis, as the KV heads are: a pool's
    along its blocks, since each device has blocks of its own."""
    return {_HEADS: axis}


def partition_specs(tree: Tree, axis: str = "heads") -> Tree:
    """How a cache, or whatever else is made of arrays, is split: a ``PartitionSpec`` in place of each array.

    Args:
      tree: arrays or their shapes; split are those in a dataclass's fields ``by_head``.
      axis: of the mesh.
    """

    def of(node: Any, dim: int | None) -> Any:
        if is_dataclass(node) and not isinstance(node, type):
            parts = [each for each in fields(node) if not each.metadata.get("static")]
            return replace(node, **{x.name: of(getattr(node, x.name), x.metadata.get(_HEADS, dim)) for x in parts})
        spec = PartitionSpec() if dim is None else PartitionSpec(*[None] * dim, axis)
        return jax.tree.map(lambda each: of(each, dim) if is_dataclass(each) else spec, node, is_leaf=is_dataclass)

    return of(tree, None)
