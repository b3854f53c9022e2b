"""What compression does for throughput where memory is fixed: many long prompts through one small pool.

    python scripts/bench_memory_budget.py [--ratios 1 8] [--prompts 32] [--prompt 2048] [--tokens 256] [--full 2]

The pool holds ``--full`` whole sequences uncompressed. A ratio is that of a whole sequence, its answer too: what is
decoded is compressed again every ``--compress-every`` tokens; with 0 only the prompt is, and the cache grows from
there. For each ratio: tokens a second of decoding and in all, the mean
number of sequences decoded together, preemptions, and peak bytes held. Compilation isn't counted. ``--figure FILE``
draws it. It measures and doesn't judge: exit status 0.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np

from jaxkv import LLM, CacheConfig, KVCompress, Ratio, SamplingParams
from jaxkv.requests import Finished, TextMade

TEXT = Path(__file__).parent / "data" / "emma-chapters-1-10.txt"


@dataclass(frozen=True, kw_only=True)
class Row:
    ratio: float
    decode_tokens_a_second: float
    total_tokens_a_second: float
    mean_batch: float
    preemptions: int
    peak_bytes: int
    seconds: float


def prompts(llm: LLM, count: int, length: int) -> list[list[int]]:
    """Windows of a real text, each beginning elsewhere."""
    assert llm.tokenizer is not None
    ids = np.array(llm.tokenizer.encode(TEXT.read_text(encoding="utf-8")))
    if len(ids) < length + count:
        sys.exit(f"{TEXT.name} has {len(ids)} tokens, too few for {count} prompts of {length}")
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return [ids[at : at + length].tolist() for at in starts]


def measure(llm: LLM, texts: list[list[int]], new: int, context: int) -> Row:
    """Runs all prompts once; the engine's own clock gives the seconds of decoding."""
    params = SamplingParams(max_tokens=new, temperature=0, repetition_penalty=1, ignore_eos=True)

    def jobs() -> Iterator[tuple[list[int], SamplingParams]]:
        yield from ((text, params) for text in texts)

    began, made, peak = time.perf_counter(), 0, 0
    compiled = llm.engine.programs.compile_seconds if llm.engine is not None else 0.0
    for event in llm.run(jobs(), max_context=context):
        assert llm.engine is not None
        if isinstance(event, TextMade):
            made += len(event.token_ids)
            peak = max(peak, (llm.engine.counts.total - llm.engine.counts.free).raw)
        elif isinstance(event, Finished):
            print(f"\r{event.request + 1} answered", end="", file=sys.stderr)
    assert llm.engine is not None
    engine = llm.engine
    seconds = time.perf_counter() - began - (engine.programs.compile_seconds - compiled)
    print("\r", end="", file=sys.stderr)
    return Row(
        ratio=1.0 if llm.compression is None else llm.compression.budget.ratio,  # pyright: ignore[reportAttributeAccessIssue]
        decode_tokens_a_second=made / engine.decode_seconds,
        total_tokens_a_second=made / seconds,
        mean_batch=engine.decoded / max(engine.decode_steps, 1),
        preemptions=engine.preemptions,
        peak_bytes=peak * engine.config.block_bytes + engine.config.table_bytes,
        seconds=seconds,
    )


def table(rows: list[Row]) -> str:
    lines = [
        "| ratio | decode tok/s | against 1 | total tok/s | against 1 | mean batch | preemptions | peak MB |",
        "|" + " --- |" * 8,
    ]
    for row in rows:
        decode = row.decode_tokens_a_second / rows[0].decode_tokens_a_second
        total = row.total_tokens_a_second / rows[0].total_tokens_a_second
        lines.append(
            f"| {row.ratio:g} | {row.decode_tokens_a_second:,.1f} | {decode:.2f}x | {row.total_tokens_a_second:,.1f} | "
            f"{total:.2f}x | {row.mean_batch:.1f} | {row.preemptions} | {row.peak_bytes / 1e6:,.1f} |"
        )
    return "\n".join(lines)


def draw(rows: list[Row], path: str) -> None:
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
    ratios = [row.ratio for row in rows]
    left.plot(ratios, [row.decode_tokens_a_second for row in rows], marker="o", label="decoding")
    left.plot(ratios, [row.total_tokens_a_second for row in rows], marker="o", label="in all")
    left.set(xlabel="compression ratio", ylabel="tokens/s", xscale="log")
    left.legend()
    right.plot(ratios, [row.mean_batch for row in rows], marker="o")
    right.set(xlabel="compression ratio", ylabel="sequences decoded together", xscale="log")
    for axis in (left, right):
        axis.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ratios", nargs="+", type=float, default=[1, 8])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=256, help="tokens generated for each")
    parser.add_argument("--full", type=int, default=2, help="whole sequences that the pool holds uncompressed")
    parser.add_argument("--compress-every", type=int, default=64, help="0: only prompts are compressed (default: 64)")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--json", help="write the rows to this file too")
    parser.add_argument("--figure", help="draw throughput and batch over ratio into this file")
    options = parser.parse_args()
    model, rows, context = None, [], options.prompt + options.tokens
    for ratio in options.ratios:
        every = options.compress_every or None
        policy = KVCompress(budget=Ratio(ratio=ratio), compress_every=every) if ratio > 1 else None
        if model is None:
            model = LLM(options.model, max_batch=options.max_batch)
        # With tables for whatever context this one is rounded up to, or they would take blocks of the pool.
        sizes = CacheConfig.for_model(model.model.sizes, batch=options.max_batch, max_context=2 * context)
        memory = sizes.bytes_with(1 + options.full * sizes.full_blocks(context))
        llm = LLM(
            model.model,
            tokenizer=model.tokenizer,
            compression=policy,
            cache_memory=memory,
            max_batch=options.max_batch,
        )
        texts = prompts(llm, options.prompts, options.prompt)
        print(f"ratio {ratio:g}: {memory / 1e6:,.1f} MB for {options.prompts} prompts", file=sys.stderr)
        rows.append(measure(llm, texts, options.tokens, context))
    print(f"{options.model}, jax {jax.__version__}, {jax.devices()[0].device_kind}: {options.prompts} prompts of")
    print(f"{options.prompt} tokens, {options.tokens} generated for each, a pool of {options.full} full sequences;")
    print(f"compressed {f'every {options.compress_every} tokens' if options.compress_every else 'once'}\n")
    print(table(rows))
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if options.figure:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
