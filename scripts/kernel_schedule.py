"""What bounds each TPU kernel, by the compiler's own schedule of it.

    python scripts/kernel_schedule.py [--chips v5e v6e] [--only decode llama] [--json FILE]
    python scripts/kernel_schedule.py --for-roofline
    python scripts/kernel_schedule.py --gpu

prints a row a part of a kernel, with the chips' numbers beside each other: cycles as scheduled, what they go into, and
what its bytes or FLOPs alone would take. jax's own kernels stand beside ours. The second writes what ``roofline.py``
takes of it; the third counts the instructions of decode attention on an H200 (``schedules/sass.py``).

The schedule is libtpu's after registers are given out: a bundle a cycle, results after their latency, empty bundles for
waiting. Its scalar code is run (``schedules/scalar_core.py``) for heads of several lengths: a tile is the difference of
two, a head is one in the steady state. Nothing is measured: contention for memory, for one, isn't in it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import targets_gpu
from schedules import sass
from schedules.cases import cases
from schedules.counting import Count, count
from schedules.peers import peers
from targets import TPUS

from models.shapes import SHAPES


def in_a_process(chip: str, case: str) -> list[Count]:
    command = [sys.executable, __file__, "--one", chip, case]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{case} for {chip}:\n{ended.stderr[-3000:]}")
    return [Count(**json.loads(line)) for line in ended.stdout.splitlines() if line.startswith("{")]


CYCLES = Path(__file__).parent / "schedules" / "cycles.json"
COLUMNS: dict[str, Callable[[Count], str]] = {
    "cycles": lambda row: f"{row.cycles:,.0f}",
    "copy starts": lambda row: f"{row.copying:,.0f}",
    "other scalar": lambda row: f"{row.scalar:,.0f}",
    "empty": lambda row: f"{row.empty:,.0f}",
    "MXU": lambda row: f"{row.busy['MXU']:,.0f}",
    "MXU weights": lambda row: f"{row.busy['MXU weights']:,.0f}",
    "XLU": lambda row: f"{row.busy['XLU']:,.0f}",
    "VALU": lambda row: f"{row.busy['VALU']:,.0f}",
    "bytes or FLOPs": lambda row: f"{row.needed:,.0f}",
    "share": lambda row: f"{row.share:.0%}",
    "cycles a 1,024 KVs": lambda row: f"{row.cycles / row.kvs * 1024:,.0f}",
    "bound": lambda row: row.bound,
}


def line(rows: list[Count]) -> str:
    """One part of a kernel, chip after chip."""
    cells = (
        " / ".join(dict.fromkeys(map(cell, rows)) if name == "bound" else map(cell, rows))
        for name, cell in COLUMNS.items()
    )
    return "| " + " | ".join([rows[0].case, f"{rows[0].part}, {rows[0].kvs:,} KVs", *cells]) + " |"


def cycles(rows: list[Count]) -> dict[str, dict[str, dict[str, float]]]:
    """What ``roofline.py`` takes of each chip, in its cycles: a head by its KVs, for each head dimension, and one whose
    survivors are moved."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row.part == "head":
            kind, model = row.case.split(", ")
            width = SHAPES[model].head_dim
            of = found.setdefault(row.chip, {}).setdefault(f"{kind}, {width}", {})
            of[str(row.kvs)] = float(f"{row.cycles / row.cores:.4g}")
    return found


def of_gpu() -> str | None:
    """Prints the table; why there is none."""
    if reason := targets_gpu.why_not() or sass.why_not():
        return f"nothing can be compiled for a GPU: {reason}"
    loops = []
    for case in sass.CASES:
        with tempfile.TemporaryDirectory() as directory:
            loops.append(sass.count(case, Path(directory)))
    print("\n".join(sass.table(loops)))
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=TPUS, default=["v5e", "v5p", "v6e"])
    parser.add_argument("--only", nargs="+", default=[], help="cases in whose names all of these are")
    parser.add_argument("--json", help="write the counts to this file too")
    parser.add_argument("--one", nargs=2, metavar=("CHIP", "CASE"), help="in this process, a JSON line a part")
    parser.add_argument(
        "--for-roofline", action="store_true", help=f"count what {CYCLES.name} holds, and write it anew"
    )
    parser.add_argument("--gpu", action="store_true", help="decode attention as compiled for an H200 instead")
    options = parser.parse_args()
    if options.gpu:
        sys.exit(of_gpu())
    known = {case.name: case for case in (*cases(), *peers())}
    if options.one:
        chip, name = options.one
        with tempfile.TemporaryDirectory() as directory:
            for row in count(chip, known[name], Path(directory)):
                print(json.dumps(asdict(row)), flush=True)
        return
    header = ("kernel", "part", *COLUMNS)
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header), flush=True)
    names, chips = [name for name in known if all(word in name for word in options.only)], options.chips
    if options.for_roofline:
        names, chips = ["decode, llama-3.1-8b", "decode, smollm2-135m", "moves, llama-3.1-8b"], TPUS
    rows: list[Count] = []
    for name in names:
        found = [in_a_process(chip, name) for chip in chips]
        for of_chips in zip(*found, strict=True):
            print(line(list(of_chips)), flush=True)
        rows += [row for of_chip in found for row in of_chip]
    if options.for_roofline:
        CYCLES.write_text(json.dumps(cycles(rows), indent=1) + "\n")
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
