"""The same model, tasks and scoring through NVIDIA's kvpress, in one table with what evaluate.py measured.

    python scripts/evaluate.py --model smollm2-135m --suite quick --json ours.json
    python scripts/compare_kvpress.py --model smollm2-135m --suite quick --ours ours.json --json kvpress.json

kvpress pins transformers below the version of our ``reference`` extra, so give it an environment of its own:
``pip install -e '.[kvpress]'``. It is charged for what stays at 16 bits a value and nothing else, also where a press
masks what it drops and holds the full cache.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evaluate import digest, parse_ratios
from evaluation.records import Journal, finished, read_json, table, write_json
from evaluation.scoring import Outcome
from evaluation.suite import SUITES, generate
from evaluation.tasks import Item, TaskSet, read_tasks
from tqdm import tqdm

from models import Tokenizer, load_tokenizer, resolve

PRESSES: dict[str, Callable[[Any, float], Any]] = {
    "KVzip": lambda kvpress, drop: kvpress.KVzipPress(compression_ratio=drop),
    "KVzip, layers even": lambda kvpress, drop: kvpress.KVzipPress(compression_ratio=drop, layerwise=True),
    "TOVA": lambda kvpress, drop: kvpress.TOVAPress(compression_ratio=drop),
    "SnapKV": lambda kvpress, drop: kvpress.SnapKVPress(compression_ratio=drop),
    "SnapKV, window 16": lambda kvpress, drop: kvpress.SnapKVPress(compression_ratio=drop, window_size=16),
    "AdaKV": lambda kvpress, drop: kvpress.AdaKVPress(kvpress.SnapKVPress(compression_ratio=drop)),
    "ExpectedAttention": lambda kvpress, drop: kvpress.ExpectedAttentionPress(compression_ratio=drop),
    "KeyDiff": lambda kvpress, drop: kvpress.KeyDiffPress(compression_ratio=drop),
    "Knorm": lambda kvpress, drop: kvpress.KnormPress(compression_ratio=drop),
}
DEFAULT = "KVzip,TOVA,SnapKV,AdaKV,ExpectedAttention"


def main(arguments: Sequence[str] | None = None) -> int:
    top = argparse.ArgumentParser(description="kvpress on the tasks of evaluate.py.")
    top.add_argument("--model", required=True, help="smollm2-135m or a .gguf file")
    what = top.add_mutually_exclusive_group(required=True)
    what.add_argument("--tasks", type=Path, metavar="DIR")
    what.add_argument("--suite", choices=SUITES)
    top.add_argument("--presses", default=DEFAULT, help=f"of {'; '.join(PRESSES)}, with ; or , between")
    top.add_argument("--ratios", default="4,8,16")
    top.add_argument("--only", nargs="+", metavar="TASK", help="these tasks; default: all")
    top.add_argument("--contexts", type=int, metavar="N", help="the first N contexts; default: all")
    top.add_argument("--ours", type=Path, metavar="FILE", help="records of evaluate.py, for the same table")
    top.add_argument("--json", type=Path, required=True, metavar="FILE", help="records; goes on where it was left")
    options = top.parse_args(arguments)
    try:
        return run(options)
    except (ValueError, OSError) as error:
        print(f"compare_kvpress: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    ratios = parse_ratios(options.ratios)
    names = [n.strip() for n in options.presses.split(";" if ";" in options.presses else ",")]
    if unknown := set(names) - set(PRESSES):
        raise ValueError(f"no press is named {sorted(unknown)}; there are {'; '.join(PRESSES)}")
    path = resolve(options.model)
    tokenizer = load_tokenizer(path)
    tasks = generate(options.suite, tokenizer) if options.suite else read_tasks(options.tasks, tokenizer, 1 << 30)
    settings: dict[str, object] = {"model": options.model, "tasks": digest(tasks), "by": "kvpress"}
    tasks = tasks.only(options.only, options.contexts)
    journal = Journal(options.json.with_name(options.json.name + ".items.jsonl"), settings)
    keys = [(f"kvpress {n}", r, t.name) for n in names for r in ratios for t in tasks.tasks]
    peer = Peer(path, tokenizer)
    with tqdm(total=len(names) * len(ratios) * len(tasks.contexts), unit="context", disable=None) as bar:
        for name in names:
            for ratio in ratios:
                for context, tokens in tasks.contexts.items():
                    bar.set_postfix_str(f"{name} {ratio:g}x")
                    peer.measure(name, ratio, context, tokens, tasks, journal)
                    bar.update()
                write_json(options.json, finished(journal, keys, tasks))
    ours = read_json(options.ours) if options.ours else []
    ours = [one for one in ours if options.only is None or one.task in options.only]
    print(table([*ours, *finished(journal, keys, tasks)]))
    return 0


class Peer:
    """The model in transformers, float32, on CPU."""

    def __init__(self, gguf: Path, tokenizer: Tokenizer):
        try:
            import kvpress  # pyright: ignore[reportMissingImports]  # an environment of its own
            import torch
            import transformers
        except ImportError as error:
            raise ValueError(f"{error}; pip install -e '.[kvpress]' in an environment of its own") from None
        self.torch, self.transformers, self.kvpress = torch, transformers, kvpress
        settings = {"gguf_file": gguf.name, "dtype": torch.float32, "attn_implementation": "sdpa"}
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **settings).eval()
        # KVzip loads a tokenizer by the model's name; the one that transformers makes of a GGUF file may be another.
        self.directory = tempfile.TemporaryDirectory()
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.core).save_pretrained(self.directory.name)
        self.model.config.name_or_path = self.directory.name

    def measure(
        self, name: str, ratio: float, context: str, tokens: tuple[int, ...], tasks: TaskSet, journal: Journal
    ) -> None:
        """All items of a context that the journal doesn't hold."""
        asked = [(task.name, item) for task in tasks.tasks for item in task.items if item.context_id == context]
        policy = f"kvpress {name}"
        asked = [(task, item) for task, item in asked if item.id not in journal.outcomes[policy, ratio, task]]
        for told in dict.fromkeys(item.told for _, item in asked):
            prompt = [*tokens, *told]
            began = time.perf_counter()
            cache = self.transformers.DynamicCache()
            with self.torch.inference_mode(), PRESSES[name](self.kvpress, 1 - 1 / ratio)(self.model):
                self.model.model(input_ids=self.torch.tensor([prompt]), past_key_values=cache)
            seconds = time.perf_counter() - began
            for task, item in asked:
                if item.told == told:
                    journal.add((policy, ratio, task), [self._ask(cache, len(prompt), item, ratio, seconds)])

    def _ask(self, cache: Any, seen: int, item: Item, ratio: float, seconds: float) -> Outcome:
        torch, config = self.torch, self.model.config
        both = [*item.question, *item.answer]
        positions = torch.arange(seen, seen + len(both))[None]
        with torch.inference_mode():
            out = self.model(torch.tensor([both]), past_key_values=copy.deepcopy(cache), position_ids=positions)
        logprobs = torch.log_softmax(out.logits[0, len(item.question) - 1 : -1].float(), dim=-1)
        answer = torch.tensor(item.answer)
        right = np.array(logprobs.argmax(-1) == answer)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        full = seen * config.num_hidden_layers * config.num_key_value_heads * 2 * head_dim * 2
        return Outcome(
            item=item.id,
            correct=bool(right.all()),
            token_accuracy=float(right.mean()),
            nll=-float(logprobs.gather(1, answer[:, None]).mean()),
            bytes_held=int(full / ratio),
            bytes_full=full,
            seconds_read=seconds,
            seconds_compress=0.0,
        )


if __name__ == "__main__":
    sys.exit(main())
