"""``python -m jaxkv``: a model answers a prompt, or a file of them, from a compressed cache."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from jaxkv.cli.options import parser
from jaxkv.cli.terminal import STOPPED, Interrupts, safe_streams

CRASHED = 70
"""Exit status of a fault of ours, apart from 1 (some lines of a batch job failed) and 2 (bad input)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    with Interrupts() as interrupts, safe_streams():
        batch = False
        try:
            options = parser().parse_args(arguments)
            batch = options.command == "batch"
            return run(options, interrupts)
        except KeyboardInterrupt:
            print(
                "jaxkv: stopped; the same command goes on where it was" if batch else "jaxkv: stopped", file=sys.stderr
            )
            return STOPPED
        except BrokenPipeError:
            return 141
        except (ValueError, OSError) as error:
            print(f"jaxkv: {error}", file=sys.stderr)
            return 2
        except Exception:
            traceback.print_exc()
            return CRASHED


def run(options: argparse.Namespace, interrupts: Interrupts) -> int:
    from jaxkv.cli import commands  # imports JAX, for seconds

    interrupts.check()
    return commands.COMMANDS[options.command](options, interrupts.heed)
