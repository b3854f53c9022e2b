"""The command line's options, and what they stand for."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from jaxkv.version import __version__
from jaxkv.words import BUDGETS, DTYPES, POLICIES, SAMPLING, SCHEDULES, SETTINGS, WEIGHTS, byte_count

ANSWER = (
    "model",
    "dtype",
    "weights",
    "cache_dtype",
    "block_size",
    "max_context",
    "split_prompts",
    "compression",
    *BUDGETS,
    *SETTINGS,
    "settings",
    *SAMPLING,
    "generation_config",
    "output_format",
)
"""Options that a batch job's answers depend on."""
MODEL = (
    "smollm2-135m, a directory, a .gguf file, or a name on the Hugging Face Hub: org/name, org/name@revision, "
    "org/name/file.gguf"
)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="jaxkv", description="Paged KV-cache compression per attention head, in JAX.")
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = top.add_subparsers(required=True, dest="command", metavar="COMMAND")
    add_generate(commands.add_parser("generate", help="answer one prompt"))
    add_batch(commands.add_parser("batch", help="answer a file of prompts; killed and started again, it goes on"))
    add_convert(commands.add_parser("convert", help="write a model as a checkpoint of our own"))
    return top


def add_convert(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help=MODEL)
    command.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIRECTORY",
        help="a new one, an empty one, or that of an interrupted conversion, which is done again",
    )
    command.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="stored",
        help="what to write them as, see generate (default: stored, nothing is lost)",
    )


def add_generate(command: argparse.ArgumentParser) -> None:
    add_model(command)
    prompt = command.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="UTF-8 text; - for standard input")
    command.add_argument("--chat", action="store_true", help="put the prompt in the model's chat format")
    command.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    add_compression(command)
    add_sampling(command)
    command.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    command.add_argument("--plot", type=Path, metavar="PNG", help="draw the layer x head map of blocks kept")


def add_batch(command: argparse.ArgumentParser) -> None:
    add_model(command)
    command.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="PATH",
        help='JSONL, one {"prompt": …} or {"messages": […]} a line; or Parquet with such columns, where the name ends '
        "in .parquet; or a directory of files of either kind",
    )
    command.add_argument(
        "--output",
        required=True,
        metavar="PATH",
        help="JSONL, one answer or error a line; or Parquet, where the name ends in .parquet; or, for a directory, a "
        "directory (there already, or ending in /) that gets a file for each file of the input",
    )
    command.add_argument(
        "--output-format",
        choices=["jaxkv", "openai"],
        default="jaxkv",
        help="openai: custom_id and response.body.choices, as in OpenAI's batch files (default: jaxkv)",
    )
    command.add_argument("--retry-failed", action="store_true", help="try lines again that have an error in the output")
    add_compression(command)
    add_sampling(command)
    command.add_argument("--max-batch", type=int, default=16, metavar="N", help="answered together (default: 16)")
    command.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes, each with a model, a cache and --devices of its own (default: 1; with --ray, as many as the "
        "cluster's devices allow)",
    )
    command.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="the workers are actors of the Ray cluster at this address (auto: the one that this machine is in), or of "
        "one that is started here; needs pip install 'jaxkv[ray]'",
    )
    command.add_argument(
        "--no-share-prefixes",
        dest="share_prefixes",
        action="store_false",
        help="read each prompt whole, also where several start alike",
    )
    command.add_argument(
        "--split-prompts",
        action="store_const",
        const=True,
        help="read a prompt in parts where as a whole it would have to wait; answers then depend on what else runs",
    )
    command.add_argument(
        "--max-context", type=int, metavar="N", help="longest prompt and answer (default: the model's)"
    )


def add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help=MODEL)
    command.add_argument("--cache-memory", type=size_in_bytes, metavar="BYTES", help="for the whole cache: 500M, 2G, …")
    command.add_argument("--devices", type=int, default=1, metavar="N", help="that share the KV heads (default: 1)")
    command.add_argument("--block-size", type=int, help="token slots a block (default: 16; 64 on a TPU)")
    command.add_argument("--dtype", choices=DTYPES, help="to compute in (default: float32 on a CPU, else bfloat16)")
    command.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="what weights are held as: codes where the file stores codes, floats, or quantised as they are loaded "
        "(default: floats on a CPU, else stored)",
    )
    command.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help="what goes first: prompts that wait (the default of batch), or that nobody waits long for more text "
        "(of generate)",
    )
    command.add_argument("--cache-dtype", choices=DTYPES, help="of the unquantised cache (default: as --dtype)")


