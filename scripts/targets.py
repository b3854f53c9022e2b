"""Compiles for accelerators that aren't here, with their real compilers, and looks at what came out.

TPU: needs ``libtpu`` beside jax: 0.0.42.1 with jax 0.10.2, which doesn't know v7x; 0.0.48.1 with 0.11.2; 0.0.50.1 with
0.12.0.1.
"""

import importlib.util
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # a CUDA plugin without a driver is no error here
# A description of a machine that libtpu would otherwise ask a metadata server for, and may be loaded by many at once.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_WORKER_ID", "0")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxkv.cache import CacheConfig, PagedCache, init_cache
from models import LlamaConfig
from models.checkpoints.assemble import inputs_axis, parameters_of, weights_of
from models.quantised import CODES, Grouped, Packed, Quantised, Scaled
from pallas_kernels import use_implementation

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Links:
    """Between chips that stand in a ring, as those of slices of 2x2, 2x4 and 2x2x2 can."""

    bandwidth: float
    """Bytes a second that one link carries each way."""
    count: int = 2
    """Of a chip's, that lie on the ring: to the one before and the one after. 1: a switch, which all chips share."""
    hop: float = 1e-6
    """Seconds from a chip to the next, however little is sent. Assumed, after "How to Scale Your Model", which
    takes about that for a TPU."""

    def rate(self, chips: int) -> float:
        """Bytes a second that each of so many chips sends; two have one link between them."""
        return self.bandwidth * min(self.count, chips - 1)


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a device offers, as its maker publishes it. For v7x: one of a chip's two, as JAX sees them."""

    name: str
    memory: int
    """Bytes."""
    bandwidth: float
    """Bytes a second."""
    flops: float
    """A second, bfloat16, dense."""
    topology: str | None = None
    """libtpu's name of the smallest slice; None: no TPU."""
    clock: float = 0.0
    """Instruction bundles a second of a TPU's core: reckoned from its FLOPs and the size of its matrix units."""
    cores: int = 1
    """Tensor cores that share the memory."""
    links: Links | None = None
    """To other chips; None: only by way of the host."""


_LINKS_V5E, _LINKS = Links(bandwidth=50e9), Links(bandwidth=100e9)
"""Of TPUs. Cloud TPU's documentation gives all of a chip's links together, both ways: 400 GB/s for the 4 of a v5e, 800
for the 4 of a v6e, 1,200 for the 6 of a v5p and of a v7x. Two of them lie on a ring: slices of 4 and 8 chips don't wrap
round, so their rings turn corners and leave the other links idle. On it a v7x's two devices are neighbours."""
_NVLINK = Links(bandwidth=450e9, count=1)
"""The fourth, by NVIDIA's data sheets of H100 and H200: 900 GB/s both ways together, through a switch."""

DEVICES = {
    device.name: device
    for device in (
        Device(
            name="v5e",
            memory=16 * GIB,
            bandwidth=819e9,
            flops=197e12,
            topology="v5e:2x2",
            clock=1.5e9,
            links=_LINKS_V5E,
        ),
        Device(
            name="v5p",
            memory=95 * GIB,
            bandwidth=2765e9,
            flops=459e12,
            topology="v5p:2x2x1",
            clock=1.75e9,
            cores=2,
            links=_LINKS,
        ),
        Device(
            name="v6e",
            memory=32 * GIB,
            bandwidth=1640e9,
            flops=918e12,
            topology="v6e:2x2",
            clock=1.75e9,
            links=_LINKS,
        ),
        Device(
            name="v7x",
            memory=96 * GIB,
            bandwidth=3690e9,
            flops=1153e12,
            topology="tpu7x:2x2x1",
            clock=2.2e9,
            links=_LINKS,
        ),
        Device(name="l4", memory=24 * 10**9, bandwidth=300e9, flops=121e12),
        Device(name="h100", memory=80 * 10**9, bandwidth=3350e9, flops=989e12, links=_NVLINK),
        Device(name="h200", memory=141 * 10**9, bandwidth=4800e9, flops=989e12, links=_NVLINK),
    )
}
TPUS = tuple(name for name, device in DEVICES.items() if device.topology)


def why_not(chip: str) -> str | None:
    """Why nothing can be compiled for a TPU here; None: it can."""
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed"
    if chip == "v7x" and jax.__version_info__ < (0, 11):
        return f"v7x needs jax 0.11, this is {jax.__version__}"
    return None


