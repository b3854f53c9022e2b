"""Many questions on one document: read once for all, beside read anew for each.

    python scripts/bench_prefix.py [--questions 100] [--apart 4] [--tokens 4000] [--answer 16] [--ratios 1 8]
        [--compression kv-compress]

For each ratio the questions go through one pool with prefix sharing, and the first ``--apart`` of them, since they take
long, without it; both sides in this one run, each after a small run that compiles its programs. It measures and doesn't
judge: exit status 0.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxkv import LLM, CacheConfig, Ratio, SamplingParams
from jaxkv.policies import POLICIES, make_policy
from jaxkv.requests import Finished

TEXT = Path(__file__).parent / "data" / "emma-chapters-1-10.txt"
NAMES = ["Emma", "Mr. Knightley", "Mr. Woodhouse", "Harriet", "Mr. Elton", "Mrs. Weston", "Mr. Weston", "Miss Bates"]
ASKED = ["Who is {}?", "Where does {} live?", "What does {} want?", "Whom does {} speak with?", "Is {} happy?"]


def prompts(llm: LLM, count: int, length: int) -> list[list[int]]:
    """A document of so many tokens, each time with another question."""
    assert llm.tokenizer is not None
    encode = llm.tokenizer.encode
    document = list(encode(TEXT.read_text(encoding="utf-8")))[:length]
    asked = [ASKED[i // len(NAMES) % len(ASKED)].format(NAMES[i % len(NAMES)]) for i in range(count)]
    form = "\n\nQuestion {}, about the text above, to be answered in one short sentence: {}\n\nAnswer:"
    return [document + list(encode(form.format(i, text))) for i, text in enumerate(asked)]


def answer(llm: LLM, texts: list[list[int]], new: int, context: int) -> tuple[float, dict[int, list[int]]]:
    """Seconds, without compiling, and the answers."""
    params, made = SamplingParams(max_tokens=new, temperature=0, repetition_penalty=1, ignore_eos=True), {}

    def jobs() -> Iterator[tuple[list[int], SamplingParams]]:
        yield from ((text, params) for text in texts)

    compiled = llm.engine.programs.compile_seconds if llm.engine is not None else 0.0
    began = time.perf_counter()
    for event in llm.run(jobs(), max_context=context):
        if isinstance(event, Finished):
            made[event.request] = event.completion.token_ids
    assert llm.engine is not None
    return time.perf_counter() - began - (llm.engine.programs.compile_seconds - compiled), made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--apart", type=int, default=4, help="questions of the side without sharing")
    parser.add_argument("--tokens", type=int, default=4000, help="of the document")
    parser.add_argument("--answer", type=int, default=16, help="tokens generated for each")
    parser.add_argument("--ratios", nargs="+", type=float, default=[1, 8])
    parser.add_argument("--compression", choices=POLICIES, default="kv-compress", help="at ratios above 1")
    parser.add_argument("--full", type=int, default=3, help="whole sequences that the pool holds uncompressed")
    parser.add_argument("--max-batch", type=int, default=8)
    options = parser.parse_args()
    model, context = LLM(options.model), options.tokens + 64 + options.answer
    sizes = CacheConfig.for_model(model.model.sizes, batch=options.max_batch, max_context=context)
    memory = sizes.bytes_with(1 + options.full * sizes.heads * sizes.max_blocks)
    print(f"{options.model}, jax {jax.__version__}, {jax.devices()[0].device_kind}: a document of {options.tokens}")
    print(f"tokens, {options.answer} an answer, a pool of {options.full} full sequences ({memory / 1e6:,.1f} MB)\n")
    print("| ratio | prefixes | questions | prompt tokens read | seconds | questions/s | speed | same answers |")
    print("|" + " --- |" * 8, flush=True)
    for ratio in options.ratios:
        speeds, answers = [], []
        for share in (False, True):
            llm = LLM(
                model.model,
                tokenizer=model.tokenizer,
                compression=make_policy(options.compression, Ratio(ratio=ratio)) if ratio > 1 else None,
                cache_memory=memory,
                max_batch=options.max_batch,
                share_prefixes=share,
            )
            texts = prompts(llm, options.questions if share else options.apart, options.tokens)
            answer(llm, [text[-600:] for text in texts[:2]], options.answer, context)  # compiles
            seconds, made = answer(llm, texts, options.answer, context)
            assert llm.engine is not None
            speeds.append(len(texts) / seconds)
            answers.append(made)
            same = sum(made[i] == told for i, told in answers[0].items())
            print(
                f"| {ratio:g} | {'shared' if share else 'not shared'} | {len(texts)} | {llm.engine.prompt_tokens:,} | "
                f"{seconds:,.1f} | {speeds[-1]:.3f} | {speeds[-1] / speeds[0]:.1f}x | {same} of {len(answers[0])} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