def add_compression(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("compression")
    group.add_argument(
        "--compression",
        metavar="NAME",
        help=f"{', '.join(POLICIES)}, none, or module:Class (default: kv-compress where a budget is given)",
    )
    group.add_argument(
        "--set",
        dest="settings",
        action=Setting,
        metavar="NAME=VALUE",
        help="a setting of the policy that has no option of its own; may be given several times",
    )
    budget = group.add_mutually_exclusive_group()
    budget.add_argument(
        "--ratio", type=float, help="hold this many times less than the full cache would, in its own dtype"
    )
    budget.add_argument("--max-cache-tokens", type=int, metavar="N", help="KVs a head, on average")
    budget.add_argument("--max-cache-bytes", type=size_in_bytes, metavar="BYTES", help="for the sequence")
    group.add_argument("--protected-window", type=int, metavar="N", help="newest tokens never evicted (default: 32)")
    group.add_argument("--sinks", type=int, metavar="N", help="first tokens never evicted (default: 0)")
    group.add_argument(
        "--window", type=int, metavar="N", help="prompt queries observed; 0: all (default: the policy's own)"
    )
    group.add_argument(
        "--high-threshold",
        type=float,
        metavar="A",
        help="leankv: high tier from A / tokens on (default: the model's own, else 1)",
    )
    group.add_argument(
        "--low-threshold",
        type=float,
        metavar="A",
        help="leankv: low tier from A / tokens on (default: the model's own, else 0.02)",
    )
    group.add_argument("--high", metavar="FORMAT", help="leankv, mixed, auto: format of the high tier (default: K8V4)")
    group.add_argument("--low", metavar="FORMAT", help="leankv, mixed, auto: format of the low tier (default: K4V2)")
    group.add_argument(
        "--high-share", type=float, metavar="PART", help="mixed, auto: part of the blocks that is high (0.5)"
    )
    group.add_argument(
        "--unquantised-window",
        action="store_const",
        const=True,
        help="mixed, auto: sinks and the protected window stay unquantised",
    )
    group.add_argument(
        "--hadamard",
        action="store_const",
        const=True,
        help="leankv, mixed, auto: K and V are turned before they are quantised, for keys with outlier channels",
    )
    group.add_argument(
        "--reread",
        action=argparse.BooleanOptionalAction,
        help="auto: read prompts a second time (default), or not where the model has a learned gate",
    )
    group.add_argument("--compress-every", type=int, metavar="N", help="compress again every N tokens")


def add_sampling(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=256, metavar="N")
    group.add_argument("--temperature", type=float, help="0: greedy (default of these four: the model's own)")
    group.add_argument("--top-k", type=int)
    group.add_argument("--top-p", type=float)
    group.add_argument("--min-p", type=float)
    group.add_argument(
        "--no-generation-config",
        dest="generation_config",
        action="store_false",
        help="don't choose tokens as the model's generation_config.json says where no option does; be greedy then",
    )
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be given several times")
    group.add_argument(
        "--repetition-penalty", type=float, help="over prompt and answer; 1: none (default: the model's)"
    )
    group.add_argument("--presence-penalty", type=float, default=0.0, help="of the answer's tokens (default: 0)")
    group.add_argument("--frequency-penalty", type=float, default=0.0, help="of each time they are there (default: 0)")
    group.add_argument("--stop-token-ids", type=int, action="append", default=[], metavar="ID")
    group.add_argument("--ignore-eos", action="store_true", help="the model's own ends don't end an answer")
    group.add_argument("--min-tokens", type=int, default=0, metavar="N", help="nothing ends an answer before")
    group.add_argument("--top-logprobs", type=int, default=0, metavar="N", help="the likeliest at each place, too")
    group.add_argument("--logprobs", action="store_true", help="log probability of each token (generate: with --json)")


class Setting(argparse.Action):
    """Gathers ``NAME=VALUE``, the value a number, true, false or null where it is one in JSON, else a text."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        name, equals, text = str(values).partition("=")
        if not equals or not name.isidentifier():
            parser.error(f"argument --set: {values!r} isn't NAME=VALUE, such as mix=0.2")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), name: value})


def size_in_bytes(text: str) -> int:
    """As ``byte_count``, for argparse, which says nothing of a ValueError's own words."""
    try:
        return byte_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def answer_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What a batch job's answers depend on, by name, where it isn't as usual."""
    usual = parser().parse_args(["batch", "--model", "", "--input", "", "--output", ""])
    settings = {name: given for name in ANSWER if (given := getattr(options, name)) != getattr(usual, name)}
    if Path(options.model).exists():
        settings["model"] = str(Path(options.model).resolve())
    return settings
