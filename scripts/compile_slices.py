"""Compiles the engine's own programs for TPU slices and GPUs that aren't here, their KV heads split over the chips.

    python scripts/compile_slices.py [--slices v6e-8 ...] [--models llama-3.1-70b ...] [--programs decode chunk ...]

prints a row a program: MiB of temporaries and at the peak on each chip, and what is wrong, such as a sum too many in a
layer.
"""

import argparse
import re
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from compile_tpu import BATCH, BLOCK_SIZE, CHUNK, CONTEXT, POLICY
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from targets import DEVICES, GIB, TPUS, copies_of, quantise_abstractly, sizes, why_not
from targets_gpu import h200s, lowered_for
from targets_gpu import why_not as why_no_gpu

from jaxkv.cache import CacheConfig, PagedCache, init_cache
from jaxkv.engine.devices import AXIS, HeadMesh
from jaxkv.engine.programs import Programs
from jaxkv.engine.schedule import STEPS
from jaxkv.generation.sampling import Greedy
from models import Llama, LlamaConfig, stack_layers
from models.shapes import LARGE_SHAPES, SHAPES
from models.sharding import shard, weight_specs
from pallas_kernels import use_implementation
from pallas_kernels.gpu_warpgroup import IN_PLACE

SLICES = {
    "v5e-4": ("v5e", "v5e:2x2"),
    "v5e-8": ("v5e", "v5e:2x4"),
    "v6e-8": ("v6e", "v6e:2x4"),
    "v5p-4": ("v5p", "v5p:2x2x1"),
    "v5p-8": ("v5p", "v5p:2x2x2"),
    "h200-4": ("h200", "4"),
}
"""By name: the chip, and libtpu's name of the slice; of v5p in chips, not in cores. Of GPUs: how many."""
MODELS = {"llama-3.1-8b": SHAPES["llama-3.1-8b"], **LARGE_SHAPES}
USUAL = (
    *(("llama-3.1-70b", weights, where) for where in ("v6e-8", "v5p-4", "v5p-8") for weights in ("bfloat16", "fp8")),
    *(("llama-3.1-8b", "bfloat16", where) for where in ("v5e-4", "v5e-8", "h200-4")),
    ("llama-3.1-70b", "bfloat16", "h200-4"),
)
PROGRAMS = ("decode", "chunk", "compress_rows")
ONE_ARRAY, TEMPORARIES = 64 * 2**20, 128 * 2**20
"""Bytes beside weights and cache: of what is laid out anew, and of all there is at a time."""
SUMS_A_LAYER = 2


@dataclass(frozen=True, kw_only=True)
class Split:
    """A model and a cache on a slice: shapes only, of all chips together."""

    mesh: Mesh
    is_gpu: bool
    graph: Any
    structure: Any
    leaves: list[Any]
    cache: PagedCache
    chip_bytes: int
    """Of weights."""

    def run(self, name: str, *given: Any, donated: dict[str, Any], **fixed: Any) -> Any:
        """One of the engine's programs, compiled."""
        with lowered_for(self.mesh.size, AXIS) if self.is_gpu else nullcontext():
            return HeadMesh(mesh=self.mesh).compile(self._program(name, fixed), self.leaves, donated, given)

    def made_by(self, name: str, *given: Any, **fixed: Any) -> Any:
        """Shapes of what one makes that is given nothing away."""
        arguments = self.leaves, {}, given
        return jax.eval_shape(HeadMesh(mesh=self.mesh).inside(self._program(name, fixed), *arguments), *arguments)

    def _program(self, name: str, fixed: dict[str, Any]) -> Any:
        step = getattr(Programs, name).__wrapped__

        def program(leaves: list[Any], donated: dict[str, Any], given: Any) -> Any:
            inside = Programs.__new__(Programs)
            inside.model, inside.stop_tokens = nnx.merge(self.graph, jax.tree.unflatten(self.structure, leaves)), ()
            return step(inside, *donated.values(), *given, **fixed)

        return program


def why_no_slice(name: str) -> str | None:
    """Why nothing can be compiled for one here; None: it can."""
    chip, _ = SLICES[name]
    if chip in TPUS:
        return why_not(chip)
    if jax.__version_info__ < IN_PLACE:
        return f"kernels for GPUs write in place, which needs jax 0.11, this is {jax.__version__}"
    return why_no_gpu()


