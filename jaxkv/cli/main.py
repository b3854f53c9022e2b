"""``python -m jaxkv``: a model answers a prompt, or a file of them, from a compressed cache."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from jaxkv.cli.plot import check_drawable, head_map
from jaxkv.llm import LLM
from jaxkv.policies import POLICIES, Policy, policy_from
from jaxkv.policies.names import BUDGETS, SETTINGS
from jaxkv.report import as_dict, summary
from jaxkv.requests import Completion, Finished, PromptRead, SamplingParams, TextMade
from models.hub import cache_directory

DTYPES = ("float32", "bfloat16")
SAMPLING = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "logprobs")
ANSWER = ("model", "dtype", "cache_dtype", "block_size", "max_context", "compression", *BUDGETS, *SETTINGS, *SAMPLING)
"""Options that a batch job's answers depend on."""
CRASHED = 70
"""Exit status of a fault of ours, apart from 1 (some lines of a batch job failed) and 2 (bad input)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = parser().parse_args(arguments)
    keep_compiled_programs()
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("jaxkv: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except (ValueError, OSError) as error:
        print(f"jaxkv: {error}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return CRASHED


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="jaxkv", description="Paged KV-cache compression per attention head, in JAX.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="answer one prompt")
    generate.set_defaults(run=run_generate)
    add_model(generate)
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="UTF-8 text; - for standard input")
    generate.add_argument("--chat", action="store_true", help="put the prompt in the model's chat format")
    generate.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    add_compression(generate)
    add_sampling(generate)
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    generate.add_argument("--plot", type=Path, metavar="PNG", help="draw the layer x head map of blocks kept")

    batch = commands.add_parser("batch", help="answer a file of prompts; killed and started again, it goes on")
    batch.set_defaults(run=run_batch)
    add_model(batch)
    batch.add_argument(
        "--input", type=Path, required=True, metavar="JSONL", help='one {"prompt": …} or {"messages": […]} a line'
    )
    batch.add_argument("--output", type=Path, required=True, metavar="JSONL", help="one answer or error a line")
    batch.add_argument("--retry-failed", action="store_true", help="try lines again that have an error in the output")
    add_compression(batch)
    add_sampling(batch)
    batch.add_argument("--max-batch", type=int, default=16, metavar="N", help="answered together (default: 16)")
    batch.add_argument(
        "--no-share-prefixes",
        dest="share_prefixes",
        action="store_false",
        help="read each prompt whole, also where several start alike",
    )
    batch.add_argument("--max-context", type=int, metavar="N", help="longest prompt and answer (default: the model's)")
    return top


def add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help="smollm2-135m, a directory, or a .gguf file")
    command.add_argument("--cache-memory", type=byte_count, metavar="BYTES", help="for the whole cache: 500M, 2G, …")
    command.add_argument("--block-size", type=int, help="token slots a block (default: 16; 64 on a TPU)")
    command.add_argument("--dtype", choices=DTYPES, help="of weights (default: float32 on a CPU, else bfloat16)")
    command.add_argument("--cache-dtype", choices=DTYPES, help="of the unquantised cache (default: as --dtype)")


def load(options: argparse.Namespace, policy: Policy | None, **settings: Any) -> LLM:
    """The model that ``add_model`` asked for."""
    return LLM(
        options.model,
        compression=policy,
        cache_memory=options.cache_memory,
        block_size=options.block_size,
        dtype=options.dtype,
        cache_dtype=options.cache_dtype,
        **settings,
    )


def add_compression(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("compression")
    group.add_argument(
        "--compression", choices=[*POLICIES, "none"], help="default: kv-compress where a budget is given"
    )
    budget = group.add_mutually_exclusive_group()
    budget.add_argument(
        "--ratio", type=float, help="divide the full cache by this: of its own dtype, or with tiers of 16 bits a value"
    )
    budget.add_argument("--max-cache-tokens", type=int, metavar="N", help="KVs a head, on average")
    budget.add_argument("--max-cache-bytes", type=byte_count, metavar="BYTES", help="for the sequence")
    group.add_argument("--protected-window", type=int, metavar="N", help="newest tokens never evicted (default: 32)")
    group.add_argument("--sinks", type=int, metavar="N", help="first tokens never evicted (default: 0)")
    group.add_argument("--window", type=int, metavar="N", help="prompt queries observed; 0: all (default: 32)")
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
    group.add_argument("--compress-every", type=int, metavar="N", help="compress again every N tokens")


def add_sampling(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=256, metavar="N")
    group.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    group.add_argument("--top-k", type=int, default=0)
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--min-p", type=float, default=0.0)
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be given several times")
    group.add_argument("--logprobs", action="store_true", help="log probability of each token (generate: with --json)")


def byte_count(text: str) -> int:
    """``1500000``, ``500M``, ``2G``, ``1.5GiB``: K, M and G are powers of 1000, KiB, MiB and GiB of 1024."""
    units = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}
    number = text.strip().upper().removesuffix("B")
    unit = number.lstrip("0123456789.")
    try:
        return int(float(number[: len(number) - len(unit)]) * units[unit.strip()])
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes; write 500M, 2G or 1.5GiB") from None


def sampling_from(options: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=options.seed,
        stop=tuple(options.stop),
        logprobs=options.logprobs,
    )


def read_prompt(options: argparse.Namespace) -> str:
    """The prompt's text.

    Raises:
      ValueError: the file can't be read, isn't UTF-8, or holds nothing.
    """
    if options.prompt is not None:
        return options.prompt
    path: Path = options.prompt_file
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise ValueError(f"can't read the prompt from {path}: {error.strerror}") from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}") from None
    if not text.strip():
        raise ValueError(f"{path} holds no text; the prompt must not be empty")
    return text


def run_generate(options: argparse.Namespace) -> int:
    prompt, policy, params = read_prompt(options), policy_from(vars(options)), sampling_from(options)
    if options.system is not None and not options.chat:
        raise ValueError("--system needs --chat")
    if options.plot is not None:
        check_drawable(options.plot)
    llm = load(options, policy)
    if options.chat:
        system = [{"role": "system", "content": options.system}] if options.system is not None else []
        prompt = llm.chat_prompt([*system, {"role": "user", "content": prompt}])

    completion = answer(llm, prompt, params, quiet=options.json)
    if options.json:
        print(json.dumps(as_dict(completion)))
    else:
        print(f"\n\n{summary(completion)}", file=sys.stderr)
    if options.plot is not None:  # last: the answer is out, whatever a full disk does to the picture
        head_map(completion.cache, options.plot)
    return 0


def run_batch(options: argparse.Namespace) -> int:
    from jaxkv.batch.job import BatchJob  # locks files, which generate can do without where a system can't

    policy, params = policy_from(vars(options)), sampling_from(options)
    usual = parser().parse_args(["batch", "--model", "", "--input", "", "--output", ""])
    settings = {name: given for name in ANSWER if (given := getattr(options, name)) != getattr(usual, name)}
    if Path(options.model).exists():
        settings["model"] = str(Path(options.model).resolve())
    with BatchJob(options.input, options.output, params, settings, retry_failed=options.retry_failed) as job:
        if not job.left:
            return job.finish()
        llm = load(options, policy, max_batch=options.max_batch, share_prefixes=options.share_prefixes)
        return job.run(llm, max_context=options.max_context)


def answer(llm: LLM, prompt: str, params: SamplingParams, *, quiet: bool) -> Completion:
    """Generates with a progress bar for the prompt and, unless ``quiet``, the text as it comes."""
    bar: tqdm | None = None
    for event in llm.events([prompt], params):
        match event:
            case PromptRead(tokens=tokens, total=total):
                bar = bar or tqdm(total=total, desc="reading the prompt", unit="tok", file=sys.stderr, leave=False)
                bar.update(tokens - bar.n)
            case TextMade(text=text):
                if bar is not None:
                    bar.close()
                if not quiet:
                    print(text, end="", flush=True)
            case Finished(completion=completion):
                return completion
    raise AssertionError("a request ends with its Finished event")


def keep_compiled_programs() -> None:
    """Compiled programs go to the user's cache directory, so that a second run starts in seconds."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
