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
from typing import Any

from schedules.cases import cases
from schedules.counting import Count, count
from schedules.peers import peers
from targets import TPUS


def in_a_process(chip: str, case: str) -> list[Count]:
    command = [sys.executable, __file__, "--one", chip, case]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{case} for {chip}:\n{ended.stderr[-3000:]}")
    return [Count(**json.loads(line)) for line in ended.stdout.splitlines() if line.startswith("{")]


HEADER = (
    "kernel", "part", "KVs", "chip", "cycles", "copy starts", "other scalar", "empty", "MXU", "MXU weights", "XLU",
    "VALU", "needed", "share", "cycles / 1,024 KVs", "bound",
)  # fmt: skip


def line(row: Count) -> str:
    busy = (row.busy[unit] for unit in ("MXU", "MXU weights", "XLU", "VALU"))
    numbers = row.cycles, row.copying, row.scalar, row.empty, *busy, row.needed
    cells = [row.case, row.part, f"{row.kvs:,}", row.chip, *(f"{n:,.0f}" for n in numbers), f"{row.share:.0%}"]
    return "| " + " | ".join([*cells, f"{row.cycles / row.kvs * 1024:,.0f}", row.bound]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=TPUS, default=["v5e", "v5p", "v6e"])
    parser.add_argument("--only", nargs="+", default=[], help="cases in whose names all of these are")
    parser.add_argument("--json", help="write the counts to this file too")
    parser.add_argument("--one", nargs=2, metavar=("CHIP", "CASE"), help="in this process, a JSON line a part")
    options = parser.parse_args()
    known = {case.name: case for case in (*cases(), *peers())}
    if options.one:
        chip, name = options.one
        with tempfile.TemporaryDirectory() as directory:
            for row in count(chip, known[name], Path(directory)):
                print(json.dumps(asdict(row)), flush=True)
        return
    print("| " + " | ".join(HEADER) + " |\n|" + " --- |" * len(HEADER), flush=True)
    rows: list[Any] = []
    for name in [name for name in known if all(word in name for word in options.only)]:
        for chip in options.chips:
            found = in_a_process(chip, name)
            rows += found
            print("\n".join(map(line, found)), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
