"""What a device could do at best: the bound on decoding and compressing, from bytes and FLOPs counted, and on a TPU
from the cycles of attention and of the moves, as its compiler schedules them.

    python scripts/roofline.py [--models llama-3.1-8b] [--context 16384] [--ratios 1 8] [--weights int8] [--chips 1 4 8]
        [--figure FILE]

For each device, model, kind of weights and ratio: the largest batch that fits, what a decode step of it must move and
compute, the tokens a second that follow, and what a compression costs beside the prefill. Of several chips that share
the KV heads: GB and GFLOP of each chip, batch and tokens of all together, and the share of the step that their
collectives take; the last column is without these. Where the compiler for TPUs is installed, two small programs are
compiled too, for one chip, and the count is set beside their own. Nothing here is measured.
"""

import argparse
import json
import sys
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from roofline_chips import ALONE, GROUP, LOGIT, Collectives, share, step_collectives, why_not_shared
from targets import DEVICES, TPUS, Device, abstract_cache, compile_for_tpu, sizes, why_not

from jaxkv.generation.decode import decode_step
from models import Llama, LlamaConfig
from models.shapes import LARGE_SHAPES
from models.shapes import SHAPES as SMALL_SHAPES
from pallas_kernels.quantised_block import BlockLayout, Format

BLOCK_SIZE = 64
USABLE = 0.92
"""Share of a device's memory for weights and cache; the rest is the program's, its temporaries and fragmentation."""
CYCLES: dict[str, dict[str, dict[str, float]]] = json.loads(
    (Path(__file__).parent / "schedules" / "cycles.json").read_text()
)
"""Of each TPU, what a head takes by its KVs, as its compiler schedules it: by ``kernel_schedule.py --for-roofline``."""
ITEM = 2
"""Bytes of a cached value: bfloat16."""
SHAPES = SMALL_SHAPES | LARGE_SHAPES
WEIGHTS = {"bfloat16": 2.0, "int8": 1.0, "fp8": 1.0, "4-bit": 0.5 + 4 / GROUP}
"""Bytes a weight, but for a float32 scale for each output of those of 8 bits; of 4 bits: groups of 128, with a bfloat16
scale and as large a zero point. Embeddings and head are held alike, but beside FP8 in bfloat16."""


