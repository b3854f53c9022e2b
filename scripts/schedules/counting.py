"""From a kernel and a chip to cycles: compiled with the compiler's dumps, followed, and counted."""

import math
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh
from targets import DEVICES, compile_for_tpu

from pallas_kernels import use_implementation
from schedules.bundles import UNITS, Program, ScheduleError, read
from schedules.cases import Case, Part
from schedules.scalar_core import ScalarCore, Step

DUMP = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true"
PUSH_CYCLES = {True: 8, False: 4}
"""That a matrix unit takes in one register of weights, transposed or not: no schedule has them closer."""


def dumped(chip: str, case: Case, directory: Path) -> Program:
    """The schedule of a kernel; once a process, since the compiler reads where to dump as it is loaded."""
    os.environ["LIBTPU_INIT_ARGS"] = DUMP.format(directory)
    with use_abstract_mesh(_mesh(chip)):
        compile_for_tpu(chip, case.function, case.pool, *jax.eval_shape(lambda: case.arguments(case.runs[0])))
    return read(directory, case.kernel)


def _mesh(chip: str) -> AbstractMesh:
    """Tells kernels that ask which chip they are for."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=str(DEVICES[chip].topology)).devices[0]
    try:
        kind = AbstractDevice(device.device_kind, device.num_cores, "tpu")
    except TypeError:  # jax 0.10
        kind = AbstractDevice(device.device_kind, device.num_cores)  # pyright: ignore[reportCallIssue]
    return AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=kind)


class Call(NamedTuple):
    """Of a kernel, as the wrapper around it makes it."""

    prefetched: dict[int, np.ndarray]
    """What it gets in SMEM, flat, by its number among the operands."""
    passes: int
    """Steps of the grid."""


def called(case: Case, kvs: int) -> Call:
    """For heads of so many KVs."""
    found: dict[str, Call] = {}

    def instead(kernel: Any, *_: Any, grid_spec: Any = None, out_shape: Any, name: str | None = None, **__: Any) -> Any:
        def call(*operands: Any) -> Any:
            scalars = jax.tree.leaves(operands[: grid_spec.num_scalar_prefetch])
            flat = dict(enumerate(map(_words, scalars)))
            found.setdefault(name or case.kernel, Call(flat, math.prod(grid_spec.grid)))
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_shape)

        return call

    small = jax.tree.map(lambda pool: jnp.zeros(_of_one(pool.shape, case.blocks_axis), pool.dtype), case.pool)
    with mock.patch.object(pl, "pallas_call", instead), jax.disable_jit(), use_implementation("mosaic_tpu"):
        case.function(small, *case.arguments(kvs))
    if case.kernel not in found:
        raise ScheduleError(f"{case.name} calls {sorted(found)}, and not {case.kernel}")
    return found[case.kernel]


def _of_one(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], 1, *shape[axis + 1 :])


def _words(x: Any) -> np.ndarray:
    """As SMEM holds an array: rows of 128 words, or of four rows of bytes each, if it has rows."""
    array = np.asarray(x)
    if array.ndim > 1:
        rows, lanes = (-n % unit for n, unit in zip(array.shape[-2:], (8, 128), strict=True))
        bytewise = array.dtype.itemsize == 1
        array = np.pad(array, [*[(0, 0)] * (array.ndim - 2), (0, rows * bytewise), (0, lanes)])
        if bytewise:
            tiled = array.reshape(-1, array.shape[-2] // 8, 2, 4, array.shape[-1] // 128, 128)
            array = np.ascontiguousarray(tiled.transpose(0, 1, 4, 2, 5, 3)).view(np.int32)
    if array.dtype.itemsize != 4:
        raise ScheduleError(f"a prefetched array of {array.dtype} whose place in SMEM isn't known")
    return array.reshape(-1)


class Run:
    """Passes of the grid's loop for heads of one length, those that only fetch for the next or store left out."""

    def __init__(self, steps: list[Step], kinds: np.ndarray, passes: int, rows: int, cores: int):
        """
        Args:
          steps: what one core ran.
          kinds: of each bundle.
          passes: of the whole grid, which may be divided among the cores.
          rows: heads that the whole grid visits.
          cores: that the chip has.
        """
        work = np.array([np.dot(step.counts, kinds == "vector") for step in steps])
        busy = int((work > work.max() / 100).sum())
        possible = [n for n in (passes, passes / cores) if n == int(n) and 0 <= len(steps) - n <= 2]
        if not possible:
            raise ScheduleError(f"a grid of {passes} steps on {cores} cores ran {len(steps)} passes")
        here = int(min(possible, key=lambda n: abs(n - busy)))
        self.cores = passes // here
        first = max(range(len(steps) - here + 1), key=lambda at: work[at : at + here].sum())
        self.steps, self.rows = steps[first : first + here], rows * here // passes
        self.a_row = Fraction(here, self.rows)

    def row(self) -> tuple[np.ndarray, float]:
        """How often each bundle runs for a head in the steady state, and the copies that start: a mean over some passes
        in the middle of those that follow each other on a core."""
        first, end = self.rows // 8, self.rows // 8 + max(1, self.rows // 8)
        begin = -(-first * self.a_row.numerator // self.a_row.denominator)
        passes = self.steps[begin : max(begin + 1, int(end * self.a_row))]  # one may be of many heads
        rows = float(len(passes) / self.a_row)
        return np.sum([step.counts for step in passes], axis=0) / rows, sum(step.copies for step in passes) / rows


@dataclass(frozen=True, kw_only=True)
class Count:
    """Of one part of a kernel on a chip, in cycles but for what is said otherwise."""

    case: str
    part: str
    chip: str
    kvs: int
    cycles: float
    """As scheduled."""
    copying: float
    """Of them, with no vector instruction, but one that starts a copy or only serves that."""
    scalar: float
    """Of them, with other scalar instructions alone."""
    empty: float
    """Of them, with nothing: results are waited for."""
    copies: float
    """Copies started."""
    busy: dict[str, float]
    """That each kind of unit takes at least: its slots over how many there are of it."""
    needed: float
    """That the bytes take at the published bandwidth, or the FLOPs at the published rate, if nothing else did."""
    is_compute: bool
    """What is needed are FLOPs."""
    bound: str
    cores: int
    """That share the heads."""

    @property
    def share(self) -> float:
        """Of the bandwidth, or of the FLOPs."""
        return self.needed / max(self.needed, self.cycles)


def count(chip: str, case: Case, directory: Path) -> list[Count]:
    program = dumped(chip, case, directory)
    device = DEVICES[chip]
    kinds = kinds_of(program)

    def run(kvs: int) -> Run:
        call = called(case, kvs)
        steps = ScalarCore(program, call.prefetched).run()
        return Run(steps, kinds, call.passes, case.rows, device.cores)

    runs = {kvs: run(kvs) for kvs in case.runs}
    return [_count(chip, case, part, program, kinds, runs) for part in case.parts]


def _count(chip: str, case: Case, part: Part, program: Program, kinds: np.ndarray, runs: dict[int, Run]) -> Count:
    device = DEVICES[chip]
    counts, copies = runs[part.more].row()
    if part.less is not None:
        less, fewer = runs[part.less].row()
        counts, copies = counts - less, copies - fewer
    counts, copies = counts / part.times, copies / part.times
    if counts.sum() <= 0:
        raise ScheduleError(f"{case.name}, {part.name}: {counts.sum()} cycles")
    by_kind = {kind: float(counts[kinds == kind].sum()) for kind in ("empty", "copying", "scalar")}
    filled = counts @ np.array(program.slots) / np.array(program.capacity)
    busy = dict(zip(UNITS, filled.tolist(), strict=True))
    busy["MXU weights"] = float(counts @ pushing(program)) / program.capacity[0]
    seconds = part.need.bytes / device.bandwidth + part.need.flops / device.flops
    needed = seconds * device.clock * device.cores
    cycles = float(counts.sum())
    return Count(
        case=case.name,
        part=part.name,
        chip=chip,
        kvs=part.kvs,
        cycles=cycles,
        copies=copies,
        busy=busy,
        needed=needed,
        is_compute=part.need.flops > 0,
        cores=runs[part.more].cores,
        bound=bound(cycles, needed, part.need.flops > 0, by_kind | busy),
        **by_kind,
    )


def bound(cycles: float, needed: float, is_compute: bool, parts: dict[str, float]) -> str:
    """What takes most: the bytes or FLOPs, or what most bundles are full of, or lack."""
    if needed >= cycles:
        return "FLOPs" if is_compute else "bandwidth"
    names = {"empty": "latency", "copying": "copy starts", "scalar": "other scalar", "MXU weights": "MXU weights"}
    names |= {unit: unit for unit in ("MXU", "XLU", "VALU", "VLOAD", "VSTORE")}
    most = max(names, key=lambda part: parts[part])
    return f"{names[most]} {parts[most] / cycles:.0%}"


def pushing(program: Program) -> np.ndarray:
    """Of each bundle: cycles of matrix units in which weights are taken in."""
    return np.array(
        [
            sum(PUSH_CYCLES["xpose" in op.name] for op in bundle.ops if op.name.startswith("vmatpush"))
            for bundle in program.bundles
        ]
    )


def kinds_of(program: Program) -> np.ndarray:
    """Of each bundle: empty, copying, scalar or vector."""
    feeds = feeding_copies(program)
    kinds = []
    for bundle in program.bundles:
        ops = [op for op in bundle.ops if op.name not in ("sphi", "vphi", "int_to_ptr") and "operand" not in op.name]
        if not ops:
            kinds.append("empty")
        elif any(op.is_vector for op in ops):
            kinds.append("vector")
        elif any(op.starts_copy or op.result in feeds for op in ops):
            kinds.append("copying")
        else:
            kinds.append("scalar")
    return np.array(kinds)


def feeding_copies(program: Program) -> set[str]:
    """Values that only serve to start copies."""
    users: dict[str, list[Any]] = {}
    made = {}
    for bundle in program.bundles:
        for op in bundle.ops:
            for name in op.reads:
                users.setdefault(name, []).append(op)
            if op.result:
                made[op.result] = op
    feeds: set[str] = set()
    grows = True
    while grows:
        grows = False
        for name, using in users.items():
            if name in feeds or name not in made or made[name].name == "sphi":
                continue
            if all(op.starts_copy or op.result in feeds for op in using):
                feeds.add(name)
                grows = True
    return feeds
