"""Does the model still answer? Policies, ratios and tasks, by accuracy, real bytes and seconds.

    python scripts/evaluate.py --model smollm2-135m --tasks DIR --policies none,snapkv --ratios 4,8,16 --json out.json
    python scripts/evaluate.py --model smollm2-135m --suite quick
    python scripts/evaluate.py --model DIR --benchmark DIR --chat --policies none,auto --json out.json

A directory of tasks has ``contexts.json``, a list of ``{id, text}`` or ``{id, context_ids}``, and for each task a
``NAME.json``, a list of ``{id, context_id, question, answer}`` or ``{..., question_ids, answer_ids}``. The context is
compressed alone; then the question is read at its true positions; an item counts where greedy decoding starts with the
answer. A benchmark's directory has LongBench's ``TASK.jsonl`` or RULER's ``TASK/validation.jsonl``, whose answers are
written and scored as their authors do. ``docs/evaluation.md`` says more. What ``--json`` names is written anew after
each context, and a run that is started again goes on: single outcomes lie beside it, in a file named ``.items.jsonl``.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from evaluation.benchmark import Protocol, read_benchmark
from evaluation.piecewise import Piecewise
from evaluation.records import Journal, Key, Record, finished, table, write_json
from evaluation.scoring import Read, Runner
from evaluation.suite import SUITES, generate
from evaluation.tasks import Item, OfText, TaskSet, read_tasks
from evaluation.writing import Writer
from tqdm import tqdm

from jaxkv import Policy, Ratio, Unlimited
from jaxkv.compression import Global, LastQueries, PerHead, PerLayer
from jaxkv.generation.prompt import observation_of
from jaxkv.policies import Mixed, StreamingLLM, make_policy
from jaxkv.policies.kv_compress import l1, l2
from jaxkv.serving import keep_compiled_programs
from models import load_model, load_tokenizer, resolve, stack_layers
from pallas_kernels.quantised_block import Format

POLICIES = "none,kv-compress,snapkv,auto"
RATIOS = "4,8,16"
VALUES = {
    "l1": l1,
    "l2": l2,
    "sum": jnp.sum,
    "mean": jnp.mean,
    "max": jnp.max,
    "global": Global(),
    "per-layer": PerLayer(),
    "per-head": PerHead(),
    "true": True,
    "false": False,
    "all": None,
}
"""What a policy's setting may be, but for numbers."""
NOTHING_EVICTED = {"8-bit": "K8V8", "4-bit": "K4V4"}
"""Names of what keeps all KVs, at so many bits of K and of V."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    keep_compiled_programs()
    try:
        return run(options)
    except KeyboardInterrupt:
        print("evaluate: stopped; the same command goes on where --json was given", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description="Accuracy, bytes and seconds of policies at ratios of real bytes.")
    top.add_argument("--model", required=True, help="smollm2-135m, a directory, or a .gguf file")
    what = top.add_mutually_exclusive_group(required=True)
    what.add_argument("--tasks", type=Path, metavar="DIR", help="contexts.json and NAME.json files")
    what.add_argument("--suite", choices=SUITES, help="built-in tasks")
    what.add_argument("--benchmark", type=Path, metavar="DIR", help="LongBench's or RULER's own files")
    top.add_argument(
        "--policies",
        default=POLICIES,
        metavar="NAMES",
        help=f"with settings as in kvzip:power=2, or {' or '.join(NOTHING_EVICTED)}, which evict nothing; "
        f"default: {POLICIES}",
    )
    top.add_argument("--ratios", default=RATIOS, metavar="NUMBERS", help=f"of real bytes; default: {RATIOS}")
    top.add_argument("--only", nargs="+", metavar="TASK", help="these tasks; default: all")
    top.add_argument("--contexts", type=int, metavar="N", help="the first N contexts; default: all")
    top.add_argument("--first-seed", type=int, default=0, help="of the suite's contexts: others to choose by")
    top.add_argument("--json", type=Path, metavar="FILE", help="records; goes on where it was left")
    top.add_argument("--markdown", type=Path, metavar="FILE", help="the table, which is printed too")
    put = top.add_argument_group("how a benchmark is put to the model")
    put.add_argument(
        "--aware", action="store_true", help="compress the whole prompt, not the context before its question"
    )
    put.add_argument("--chat", action="store_true", help="in the model's chat format, where the benchmark does so")
    put.add_argument("--max-length", type=int, metavar="TOKENS", help="longer LongBench prompts lose their middle")
    put.add_argument("--limit", type=int, metavar="N", help="the first N samples of each file")
    return top


def run(options: argparse.Namespace) -> int:
    ratios = parse_ratios(options.ratios)
    named = parse_policies(options.policies)
    protocol = parse_protocol(options)
    path = resolve(options.model)
    tokenizer = load_tokenizer(path)
    model = stack_layers(load_model(path))  # many programs, each of them compiled for a single layer
    policies = {name: policy and policy.for_model(model.sizes) for name, policy in named.items()}
    if options.benchmark:
        tasks = read_benchmark(options.benchmark, tokenizer, model.sizes.max_context, protocol)
    elif options.suite:
        tasks = generate(options.suite, tokenizer, options.first_seed)
    else:
        tasks = read_tasks(options.tasks, tokenizer, model.sizes.vocab_size)
    if tasks.longest > model.sizes.max_context:
        raise ValueError(f"a context of {tasks.longest} tokens is longer than the model's {model.sizes.max_context}")
    runner = Writer(model, tasks, tokenizer) if options.benchmark else Piecewise(model, tasks.longest)
    settings = {"model": options.model, "tasks": digest(tasks)}
    tasks = tasks.only(options.only, options.contexts)
    journal = Journal(options.json and options.json.with_name(options.json.name + ".items.jsonl"), settings)
    evaluate(runner, tasks, policies, ratios, journal, options.json)
    text = table(records(journal, tasks, policies, ratios))
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n", encoding="utf-8")
    return 0


def parse_ratios(text: str) -> list[float]:
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError:
        ratios = [0.0]
    if any(not ratio > 1 for ratio in ratios):
        raise ValueError(f"--ratios must be numbers above 1 with commas between, like 4,8,16, got {text!r}")
    return ratios


def parse_protocol(options: argparse.Namespace) -> Protocol:
    """How ``--benchmark`` is read; its options mean nothing to other tasks."""
    given = {field: getattr(options, field) for field in ("aware", "chat", "max_length", "limit")}
    for name, value in given.items():
        said = "--" + name.replace("_", "-")
        if value and not options.benchmark:
            raise ValueError(f"{said} is of --benchmark; leave it out, or name a directory of LongBench or RULER")
        if value is not None and not isinstance(value, bool) and value < 1:
            raise ValueError(f"{said} must be at least 1, got {value}")
    return Protocol(**given)


def parse_policies(text: str) -> dict[str, Policy | None]:
    """By name, with settings behind colons: ``snapkv,kvzip:power=2:group=mean,knorm:shares=global``.

    The budget in them isn't used, since ratios here are of bytes.
    """
    found: dict[str, Policy | None] = {}
    for part in text.split(","):
        words = part.strip().split(":")
        settings = [word for word in words if "=" in word]
        name = ":".join(word for word in words if "=" not in word)  # of one's own: module:Class
        if part.strip() in NOTHING_EVICTED:
            found[part.strip()] = quantised(NOTHING_EVICTED[part.strip()])
            continue
        pairs = [setting.partition("=")[::2] for setting in settings]
        values = {key: _value(part, key, value) for key, value in pairs}
        found[part.strip()] = make_policy(name, None if name == "none" else Ratio(ratio=2), **values)
    return found


def quantised(form: str) -> Policy:
    """All KVs at one precision."""
    one = Format.named(form)
    everything = StreamingLLM(budget=Unlimited())  # any ranking does
    return Mixed(budget=Unlimited(), scoring=everything, high=one, low=one, high_share=1.0)


def _value(part: str, key: str, value: str) -> object:
    if key in ("high", "low"):
        return value  # the name of a format
    if value in VALUES:
        return VALUES[value]
    try:
        return float(value) if "." in value else int(value)
    except ValueError:
        raise ValueError(f"--policies {part}: {value!r} is neither a number nor one of {', '.join(VALUES)}") from None


def digest(tasks: TaskSet) -> str:
    """Of all contexts, questions and answers: a run only goes on with the same."""
    return hashlib.sha256(repr(tasks).encode()).hexdigest()[:16]


def keys(tasks: TaskSet, policies: dict[str, Policy | None], ratios: list[float]) -> list[Key]:
    return [
        (name, ratio, task.name)
        for name in policies
        for ratio in ratios_of(policies[name], ratios)
        for task in tasks.tasks
    ]


def ratios_of(policy: Policy | None, ratios: list[float]) -> list[float]:
    """One, where nothing is evicted: what such a policy holds is what it comes to."""
    return [1.0] if policy is None or isinstance(policy.budget, Unlimited) else ratios


def records(journal: Journal, tasks: TaskSet, policies: dict[str, Policy | None], ratios: list[float]) -> list[Record]:
    """Of what is finished."""
    return finished(journal, keys(tasks, policies, ratios), tasks)


def evaluate(
    runner: Runner,
    tasks: TaskSet,
    policies: dict[str, Policy | None],
    ratios: list[float],
    journal: Journal,
    path: Path | None,
) -> None:
    """Asks what the journal doesn't hold yet."""
    of_context: dict[str, list[tuple[str, Item]]] = defaultdict(list)
    for task in tasks.tasks:
        for item in task.items:
            of_context[item.context_id].append((task.name, item))
    observations = [observation_of(policy) for policy in policies.values()]
    keep_back = max(64, *(each.count for each in observations if isinstance(each, LastQueries)), 0)
    with tqdm(total=len(policies) * len(of_context), unit="context", file=sys.stderr, disable=None) as bar:
        for context, asked in of_context.items():
            tokens, shared = tasks.contexts[context], dict[object, Read]()
            for name, policy in policies.items():
                bar.set_postfix_str(name)
                left = [(r, task, item) for r in ratios_of(policy, ratios) for task, item in asked]
                left = [each for each in left if each[2].id not in journal.outcomes[name, *each[:2]]]
                if left:
                    whole = any(runner.reads_whole(item.reading, policy) for _, _, item in left)
                    back = keep_back if whole else len(tokens)  # what is read in pieces is read anew at each ratio
                    read = shared.get(runner.config(policy)) or runner.read(tokens, policy, keep_back=back)
                    if read.prompt is None and whole:
                        shared[runner.config(policy)] = read
                    _ask_all(runner, name, policy, read, left, journal)
                if path is not None:
                    write_json(path, records(journal, tasks, policies, ratios))
                bar.update()


def _ask_all(
    runner: Runner,
    name: str,
    policy: Policy | None,
    read: Read,
    left: list[tuple[float, str, Item]],
    journal: Journal,
) -> None:
    """Items of one context, by ratio and task."""
    for told, reading in dict.fromkeys((item.told, item.reading) for _, _, item in left):
        of_these = [each for each in left if (each[2].told, each[2].reading) == (told, reading)]
        ratios = list(dict.fromkeys(ratio for ratio, _, _ in of_these))
        for ratio, small in runner.compressed(read, told, reading, policy, ratios):
            some = [(task, item) for at, task, item in of_these if at == ratio]
            some.sort(key=lambda pair: len(pair[1].question) + len(pair[1].answer))  # those read together are alike
            asked = [pair for pair in some if not isinstance(pair[1], OfText)]
            outcomes = runner.ask(small.cache, [i for _, i in asked], read=small.read, compress=small.compress)
            for (task, _), outcome in zip(asked, outcomes, strict=True):
                journal.add((name, ratio, task), [outcome])
            for task, item in some:
                if isinstance(item, OfText):
                    journal.add((name, ratio, task), [runner.of_text(small, item)])


if __name__ == "__main__":
    sys.exit(main())