def abstract_cache(model: LlamaConfig, **sizes: Any) -> PagedCache:
    """Shapes and dtypes of a cache as a TPU keeps it; ``sizes`` as ``CacheConfig.for_model`` takes them."""
    with use_implementation("mosaic_tpu"):
        config = CacheConfig.for_model(model, **sizes)
        return jax.eval_shape(lambda: init_cache(config))


def quantise_abstractly(model: Any, kind: str, *, per_tensor: bool = False) -> Any:
    """A model of shapes without memory, changed to hold its matrices as ``models.load_model(weights=kind)`` would.

    Args:
      per_tensor: one scale a matrix, as in many FP8 checkpoints, and not one an output.
    """
    dtype, _ = CODES[kind]
    for path, leaf in parameters_of(model).items():
        axis = inputs_axis(path, leaf.shape)
        if axis is None or weights_of(path, kind) == "floats":
            continue
        scales = tuple(1 if per_tensor or n == axis else size for n, size in enumerate(leaf.shape))
        codes = jax.ShapeDtypeStruct(leaf.shape, dtype)
        held: Any = Scaled(axis=axis, codes=codes, scales=jax.ShapeDtypeStruct(scales, jnp.float32))
        leaf.set_value(held)
    return model


def abstract_weights() -> dict[str, Quantised]:
    """Of a matrix of Llama 3.1 8B's feed-forward, shapes only: one of each way in which scales are shared."""
    inputs, outputs = 4096, 14_336

    def array(dtype: Any, *dims: int) -> Any:
        return jax.ShapeDtypeStruct(dims, dtype)

    f8, f16, bf16, u8 = jnp.float8_e4m3fn, jnp.float16, jnp.bfloat16, jnp.uint8
    codes, packed = array(f8, inputs, outputs), Packed(axis=0, low=array(u8, inputs // 2, outputs))
    k_quant = Grouped(
        axis=0, codes=array(u8, inputs // 32, outputs), scales=array(f16, inputs // 256, outputs), block=(8, 1)
    )
    by_block = array(jnp.float32, inputs // 128, outputs // 128)
    by_group, zeros = array(bf16, inputs // 128, outputs), array(jnp.int16, inputs // 128, outputs)
    return {
        "FP8, one scale": Scaled(axis=0, codes=codes, scales=array(jnp.float32, 1, 1)),
        "int8, a scale an output": Scaled(
            axis=0, codes=array(jnp.int8, inputs, outputs), scales=array(jnp.float32, 1, outputs)
        ),
        "FP8, blocks of 128": Grouped(axis=0, codes=codes, scales=by_block, block=(128, 128)),
        "4 bits, groups of 128": Grouped(axis=0, codes=packed, scales=by_group, zeros=zeros, block=(128, 1)),
        "Q4_K": Grouped(axis=0, codes=packed, scales=k_quant, offsets=k_quant, block=(32, 1)),
    }


def product_of(held: Quantised, x: Any) -> Any:
    return held.product(x, x.dtype)


def compile_for_tpu(chip: str, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
    """The compiled program of ``function`` with the TPU kernels, for arguments given by shape and dtype."""
    name = DEVICES[chip].topology
    if name is None:
        raise ValueError(f"{chip} is no TPU; expected one of {TPUS}")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    here = SingleDeviceSharding(topology.devices[0])
    with use_implementation("mosaic_tpu"):
        lowered = jax.jit(function, donate_argnums=donate, in_shardings=here, out_shardings=here).lower(*args)
    return lowered.compile()


def sizes(compiled: Any) -> dict[str, int]:
    """Bytes: ``aliased`` outputs, ``temporary``, and ``peak``, which counts padding too."""
    memory = compiled.memory_analysis()
    return {
        "aliased": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
    }


BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32}
"""Of what is looked at for copies; not FP8, which only weights are (stacked, they are retiled in place)."""
COPY = re.compile(r"= \(?(\w+)\[([\d,]*)\][^=]*? (copy|copy-start|transpose|pad|convert)\(")


def copies_of(compiled: Any, shape: tuple[int, ...], itemsize: int) -> list[str]:
    """What the optimised program copies, lays out anew or converts that is as large as the array or larger.

    Aliased bytes alone don't tell: an array can be laid out anew on its way in and on its way out.
    """
    least = math.prod(shape) * itemsize
    found = []
    for line in compiled.as_text().splitlines():
        match = COPY.search(line)
        if match and match[1] in BITS:
            count = math.prod(int(n) for n in match[2].split(",") if n)
            if count * BITS[match[1]] // 8 >= least:
                found.append(f"{match[3]} {match[1]}[{match[2]}]")
    return found
