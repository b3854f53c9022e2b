"""What bounds each kernel, by the compiler's own schedule of it.

python scripts/kernel_schedule.py [--chips v5e v6e] [--only decode llama] [--json FILE]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

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
HEADER = (
    "kernel", "part", "KVs", "chip", "cycles", "copy starts", "other scalar", "empty", "MXU", "MXU weights", "XLU",
    "VALU", "needed", "share", "cycles / 1,024 KVs", "bound",
)  # fmt: skip


def line(row: Count) -> str:
    busy = (row.busy[unit] for unit in ("MXU", "MXU weights", "XLU", "VALU"))
    numbers = row.cycles, row.copying, row.scalar, row.empty, *busy, row.needed
    cells = [row.case, row.part, f"{row.kvs:,}", row.chip, *(f"{n:,.0f}" for n in numbers), f"{row.share:.0%}"]
    return "| " + " | ".join([*cells, f"{row.cycles / row.kvs * 1024:,.0f}", row.bound]) + " |"


def cycles(rows: list[Count]) -> dict[str, dict[str, float]]:
    """What ``roofline.py`` takes: cycles of a chip for a head and for each of its KVs, by head dimension, and for each KV
    that the moves after an eviction pass."""
    found: dict[str, dict[str, float]] = {}
    heads = [row for row in rows if row.part == "head"]
    for row in heads:
        of_chip = found.setdefault(row.chip, {})
        if row.case.startswith("moves"):
            of_chip["KV moved"] = row.cycles / row.kvs / row.cores
    for short, long in ((a, b) for a in heads for b in heads if (a.case, a.chip) == (b.case, b.chip) and a.kvs < b.kvs):
        width = SHAPES[short.case.removeprefix("decode, ")].head_dim
        a_kv = (long.cycles - short.cycles) / (long.kvs - short.kvs)
        found[short.chip][f"KV of {width}"] = a_kv / short.cores
        found[short.chip][f"head of {width}"] = (short.cycles - a_kv * short.kvs) / short.cores
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=TPUS, default=["v5e", "v5p", "v6e"])
    parser.add_argument("--only", nargs="+", default=[], help="cases in whose names all of these are")
    parser.add_argument("--json", help="write the counts to this file too")
    parser.add_argument("--one", nargs=2, metavar=("CHIP", "CASE"), help="in this process, a JSON line a part")
    parser.add_argument(
        "--for-roofline", action="store_true", help=f"count what {CYCLES.name} holds, and write it anew"
    )
    options = parser.parse_args()
    known = {case.name: case for case in (*cases(), *peers())}
    if options.one:
        chip, name = options.one
        with tempfile.TemporaryDirectory() as directory:
            for row in count(chip, known[name], Path(directory)):
                print(json.dumps(asdict(row)), flush=True)
        return
    print("| " + " | ".join(HEADER) + " |\n|" + " --- |" * len(HEADER), flush=True)
    rows: list[Count] = []
    names = [name for name in known if all(word in name for word in options.only)]
    if options.for_roofline:
        names = ["decode, llama-3.1-8b", "decode, smollm2-135m", "moves, llama-3.1-8b"]
    for name in names:
        for chip in TPUS if options.for_roofline else options.chips:
            found = in_a_process(chip, name)
            rows += found
            print("\n".join(map(line, found)), flush=True)
    if options.for_roofline:
        rounded = {chip: {of: float(f"{n:.4g}") for of, n in each.items()} for chip, each in cycles(rows).items()}
        CYCLES.write_text(json.dumps(rounded, indent=1) + "\n")
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
