"""What reading a long prompt in parts costs in quality, beside compressing it once, at the same budget.

    python scripts/bench_parts.py [--texts 8] [--tokens 2400] [--part 640] [--ratio 8]

Windows of a real text are read whole or in equal parts, each compressed to the whole prompt's budget before the next.
Two figures, in nats a token: the next 64 tokens, and a fact planted at some depth that the prompt's end asks for.
The variants differ in what scores a KV after a part: the part's last 32 queries alone (``carry`` 0: what jaxkv does),
those and ``carry`` times the scores so far, or all queries of every part but the last. It measures and doesn't judge.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxkv import (
    LLM,
    CacheConfig,
    Decoded,
    Greedy,
    KVCompress,
    PagedCache,
    Policy,
    Ratio,
    Sampler,
    compress,
    decode,
    init_cache,
    prefill,
)
from jaxkv.engine.programs import ModelPrograms, program
from jaxkv.generation.sampling import Forced
from models import Decoder

TEXT = Path(__file__).parent / "data" / "emma-chapters-1-10.txt"
TOLD = 64


@dataclass(frozen=True, kw_only=True)
class Variant:
    name: str
    parts: Policy
    """Scores every part but the last."""
    carry: float = 0.0
    """Weight of the scores so far."""
    whole: bool = False


class Reader(ModelPrograms):
    """A model that reads prompts by a variant and says how likely it finds what follows."""

    def __init__(self, model: Decoder, policy: KVCompress, *, tokens: int, part: int):
        super().__init__(model)
        self.policy, self.tokens, self.part = policy, tokens, part

    @program(donate=("cache",), static=("policy", "carry"))
    def read(
        self, cache: PagedCache, ids: Array, count: Array, total: Array, policy: Policy, carry: float
    ) -> tuple[PagedCache, Array]:
        start, old = cache.num_tokens[0], cache.raw.scores
        cache, logits = prefill(self.model, cache, ids, count, policy)
        scores = cache.raw.scores + carry * jnp.where(cache.raw.positions < start, old, 0.0)
        cache = replace(cache, raw=replace(cache.raw, scores=scores))
        return compress(cache, policy, tokens=total), jax.nn.log_softmax(logits[0])

    @program(donate=("cache",))
    def follow(self, cache: PagedCache, first: Array, limit: Array, sampler: Sampler) -> Decoded:
        return decode(self.model, cache, first, limit, steps=TOLD, sampler=sampler)

    def nats(self, prompt: np.ndarray, told: np.ndarray, variant: Variant) -> float:
        """Mean negative log probability of the tokens that follow, at most 65."""
        total = len(prompt)
        part = total if variant.whole else self.part
        cache = init_cache(CacheConfig.for_model(self.model.sizes, batch=1, max_context=self.tokens + 2 * TOLD))
        logprobs = jnp.zeros(0)
        for start in range(0, total, part):
            end = min(start + part, total)
            ids = jnp.zeros((1, self.tokens), jnp.int32).at[0, : end - start].set(prompt[start:end])
            policy = self.policy if end == total else variant.parts
            sizes = jnp.array([end - start]), jnp.array([total])
            cache, logprobs = self.read(cache, ids, *sizes, policy, variant.carry)
        tokens = jnp.full((1, TOLD), -1, jnp.int32).at[0, : len(told) - 1].set(told[1:])
        sampler = Forced(sampler=Greedy(), tokens=tokens, first=jnp.array([total + 1]))
        rest = self.follow(cache, jnp.asarray(told[:1]), jnp.array([len(told) - 1]), sampler)
        return -float(logprobs[told[0]] + rest.logprobs.sum()) / len(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2400, help="of each prompt")
    parser.add_argument("--part", type=int, default=640, help="tokens of a part")
    parser.add_argument("--ratio", type=float, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    llm = LLM(options.model)
    assert llm.tokenizer is not None
    encode = llm.tokenizer.encode
    policy = KVCompress(budget=Ratio(ratio=options.ratio), window=32)
    variants = [
        Variant(name="whole", parts=policy, whole=True),
        Variant(name="last 32 queries of each part", parts=policy),
        Variant(name="the same, half of the scores so far added", parts=policy, carry=0.5),
        Variant(name="the same, the scores so far added", parts=policy, carry=1.0),
        Variant(name="all queries of each part, of the last 32", parts=replace(policy, window=None, buffer=10)),
    ]
    reader = Reader(llm.model, policy, tokens=options.tokens, part=options.part)
    text, rng = np.array(encode(TEXT.read_text(encoding="utf-8"))), np.random.default_rng(options.seed)
    nats = np.zeros((len(variants), 2, options.texts))
    for i in range(options.texts):
        start = rng.integers(0, len(text) - options.tokens - TOLD - 1)
        plain, after = np.split(text[start : start + options.tokens + TOLD + 1], [options.tokens])
        number, depth = rng.integers(1000, 9999), (i + 0.5) / options.texts
        fact = encode(f"\n\nThe secret number of Hartfield is {number}. Remember it.\n\n")
        ask = encode(
            "\n\nQuestion: What is the secret number of Hartfield?\n\nAnswer: The secret number of Hartfield is"
        )
        around = plain[: options.tokens - len(fact) - len(ask)]
        at = int(depth * len(around))
        asking = np.concatenate([around[:at], fact, around[at:], ask]).astype(np.int32)
        answer = np.array(encode(f" {number}"))
        for v, variant in enumerate(variants):
            nats[v, 0, i] = reader.nats(plain, after, variant)
            nats[v, 1, i] = reader.nats(asking, answer, variant)
        print(f"text {i}, fact at {depth:.2f}: {nats[:, :, i].round(3).tolist()}", flush=True)
    print(f"{options.model}, {options.texts} texts of {options.tokens} tokens, parts of {options.part}, ", end="")
    print(f"ratio {options.ratio:g}, seed {options.seed}\n")
    print("| what scores after a part | next tokens | against whole | fact | facts under 1 nat |\n|" + " --- |" * 5)
    for variant, (text_nats, fact_nats) in zip(variants, nats, strict=True):
        more = text_nats - nats[0, 0]
        error = more.std() / np.sqrt(options.texts)
        print(
            f"| {variant.name} | {text_nats.mean():.3f} | {more.mean():+.3f} ± {error:.3f} | "
            f"{fact_nats.mean():.2f} | {(fact_nats < 1).sum()} of {options.texts} |"
        )


if __name__ == "__main__":
    main()