def split_over(config: LlamaConfig, weights: str, name: str) -> Split:
    """As ``LLM(devices=N)`` has them: on TPUs stacked layers; a pool of what 0.8 of the memory leaves."""
    chip, topology = SLICES[name]
    is_gpu = chip not in TPUS
    if is_gpu:
        devices = h200s(int(topology))
    else:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices), (AXIS,))
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    if weights != "bfloat16":
        model = quantise_abstractly(model, weights, per_tensor=True)
    local = shard(model if is_gpu else stack_layers(model), axis=AXIS, count=mesh.size)
    graph, state = nnx.split(local)

    def placed(leaf: Any, spec: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    leaves, structure = jax.tree.flatten(jax.tree.map(placed, state, weight_specs(local, AXIS)))
    held = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    sized = CacheConfig.for_model(
        config,
        batch=BATCH,
        max_context=CONTEXT,
        block_size=BLOCK_SIZE,
        memory=mesh.size * int(min(0.8 * DEVICES[chip].memory - held, 48 * GIB)),
        dtype=jnp.dtype(jnp.bfloat16),
        shards=HeadMesh(mesh=mesh).shards,
    )
    cache = jax.eval_shape(partial(init_cache, sized))
    return Split(
        mesh=mesh,
        is_gpu=is_gpu,
        graph=graph,
        structure=structure,
        leaves=leaves,
        cache=cache,
        chip_bytes=int(held),
    )


def compiled(split: Split, name: str) -> Any:
    """The program of this name, as the engine calls it for a whole batch, or for one prompt."""
    rows, one = jax.ShapeDtypeStruct((BATCH,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    held = {"cache": split.cache}
    if name == "decode":
        return split.run("decode", rows, rows, Greedy(), donated=held, steps=STEPS, policy=POLICY)
    if name == "compress_rows":
        return split.run("compress_rows", one, one, donated=held, policy=POLICY)
    state = split.made_by("start", split.cache, one, one, policy=POLICY, fresh=True)
    tokens = jax.ShapeDtypeStruct((1, CHUNK), jnp.int32)
    return split.run("chunk", one, tokens, one, donated=held | {"prompt": state}, policy=POLICY)


COLLECTIVE = re.compile(r"= \(*(\w+)\[([\d,]*)\].*? (all-reduce|all-gather|reduce-scatter|all-to-all)(-start)?\(")


def collectives(program: Any) -> list[str]:
    """What goes over all chips, as often as the program's text has it: once of what is in a loop."""
    return [f"{m[3]} {m[1]}[{m[2]}]" for line in program.as_text().splitlines() if (m := COLLECTIVE.search(line))]


def anew(program: Any) -> list[str]:
    """Large arrays that are laid out anew in the chip's memory; not those that are only fetched into its scratch."""
    return [each for each in copies_of(program, (ONE_ARRAY,), 1) if not each.startswith("copy-start")]


def compile_all(
    model: str, weights: str, where: str, programs: list[str], layers: int | None = None
) -> Iterator[dict[str, Any]]:
    """``layers``: of the model; None: all."""
    config, chip = MODELS[model], SLICES[where][0]
    config = replace(config, num_layers=layers or config.num_layers)
    with use_implementation("mosaic_tpu" if chip in TPUS else "mosaic_gpu"):
        split = split_over(config, weights, where)
        for name in programs:
            began = time.perf_counter()
            program = compiled(split, name)
            pool = split.cache.raw.pool
            of_chip = pool.size * pool.dtype.itemsize // split.mesh.size
            found, seen = sizes(program), collectives(program)
            length = CHUNK if name == "chunk" else 1
            hidden = f"[{1 if name == 'chunk' else BATCH},{length},{config.hidden_size}]"
            yield {
                "model": model,
                "weights": weights,
                "slice": where,
                "program": name,
                "weights_bytes": split.chip_bytes,
                "pool": of_chip,
                "memory": DEVICES[chip].memory,
                "seconds": time.perf_counter() - began,
                "layers": config.num_layers if split.is_gpu else 1,
                "sums": sum(each.startswith("all-reduce") and each.endswith(hidden) for each in seen),
                "collectives": seen,
                "copies": anew(program),
                **found,
            }


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled program; nothing, as it should be."""
    found = [f"lays out anew: {each}" for each in row["copies"]]
    if row["aliased"] < row["pool"]:
        found.append(f"only {row['aliased']} bytes of {row['pool']} are updated in place")
    if row["temporary"] > TEMPORARIES:
        found.append(f"{row['temporary']} bytes of temporaries")
    if row["peak"] > row["memory"]:
        found.append(f"{row['peak']} bytes, more than the chip's {row['memory']}")
    # Of the layers, of which the program's text has one where they are stacked, and of the embeddings.
    most = 0 if row["program"] == "compress_rows" else SUMS_A_LAYER * row["layers"] + 1
    if row["sums"] != most:
        found.append(f"{row['sums']} sums of hidden states, not {most}")
    return found


COLUMNS = "model", "weights", "slice", "program", "weights, pool GiB a chip", "temporary / peak MiB", "s", ""


def line(row: dict[str, Any]) -> str:
    """Of the table."""
    held = f"{row['weights_bytes'] / GIB:.1f}, {row['pool'] / GIB:.1f}"
    memory = f"{row['temporary'] / 2**20:,.0f} / {row['peak'] / 2**20:,.0f}"
    of = (row[name] for name in ("model", "weights", "slice", "program"))
    return "| " + " | ".join([*of, held, memory, f"{row['seconds']:.0f}", "; ".join(faults(row))]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--slices", nargs="+", choices=SLICES, default=[name for name in SLICES if why_no_slice(name) is None]
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--weights", nargs="+", choices=["bfloat16", "fp8"], default=["bfloat16", "fp8"])
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--layers", type=int, help="of each model, where all take too long: of GPUs' each is compiled")
    options = parser.parse_args()
    print(f"jax {jax.__version__}; batch {BATCH}, {CONTEXT}-token tables, block {BLOCK_SIZE}\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|", flush=True)
    rows = []
    for model, weights, where in USUAL:
        if model in options.models and weights in options.weights and where in options.slices:
            if reason := why_no_slice(where):
                sys.exit(f"nothing can be compiled for {where}: {reason}")
            for row in compile_all(model, weights, where, options.programs, options.layers):
                rows.append(row)
                print(line(row), flush=True)
    if any(faults(row) for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
