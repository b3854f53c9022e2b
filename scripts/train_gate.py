"""Learns a gate for a model: a KV's score in a second reading, told from the KV alone.

    python scripts/train_gate.py --model smollm2-135m --output gate.npz [--texts 48] [--tokens 1536] [--text FILE ...]

Each text is read through the cache and then a second time, as ``auto`` does; that reading's scores are what is
to be told, of each KV head from K before RoPE and V. What there is to learn of a text lies in ``OUTPUT.lessons``, 23 KB
a token of SmolLM2, so a run that is started again goes on. Texts that it doesn't learn from say how well it does: the
correlation over all KVs, and of the KVs that the second reading ranks highest, over all heads, the share that the gate
does too.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from training.corpus import paragraphs, texts
from training.fitting import Recipe, fit, judge
from training.teacher import Reader, frequencies_of, lessons

from jaxkv.serving import keep_compiled_programs
from models import load_model, load_tokenizer, resolve

TEXT = Path(__file__).parent / "data" / "emma-chapters-1-10.txt"
UNSEEN = 0.55
"""Part of that text which nothing is learnt from: there ``scripts/evaluation`` takes its contexts."""


def main() -> None:
    usual = Recipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--output", type=Path, required=True, help="the gate, an .npz file")
    parser.add_argument("--text", type=Path, nargs="+", help="files of prose, in paragraphs (default: half of a novel)")
    parser.add_argument("--texts", type=int, default=48, help="texts to learn from")
    parser.add_argument("--judged", type=int, default=8, help="further texts that say how well it does")
    parser.add_argument("--tokens", type=int, default=1536, help="of each text, at most")
    parser.add_argument("--units", type=int, default=usual.units, help="of each head's hidden layer; 0: a linear gate")
    parser.add_argument("--epochs", type=int, default=usual.epochs)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    keep_compiled_programs()
    path = resolve(options.model)
    model, tokenizer = load_model(path), load_tokenizer(path)
    if options.text is None:
        novel = paragraphs(TEXT)
        files = [novel[int(UNSEEN * len(novel)) :]]
    else:
        files = [paragraphs(file) for file in options.text]

    def tokens(seed: int) -> Iterator[list[int]]:
        for text in texts(files, options.tokens, seed):
            yield list(tokenizer.encode(text, add_special=True))[: options.tokens]

    reader, frequencies = Reader(model, options.tokens), frequencies_of(model)
    folder = options.output.with_name(options.output.name + ".lessons")
    learnt = lessons(reader, tokens(options.seed), options.texts, frequencies, folder / "learnt")
    apart = lessons(reader, tokens(options.seed + 10_000), options.judged, frequencies, folder / "judged")
    weights = fit(learnt, frequencies, Recipe(units=options.units, epochs=options.epochs))
    weights.save(options.output)
    print(f"{options.texts} texts: {judge(apart, type(weights).load(options.output))}")


if __name__ == "__main__":
    main()
