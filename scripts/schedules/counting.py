"""From a kernel and a chip to cycles: compiled with the compiler's dumps, followed, and counted."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from targets import DEVICES, compile_for_tpu

from pallas_kernels import use_implementation
from schedules.bundles import UNITS, Program, ScheduleError, read
from schedules.cases import Case, Part
from schedules.scalar_core import ScalarCore, Step

DUMP = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true"
MXU_CYCLES = 8
"""A matrix unit is busy for so long with an operation of it that the compiler counts."""


def dumped(chip: str, case: Case, directory: Path) -> Program:
    """The schedule of a kernel; once a process, since the compiler reads where to dump as it is loaded."""
    if "libtpu" in os.environ.get("LIBTPU_INIT_ARGS", ""):
        raise RuntimeError("the compiler was told already")
    os.environ["LIBTPU_INIT_ARGS"] = DUMP.format(directory)
    compile_for_tpu(chip, case.function, case.pool, *jax.eval_shape(lambda: case.arguments(1024)))
    return read(directory, case.kernel)


def prefetched(case: Case, kvs: int) -> dict[int, np.ndarray]:
    """What the kernel gets in SMEM for heads of so many KVs, flat, by its number among the operands."""
    found: dict[str, list[np.ndarray]] = {}

    def instead(kernel: Any, *_: Any, grid_spec: Any = None, out_shape: Any, name: str | None = None, **__: Any) -> Any:
        def call(*operands: Any) -> Any:
            scalars = jax.tree.leaves(operands[: grid_spec.num_scalar_prefetch])
            found.setdefault(name or kernel.__name__, [np.asarray(x).reshape(-1) for x in scalars])
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_shape)

        return call

    pool = jnp.zeros((1, *case.pool.shape[1:]), case.pool.dtype)
    with mock.patch.object(pl, "pallas_call", instead), jax.disable_jit(), use_implementation("mosaic_tpu"):
        case.function(pool, *case.arguments(kvs))
    if case.kernel not in found:
        raise ScheduleError(f"{case.name} calls {sorted(found)}, and not {case.kernel}")
    return dict(enumerate(found[case.kernel]))


class Run:
    """Passes of the grid's loop for heads of one length."""

    def __init__(self, steps: list[Step], kinds: np.ndarray, rows: int):
        """
        Args:
          steps: passes, with those that only fetch for the next, or store.
          kinds: of each bundle.
          rows: heads that the core visited.
        """
        works = np.flatnonzero(kinds == "vector")
        self.steps = [step for step in steps if any(step.counts[at] for at in works)]
        self.rows, self.a_row = rows, Fraction(len(self.steps), rows)

    def row(self, quarter: slice) -> tuple[np.ndarray, float]:
        """How often each bundle runs for a head in the steady state, and the copies that start; of a quarter of its
        passes, or of all: a mean over some rows in the middle of those that follow each other on a core."""
        first, end = self.rows // 8, self.rows // 8 + max(1, self.rows // 8)
        passes: list[Step] = []
        if quarter == slice(None):
            passes = self.steps[int(first * self.a_row) : int(end * self.a_row)]
        else:
            if self.a_row % 4:
                raise ScheduleError(f"{self.a_row} passes a head aren't four quarters")
            part = int(self.a_row) // 4
            for row in range(first, end):
                begin = int(row * self.a_row)
                passes += self.steps[begin + quarter.start * part : begin + quarter.stop * part]
        rows = end - first
        counts = np.sum([step.counts for step in passes], axis=0) / rows
        return counts, sum(step.copies for step in passes) / rows


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
    """Of them, with scalar instructions for the start of copies, and nothing else."""
    scalar: float
    """Of them, with other scalar instructions alone."""
    empty: float
    """Of them, with nothing: results are waited for."""
    copies: float
    """Copies started."""
    slots: dict[str, float]
    """Filled of each unit."""
    needed: float
    """That the bytes take at the published bandwidth, or the FLOPs at the published rate, if nothing else did."""
    is_compute: bool
    """What is needed are FLOPs."""
    bound: str

    @property
    def share(self) -> float:
        """Of the bandwidth, or of the FLOPs."""
        return self.needed / max(self.needed, self.cycles)


def count(chip: str, case: Case, directory: Path) -> list[Count]:
    program = dumped(chip, case, directory)
    device = DEVICES[chip]
    kinds = kinds_of(program)
    rows = case.rows // device.cores
    runs = {kvs: Run(ScalarCore(program, prefetched(case, kvs)).run(), kinds, rows) for kvs in case.runs}
    return [_count(chip, case, part, program, kinds, lambda run: runs[run[0]].row(run[1])) for part in case.parts]


def _count(
    chip: str,
    case: Case,
    part: Part,
    program: Program,
    kinds: np.ndarray,
    row: Callable[[tuple[int, slice]], tuple[np.ndarray, float]],
) -> Count:
    device = DEVICES[chip]
    counts, copies = row(part.more)
    if part.less is not None:
        less, fewer = row(part.less)
        counts, copies = counts - less, copies - fewer
    counts, copies = counts / part.times, copies / part.times
    if counts.sum() <= 0:
        raise ScheduleError(f"{case.name}, {part.name}: {counts.sum()} cycles")
    by_kind = {kind: float(counts[kinds == kind].sum()) for kind in ("empty", "copying", "scalar")}
    slots = dict(zip(UNITS, (counts @ np.array(program.slots)).tolist(), strict=True))
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
        slots=slots,
        needed=needed,
        is_compute=part.need.flops > 0,
        bound=bound(cycles, needed, part.need.flops > 0, by_kind, slots, program.capacity),
        **by_kind,
    )


def bound(
    cycles: float, needed: float, is_compute: bool, kinds: dict[str, float], slots: dict[str, float], capacity: Any
) -> str:
    """What takes most: the bytes, or the unit that is busy longest, or waiting and scalar instructions."""
    if needed >= cycles:
        return "FLOPs" if is_compute else "bandwidth"
    room = dict(zip(UNITS, capacity, strict=True))
    busy = {unit: slots[unit] / room[unit] for unit in ("VALU", "XLU", "VLOAD", "VSTORE")}
    busy["MXU"] = slots["MXU"] * MXU_CYCLES / room["MXU"]
    busy |= {"latency": kinds["empty"], "copy starts": kinds["copying"], "scalar": kinds["scalar"]}
    most = sorted(busy, key=lambda unit: -busy[unit])[:2]
    return ", ".join(f"{unit} {busy[unit] / cycles:.0%}" for unit in most)


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


def as_record(found: Count) -> dict[str, Any]:
    return asdict(found)
