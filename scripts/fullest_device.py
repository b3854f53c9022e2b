"""How evenly devices would be filled, if they shared a model's KV heads: the fullest one's blocks over the mean.

Run on one device: which blocks stay is the same on several.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from jaxkv import LLM, KVCompress, Ratio, SamplingParams

TEXT = Path(__file__).parent / "data" / "emma-chapters-1-2.txt"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--text", type=Path, default=TEXT)
    options.add_argument("--tokens", type=int, default=2000)
    options.add_argument("--ratios", type=float, nargs="+", default=[4, 8, 16])
    options.add_argument("--devices", type=int, default=3)
    chosen = options.parse_args()

    llm = LLM(chosen.model)
    if llm.tokenizer is None:
        raise ValueError(f"{chosen.model} has no tokenizer to read a text with")
    prompt = llm.tokenizer.encode(chosen.text.read_text(encoding="utf-8"))[: chosen.tokens]
    policies = [KVCompress(budget=Ratio(ratio=ratio)) for ratio in chosen.ratios]
    each = [SamplingParams(max_tokens=1, compression=policy) for policy in policies]
    for ratio, answer in zip(chosen.ratios, llm.generate([prompt] * len(each), each), strict=True):
        print(f"{ratio:g}x: {fullest(answer.cache.blocks_per_head, chosen.devices):.3f}")


def fullest(blocks: np.ndarray, devices: int) -> float:
    """Of ``i32[layers, kv_heads]`` blocks, those of the fullest of so many devices over their mean."""
    held = blocks.sum(0).reshape(devices, -1).sum(1)
    return float(held.max() / held.mean())


if __name__ == "__main__":
    main()
