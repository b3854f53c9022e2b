"""A question over a long document, answered from the full cache and from a compressed one, side by side."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from jaxkv import LLM, Completion, KVCompress, Ratio, SamplingParams
from jaxkv.cli.commands import answer
from jaxkv.cli.plot import head_map
from jaxkv.report import megabytes, rate
from jaxkv.serving import keep_compiled_programs

DATA = Path(__file__).parent / "data"
WIDTH = 44
SHADES = " ░▒▓█"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--document", type=Path, default=DATA / "emma-chapters-1-2.txt")
    options.add_argument("--question", default="What is the name of Mr. Weston's son?")
    options.add_argument("--ratio", type=float, default=8)
    options.add_argument("--max-tokens", type=int, default=40)
    options.add_argument("--plot", type=Path, default=Path("head-map.png"))
    chosen = options.parse_args()

    keep_compiled_programs()
    full = LLM(chosen.model)
    small = LLM(full.model, tokenizer=full.tokenizer, compression=KVCompress(budget=Ratio(ratio=chosen.ratio)))
    text = chosen.document.read_text(encoding="utf-8")
    prompt = full.chat_prompt(
        [
            {"role": "system", "content": "You answer questions about a text, briefly."},
            {"role": "user", "content": f"{text}\n\nQuestion: {chosen.question} Answer in one short sentence."},
        ]
    )
    print(f"{chosen.document.name}: {len(text.split())} words\nQuestion: {chosen.question}\n")
    params = SamplingParams(max_tokens=chosen.max_tokens, temperature=0)
    answers = [answer(llm, prompt, params, quiet=True) for llm in (full, small)]

    titles = ["full cache", f"KV-Compress, {chosen.ratio:g}x"]
    columns = [[title, "-" * len(title), *facts(a)] for title, a in zip(titles, answers, strict=True)]
    print(side_by_side(*columns))
    print(f"\nBlocks that each KV head kept at {chosen.ratio:g}x (a column a layer, a row a head; darker: more)\n")
    print(text_map(answers[1]))
    head_map(answers[1].cache, chosen.plot)
    print(f"\nThe same as a picture: {chosen.plot}")


def facts(completion: Completion) -> list[str]:
    cache, timings = completion.cache, completion.timings
    made = len(completion.token_ids)
    return [
        *textwrap.wrap(completion.text.strip(), WIDTH - 2),
        "",
        f"cache   {megabytes(cache.bytes_held)}, {cache.kvs_held:,} KVs",
        f"prompt  {completion.prompt_tokens:,} tokens, {rate(completion.prompt_tokens, timings.prefill):,.0f} tok/s",
        f"answer  {made} tokens, {rate(made - 1, timings.decode):.1f} tok/s",
        f"compression  {1000 * timings.compress:.0f} ms",
    ]


def side_by_side(left: list[str], right: list[str]) -> str:
    """Two columns; a blank line in each begins the figures, which are aligned."""
    gap = max(left.index(""), right.index(""))
    left, right = (c[: c.index("")] + [""] * (gap - c.index("")) + c[c.index("") :] for c in (left, right))
    return "\n".join(f"{a:<{WIDTH}}{b}".rstrip() for a, b in zip(left, right, strict=True))


def text_map(completion: Completion) -> str:
    kept = completion.cache.blocks_per_head
    shade = (kept * (len(SHADES) - 1) + kept.max() - 1) // kept.max()
    rows = ["".join(SHADES[s] * 2 for s in shade[:, head]) for head in range(kept.shape[1])]
    lines = [f"  head {head} |{row}|" for head, row in enumerate(rows)]
    return "\n".join([*lines, f"  {kept.min()} to {kept.max()} blocks of {completion.cache.block_size} tokens a head"])


if __name__ == "__main__":
    main()
