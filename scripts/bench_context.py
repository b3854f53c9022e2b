"""One context and many questions: read once and asked together, beside each question with its context in front.

python scripts/bench_context.py --model smollm2-135m --tokens 4000 --questions 50 --ratio 8
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from jaxkv import LLM, SamplingParams

TEXT = Path(__file__).parent / "data" / "emma-chapters-1-2.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=4000, help="of the context")
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--alone", type=int, default=3, help="questions that are asked with their context in front")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--compression", default="kv-compress")
    parser.add_argument("--ratio", type=float, default=8)
    chosen = parser.parse_args()

    llm = LLM(chosen.model, compression=chosen.compression, ratio=chosen.ratio, share_prefixes=False)
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[: chosen.tokens]
    questions = [f"\nQuestion {i}: What does the text say of Mr. Weston?\nAnswer:" for i in range(chosen.questions)]
    params = SamplingParams(max_tokens=chosen.max_tokens, temperature=0, repetition_penalty=1, ignore_eos=True)
    tails = [llm.tokenizer.encode(question, add_special=False) for question in questions]

    def together() -> tuple[float, float, int]:
        began = time.perf_counter()
        with llm.read(ids) as context:
            read = time.perf_counter()
            context.ask(tails, params)
            return read - began, time.perf_counter() - read, context.nbytes

    def apart() -> float:
        began = time.perf_counter()
        for tail in tails[: chosen.alone]:
            llm.generate([*ids, *tail], params)
        return (time.perf_counter() - began) / chosen.alone

    together()  # compiles
    apart()
    read, ask, held = together()
    each = apart()
    rate, alone = chosen.questions / (read + ask), 1 / each
    print(f"context of {len(ids)} tokens, {held / 1e6:.1f} MB held; {chosen.questions} questions, {chosen.ratio:g}x")
    print(f"read {read:.2f} s, asked {ask:.2f} s: {rate:.2f} questions a second")
    print(f"each with its context: {each:.2f} s a question, {alone:.3f} a second")
    print(f"{rate / alone:.1f}x")


if __name__ == "__main__":
    main()
