"""Draws what evaluate.py and compare_kvpress.py wrote: accuracy over bytes held, and over the ratio asked for.

python scripts/plot_results.py out.json [more.json ...] --output results.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    top = argparse.ArgumentParser(description="A row of pictures a task: accuracy over bytes held and over ratio.")
    top.add_argument("results", nargs="+", type=Path, help="JSON records")
    top.add_argument("--output", type=Path, required=True, help="a .png, .svg or .pdf file")
    top.add_argument("--only", nargs="+", metavar="TASK", help="these tasks; default: all")
    top.add_argument("--leave-out", nargs="+", default=[], metavar="POLICY", help="no lines of these")
    options = top.parse_args(arguments)
    try:
        records = [record for path in options.results for record in read(path)]
        records = [r for r in records if options.only is None or r["task"] in options.only]
        records = [r for r in records if r["policy"] not in options.leave_out]
        if not records:
            raise ValueError("no record to draw; are tasks and policies spelt as in the results?")
        draw(records, options.output)
    except (ValueError, OSError) as error:
        print(f"plot_results: {error}", file=sys.stderr)
        return 2
    return 0


def read(path: Path) -> list[Record]:
    """The records of a results file.

    Raises:
      ValueError: it isn't one.
    """
    needed = {"policy", "ratio", "task", "accuracy", "low", "high", "bytes_held", "bytes_full"}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, list) or any(not isinstance(r, dict) or not needed <= r.keys() for r in found):
        raise ValueError(f"{path} must hold a list of records with {', '.join(sorted(needed))}, as evaluate.py writes")
    return found


def draw(records: list[Record], output: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    by_task: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        by_task[record["task"]][record["policy"]].append(record)
    names = list(dict.fromkeys(r["policy"] for r in records if r["policy"] != "none"))
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    figure, axes = plt.subplots(len(by_task), 2, figsize=(11, 3.4 * len(by_task)), squeeze=False, sharey="row")
    for (task, policies), (of_bytes, of_ratio) in zip(by_task.items(), axes, strict=True):
        for name, of_policy in policies.items():
            line = sorted(of_policy, key=lambda r: r["bytes_held"])
            accuracy = [r["accuracy"] for r in line]
            if name == "none":
                for axis in of_bytes, of_ratio:
                    axis.axhline(accuracy[0], color="black", linewidth=1, linestyle=":", label="full cache")
                continue
            error = [[a - r["low"] for a, r in zip(accuracy, line, strict=True)]]
            error.append([r["high"] - a for a, r in zip(accuracy, line, strict=True)])
            megabytes = [r["bytes_held"] / 1e6 for r in line]
            style = {"color": colours[name], "marker": "o", "markersize": 3, "linewidth": 1.2}
            of_bytes.errorbar(megabytes, accuracy, yerr=error, elinewidth=0.5, label=name, **style)
            of_ratio.plot([r["ratio"] for r in line], accuracy, label=name, **style)
        of_bytes.set(xlabel="MB held, mean", ylabel="accuracy", title=task, ylim=(-0.03, 1.03), xscale="log")
        of_ratio.set(xlabel="ratio asked for", title=task, xscale="log")
        for axis in of_bytes, of_ratio:  # ratios double
            axis.xaxis.set_major_locator(LogLocator(base=2))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(NullLocator())
        of_ratio.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
