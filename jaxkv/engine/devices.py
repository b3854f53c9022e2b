"""The devices that an engine runs on: one, or several that share the KV heads."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from jaxkv.cache import CacheConfig, PagedCache, init_cache
from jaxkv.cache.shards import WHOLE, HeadShards, ShardedHeads, partition_specs
from jaxkv.checks import number, shown
from models.interface import Decoder, Shardable
from models.sharding import check_count, place, shard, weight_specs

AXIS = "heads"


@dataclass(frozen=True, kw_only=True)
class Devices(ABC):
    """Where a model's programs run, and how they are compiled for that."""

    engines: int = 1
    """How many like this share the machine, and with it a CPU's memory."""

    @property
    @abstractmethod
    def shards(self) -> HeadShards:
        """How the KV heads are split."""

    @property
    def mesh_of_weights(self) -> Mesh | None:
        """What ``models.load_model`` takes."""
        return None

    @abstractmethod
    def check(self, model: Decoder) -> None:
        """Raises ValueError for a model that can't run here."""

    @abstractmethod
    def split(self, model: Decoder) -> tuple[Any, Any]:
        """The model as programs run it, as ``nnx.split`` gives it: its graph, and its weights where they belong."""

    @abstractmethod
    def compile(self, program: Callable[..., Any], leaves: Any, donated: Any, given: Any) -> jax.stages.Compiled:
        """``program(leaves, donated, given)`` compiled for these arguments, or for arrays like them: of all but the
        leaves the shapes are enough."""

    def told(self, given: Any) -> Any:
        """Arguments as a compiled program takes them."""
        return given

    def agreed(self, *seconds: float) -> tuple[float, ...]:
        """What was measured, as all processes take it: what they do next may depend on it, and must be the same."""
        return seconds

    @abstractmethod
    def empty_cache(self, config: CacheConfig) -> PagedCache: ...

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Bytes that a cache may take here at most, and where nobody says: a part of what accelerators have left, or of
        a CPU's memory."""


@dataclass(frozen=True, kw_only=True)
class OneDevice(Devices):
    """JAX's default device."""

    @property
    def shards(self) -> HeadShards:
        return WHOLE

    def check(self, model: Decoder) -> None:
        pass

    def split(self, model: Decoder) -> tuple[Any, Any]:
        return nnx.split(model)

    def compile(self, program: Callable[..., Any], leaves: Any, donated: Any, given: Any) -> jax.stages.Compiled:
        return jax.jit(program, donate_argnums=1).lower(leaves, donated, given).compile()

    def empty_cache(self, config: CacheConfig) -> PagedCache:
        return init_cache(config)

    def memory(self) -> tuple[int, int]:
        return _memory([jax.devices()[0]], self.engines)


@dataclass(frozen=True, kw_only=True)
class HeadMesh(Devices):
    """Each device has some of the KV heads, of the query heads that read them, and of the weights that make them: every
    program is one ``jax.shard_map``."""

    mesh: Mesh

    @property
    def shards(self) -> HeadShards:
        return ShardedHeads(axis=AXIS, devices=self.mesh.size)

    @property
    def mesh_of_weights(self) -> Mesh:
        return self.mesh

    def check(self, model: Decoder) -> None:
        check_count(_shardable(model), self.mesh.size)

    def split(self, model: Decoder) -> tuple[Any, Any]:
        local = shard(_shardable(model), axis=AXIS, count=self.mesh.size)
        graph, weights = nnx.split(local)
        return graph, place(weights, weight_specs(local, AXIS), self.mesh)

    def compile(self, program: Callable[..., Any], leaves: Any, donated: Any, given: Any) -> jax.stages.Compiled:
        """Of leaves that are shapes, too, the places must be known."""
        specs = self._places(leaves, donated, given)
        places = jax.tree.map(partial(NamedSharding, self.mesh), specs)
        whole = jax.jit(self.inside(program, leaves, donated, given), in_shardings=places, donate_argnums=1)
        return whole.lower(leaves, donated, self.told(given)).compile()

    def told(self, given: Any) -> Any:
        return jax.tree.map(_told, given)

    def inside(self, program: Callable[..., Any], leaves: Any, donated: Any, given: Any) -> Callable[..., Any]:
        """``program`` in a ``shard_map``, for these arguments; tracing it tells how what it makes is split."""
        specs = self._places(leaves, donated, given)
        inside = partial(jax.shard_map, mesh=self.mesh, in_specs=specs, check_vma=False)
        made: list[Any] = []

        def look(*args: Any) -> tuple[()]:
            made.append(partition_specs(program(*args), AXIS))
            return ()

        jax.eval_shape(inside(look, out_specs=()), leaves, donated, given)
        return inside(program, out_specs=made[0])

    def _places(self, leaves: Any, donated: Any, given: Any) -> tuple[Any, ...]:
        return ([leaf.sharding.spec for leaf in leaves], *partition_specs((donated, given), AXIS))

    def agreed(self, *seconds: float) -> tuple[float, ...]:
        """The first process's."""
        if not self.mesh.is_multi_process:
            return seconds
        told = multihost_utils.broadcast_one_to_all(np.array(seconds, np.float32))
        return tuple(np.asarray(told).tolist())

    def empty_cache(self, config: CacheConfig) -> PagedCache:
        return init_cache(config, self.mesh)

    def memory(self) -> tuple[int, int]:
        return _memory(list(self.mesh.devices.flat), self.engines)


def devices_for(devices: int | Sequence[Any]) -> Devices:
    """JAX's default device for 1, so many of the first ones, or just those.

    Raises:
      ValueError: there aren't so many, or they aren't given as that.
    """
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        if not devices or not all(isinstance(device, jax.Device) for device in devices):
            raise ValueError(f"devices must be a number or some of jax.devices(), got {shown(devices)}")
        return HeadMesh(mesh=Mesh(np.array(devices), (AXIS,)))
    count, there = number(devices, "devices"), jax.devices()
    if not 1 <= count <= len(there):
        raise ValueError(
            f"devices must lie between 1 and the {len(there)} that JAX sees here ({there[0].platform}), got {count}"
        )
    return OneDevice() if count == 1 else HeadMesh(mesh=Mesh(np.array(there[:count]), (AXIS,)))


def _shardable(model: Decoder) -> Shardable:
    if not isinstance(model, Shardable):
        raise ValueError(
            f"{type(model).__name__} says in no splits how its weights are split over devices (models.Shardable); give "
            "it some, or take devices=1"
        )
    return model


def _told(value: Any) -> Any:
    """What one device holds is told to all."""
    return np.asarray(value) if isinstance(value, jax.Array) and len(value.sharding.device_set) == 1 else value


def _memory(devices: Sequence[Any], engines: int) -> tuple[int, int]:
    """Of devices that each take an equal part; where they are a CPU's, of one of so many engines that share it."""
    used = [device.memory_stats() for device in devices if device.process_index == jax.process_index()]
    if all(stats is not None and "bytes_limit" in stats for stats in used):
        free = len(devices) * min(stats["bytes_limit"] - stats["bytes_in_use"] for stats in used if stats is not None)
        return free, free * 9 // 10
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return memory // engines, memory // engines // 2