class Heads(NamedTuple):
    """What a kernel of ``CYCLES`` works on."""

    kernel: str
    number: int
    kvs: float
    """Of each."""

    def cycles(self, device: Device) -> float:
        """In all, of a chip; between the heads that were counted in proportion, and beyond them too."""
        known = sorted((int(kvs), cycles) for kvs, cycles in CYCLES[device.name][self.kernel].items())
        if len(known) == 1:
            known = [(0, 0.0), *known]
        at = min(max(1, bisect_left(known, (int(self.kvs), 0.0))), len(known) - 1)
        (few, less), (many, more) = known[at - 1], known[at]
        return self.number * max(known[0][1], less + (more - less) * (self.kvs - few) / (many - few))


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a program must do, whatever it runs on."""

    bytes: float
    flops: float
    heads: Heads | None = None
    """Worked on by a kernel whose schedule on a TPU is known."""

    def seconds(self, device: Device) -> float:
        return max(self.parts(device).values())

    def parts(self, device: Device) -> dict[str, float]:
        """Seconds that each part alone would take: the largest is the bound."""
        parts = {"bandwidth": self.bytes / device.bandwidth, "FLOPs": self.flops / device.flops}
        if self.heads and device.name in CYCLES:
            parts["schedule"] = self.heads.cycles(device) / device.clock
        return parts


def weight_count(model: LlamaConfig, *, read: bool = False) -> int:
    """Weights, or those that a decode step reads: of an embedding that isn't the output's too, only single rows."""
    wide, narrow = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = model.hidden_size * (2 * wide + 2 * narrow) + 3 * model.hidden_size * model.intermediate_size
    embeddings = 1 if read or model.tie_embeddings else 2
    return model.num_layers * layer + embeddings * model.vocab_size * model.hidden_size


def weight_bytes(model: LlamaConfig, weights: str = "bfloat16", *, read: bool = False) -> float:
    """Of all weights, or of those that a decode step reads; ``weights``: of ``WEIGHTS``."""
    size = weight_count(model, read=read) * WEIGHTS[weights]
    if WEIGHTS[weights] != 1:
        return size
    layer = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim + 2 * model.hidden_size
    embeddings = 1 if read or model.tie_embeddings else 2
    layers, vocabulary = model.num_layers * (layer + 2 * model.intermediate_size), embeddings * model.vocab_size
    if weights == "fp8":
        return size + 4 * layers + vocabulary * model.hidden_size
    return size + 4 * (layers + vocabulary)


def kept_blocks(tokens: int, ratio: float) -> int:
    """Blocks a head, on average."""
    return max(1, int(-(-tokens // BLOCK_SIZE) / ratio))


class Step(NamedTuple):
    """What a decode step does, one after the other."""

    weights: Work
    attention: Work
    collectives: Collectives = ALONE

    def seconds(self, device: Device) -> float:
        return sum(work.seconds(device) for work in self)

    def bound(self, device: Device) -> str:
        """The part that takes longest, and what bounds it."""
        name, work = max(self._asdict().items(), key=lambda part: part[1].seconds(device))
        parts = work.parts(device)
        return f"{name}, {max(parts, key=lambda part: parts[part])}"


def decode_work(
    whole: LlamaConfig, batch: int, context: int, ratio: float, weights: str = "bfloat16", *, chips: int = 1
) -> Step:
    """All weights once, every kept KV once, one register's worth of rows rewritten a head; of one of the chips."""
    model = share(whole, chips)
    heads = batch * model.num_layers * model.num_kv_heads
    blocks = heads * kept_blocks(context, ratio)
    row = 2 * model.head_dim * ITEM
    tables = heads * 4 * (context // BLOCK_SIZE)
    group = model.num_heads // model.num_kv_heads
    attention = 2 * 2 * group * blocks * BLOCK_SIZE * max(model.head_dim, 128)  # 64-wide heads fill 128 lanes
    kernel = f"decode, {64 if model.head_dim <= 64 else 128}"
    return Step(
        weights=Work(bytes=weight_bytes(model, weights, read=True), flops=2 * weight_count(model, read=True) * batch),
        attention=Work(
            bytes=blocks * BLOCK_SIZE * row + heads * 2 * 16 * row + tables,
            flops=attention,
            heads=Heads(kernel, heads, kept_blocks(context, ratio) * BLOCK_SIZE),
        ),
        collectives=step_collectives(whole, batch, chips),
    )


def compress_work(model: LlamaConfig, context: int, ratio: float) -> Work:
    """One sequence: every KV read once, the kept ones' blocks read and written, scores read and sorted."""
    heads = model.num_layers * model.num_kv_heads
    all_blocks, kept = -(-context // BLOCK_SIZE), kept_blocks(context, ratio)
    values = heads * context * 4
    return Work(
        bytes=heads * (all_blocks + kept) * BLOCK_SIZE * 2 * model.head_dim * ITEM + 8 * values,
        flops=heads
        * all_blocks
        * BLOCK_SIZE
        * 2
        * 256
        * 2
        * max(model.head_dim, 64),  # each KV against a tile of holes
        heads=Heads("moves, 128", heads, context),
    )


def tier_table(models: list[str], context: int) -> str:
    """Decode attention over whole blocks of quantised KVs, beside that over as many in bfloat16."""
    lines = ["| model | KVs | block, KiB | tokens | bytes a KV | of bfloat16's | copies, of bfloat16's |"]
    lines.append("|" + " --- |" * 7)
    for name in models:
        model = SHAPES[name]
        tokens = 256 if model.head_dim == 64 else 128
        layout = BlockLayout(
            head_dim=model.head_dim,
            high=Format.named("K8V4"),
            low=Format.named("K4V2"),
            tokens=tokens,
            tile=8,
            low_step=tokens,
        )
        whole = -(-context // BLOCK_SIZE)
        for kvs, held in (("K8V4", (context, 0)), ("half K8V4, half K4V2", (context - context // 2, context // 2))):
            blocks = sum(-(-n // tier.tokens) for n, tier in zip(held, layout.tiers, strict=True))
            size = blocks * layout.block_bytes
            of = size / (whole * BLOCK_SIZE * 2 * model.head_dim * ITEM)
            sizes = " and ".join(str(tier.tokens) for tier, n in zip(layout.tiers, held, strict=True) if n)
            cells = name, kvs, layout.block_bytes // 1024, sizes, f"{size / context:.1f}", f"{of:.3f}"
            lines.append("| " + " | ".join(map(str, (*cells, f"{blocks / whole:.3f}"))) + " |")
    return "\n".join(lines)


def prefill_work(model: LlamaConfig, context: int, weights: str = "bfloat16") -> Work:
    attention = 2 * context**2 * model.num_layers * model.num_heads * model.head_dim
    return Work(bytes=weight_bytes(model, weights), flops=2 * weight_count(model) * context + attention)


def sequence_bytes(model: LlamaConfig, context: int, ratio: float) -> int:
    """Bytes that a sequence holds: its blocks with scores and positions, and its row of the table."""
    heads = model.num_layers * model.num_kv_heads
    block = BLOCK_SIZE * (2 * model.head_dim * ITEM + 8)
    return heads * (kept_blocks(context, ratio) * block + 4 * (context // BLOCK_SIZE + 1))


def largest_batch(
    device: Device, whole: LlamaConfig, context: int, ratio: float, weights: str = "bfloat16", *, chips: int = 1
) -> int:
    """Sequences that fit beside the weights while one more is being read in full; 0 where none does.

    Each of the chips has all their logits, which must fit in what isn't ``USABLE``: many chips could hold more KVs.
    """
    model = share(whole, chips)
    room = USABLE * device.memory - weight_bytes(model, weights)
    if ratio > 1:
        room -= sequence_bytes(model, context, 1)
    logits = LOGIT * whole.vocab_size
    return max(0, int(min(room // sequence_bytes(model, context, ratio), (1 - USABLE) * device.memory // logits)))


def compiled_flops(chip: str, model: LlamaConfig, batch: int, context: int) -> tuple[float, int]:
    """FLOPs of a decode step outside the kernels as its compiler counts them, and bytes of its temporaries.

    A loop's body is counted once, so one and two layers are compiled, unrolled, and the rest is reckoned from them.
    """

    def compile(layers: int) -> tuple[float, int]:
        small = replace(model, num_layers=layers)
        graph, weights = nnx.split(nnx.eval_shape(lambda: Llama(small, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)))

        def step(cache: Any, weights: Any, tokens: jax.Array, active: jax.Array) -> Any:
            return decode_step(nnx.merge(graph, weights), cache, tokens, active)

        cache = abstract_cache(
            small, batch=batch, max_context=context, block_size=BLOCK_SIZE, num_blocks=4096, dtype=jnp.bfloat16
        )
        row = (jax.ShapeDtypeStruct((batch,), dtype) for dtype in (jnp.int32, jnp.bool_))
        compiled = compile_for_tpu(chip, step, cache, weights, *row, donate=(0,))
        return compiled.cost_analysis()["flops"], sizes(compiled)["temporary"]

    (one, _), (two, temporary) = compile(1), compile(2)
    return one + (model.num_layers - 1) * (two - one), temporary


def rows(
    models: list[str],
    devices: list[str],
    context: int,
    ratios: list[float],
    weights: Sequence[str] = ("bfloat16",),
    chips: Sequence[int] = (1,),
) -> list[dict[str, Any]]:
    found = []
    for name, chip, kind, count, ratio in product(models, devices, weights, chips, ratios):
        model, device = SHAPES[name], DEVICES[chip]
        tokens = min(context, model.max_context)
        row = {"model": name, "device": chip, "chips": count, "weights": kind, "context": tokens, "ratio": ratio}
        found.append(row | _bounds(device, model, tokens, ratio, kind, count))
    return found


def _bounds(device: Device, model: LlamaConfig, context: int, ratio: float, weights: str, chips: int) -> dict[str, Any]:
    if reason := why_not_shared(device, model, weights, chips):
        return {"batch": 0, "why_not": reason}
    batch = largest_batch(device, model, context, ratio, weights, chips=chips)
    if not batch:
        return {"batch": 0, "why_not": "does not fit"}
    own, work = share(model, chips), decode_work(model, batch, context, ratio, weights, chips=chips)
    return {
        "batch": batch,
        "gigabytes": (work.weights.bytes + work.attention.bytes) / 1e9,
        "gigaflops": (work.weights.flops + work.attention.flops) / 1e9,
        "milliseconds": 1e3 * work.seconds(device),
        "bound": work.bound(device),
        "collectives": work.collectives.seconds(device) / work.seconds(device),
        "tokens_a_second": batch / work.seconds(device),
        "compression": compress_work(own, context, ratio).seconds(device)
        / prefill_work(own, context, weights).seconds(device),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """With columns of chips and collectives where more than one chip is in it."""
    several = any(row["chips"] > 1 for row in rows)
    named = [
        *("model", "device", *["chips"] * several, "weights", "tokens", "ratio", "largest batch"),
        *("GB a step", "GFLOP a step", "ms a step", "bound by", *["collectives"] * several),
        *("tokens/s", "compression / prefill"),
    ]
    lines = ["| " + " | ".join(named) + " |", "|" + " --- |" * len(named)]
    for row in rows:
        cells = [row["model"], row["device"], *[str(row["chips"])] * several, row["weights"]]
        cells += [f"{row['context']:,}", f"{row['ratio']:g}", f"{row['batch']:,}"]
        if row["batch"]:
            cells += [*(f"{row[n]:,.1f}" for n in ("gigabytes", "gigaflops", "milliseconds")), row["bound"]]
            cells += [f"{row['collectives']:.1%}" if row["chips"] > 1 else ""] * several
            cells += [f"{row['tokens_a_second']:,.0f}", f"{row['compression']:.2%}" if row["ratio"] > 1 else ""]
        else:
            cells.append(row["why_not"])
        lines.append("| " + " | ".join(cells + [""] * (len(named) - len(cells))) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: str) -> None:
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(2, len(names), figsize=(5 * len(names), 7), squeeze=False, sharex=True)
    for column, name in zip(axes.T, names, strict=True):
        for line in dict.fromkeys((row["device"], row["chips"], row["weights"]) for row in rows):
            fits = [
                r for r in rows if (r["model"], r["device"], r["chips"], r["weights"]) == (name, *line) and r["batch"]
            ]
            device, chips, weights = line
            where = f"{chips} x {device}" if chips > 1 else device
            ratios, label = [r["ratio"] for r in fits], where + f", {weights}" * (weights != "bfloat16")
            column[0].plot(ratios, [r["tokens_a_second"] for r in fits], marker="o", label=label)
            column[1].plot(ratios, [r["batch"] for r in fits], marker="o", label=label)
        column[0].set(title=f"{name}, {rows[0]['context']:,} tokens", ylabel="tokens/s at the largest batch (bound)")
        column[1].set(xlabel="compression ratio", ylabel="largest batch")
        for axis in column:
            axis.set(xscale="log", yscale="log")
            axis.set_xticks(sorted({r["ratio"] for r in rows}), [f"{r:g}" for r in sorted({r["ratio"] for r in rows})])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        column[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["llama-3.1-8b", "llama-3.2-1b"])
    parser.add_argument("--devices", nargs="+", choices=list(DEVICES), default=[*TPUS, "h200"])
    parser.add_argument("--context", type=int, default=16_384, help="tokens a sequence")
    parser.add_argument("--ratios", nargs="+", type=float, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--weights", nargs="+", choices=list(WEIGHTS), default=["bfloat16"])
    parser.add_argument("--chips", nargs="+", type=int, default=[1], help="that share the KV heads")
    parser.add_argument("--figure", help="draw tokens/s and batch over ratio into this file")
    options = parser.parse_args()
    if options.context < BLOCK_SIZE or min(options.ratios + options.chips) < 1:
        sys.exit(f"expected --context of at least {BLOCK_SIZE}, ratios and chips of at least 1, got {options}")
    found = rows(options.models, options.devices, options.context, options.ratios, options.weights, options.chips)
    print(table(found) + "\n\n" + tier_table(options.models, options.context))
    for name in options.models:
        for chip in [d for d in options.devices if DEVICES[d].topology and why_not(d) is None]:
            model, batch = SHAPES[name], 32
            flops, temporary = compiled_flops(chip, model, batch, options.context)
            counted = 2 * weight_count(model, read=True) * batch
            print(
                f"\n{name} for {chip}, batch {batch}: {flops / 1e9:,.1f} GFLOP a step outside the kernels as compiled, "
                f"{counted / 1e9:,.1f} as counted; {temporary / 2**20:,.1f} MiB of temporaries"
            )
    if options.figure:
        draw(found, options.figure)


if __name__ == "__main__":
    main()
