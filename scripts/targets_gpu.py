"""Compiles for an NVIDIA GPU that is not there: XLA and ptxas need its description, not the device."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # a plugin without a driver

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding, use_abstract_mesh

PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
CORES = 132
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  device_memory_size: 150000000000
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 12 }
"""


def why_not() -> str | None:
    """Why nothing can be compiled for a GPU here; None: it can."""
    if not any(importlib.util.find_spec(plugin) for plugin in PLUGINS):
        return f"none of {', '.join(PLUGINS)} is installed"
    return None


def h200s(count: int) -> list[Any]:
    """So many of one host, to compile for."""
    return topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology=f"1x1x{count}", target_config=H200
    ).devices


def lowered_for(count: int, axis: str = "x") -> Any:
    """A context in which the lowering knows which GPU it is for, and how many of them a mesh axis has."""
    try:
        device = AbstractDevice("NVIDIA H200", CORES, "gpu")
    except TypeError:  # jax 0.10
        device = AbstractDevice("NVIDIA H200", CORES)  # pyright: ignore[reportCallIssue]
    return use_abstract_mesh(AbstractMesh((count,), (axis,), axis_types=(AxisType.Auto,), abstract_device=device))


def compile_for_h200(function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
    """The compiled program of ``function`` for arguments given by shape and dtype."""
    here = SingleDeviceSharding(h200s(1)[0])
    jitted = jax.jit(function, donate_argnums=donate, in_shardings=here, out_shardings=here)
    with lowered_for(1):
        lowered = jitted.lower(*args)
    return lowered.compile()
