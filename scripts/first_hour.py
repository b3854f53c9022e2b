"""What a new user types in a first hour with jaxkv, each step as a person would write it.

python scripts/first_hour.py --model smollm2-135m
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

import jaxkv
from jaxkv import LLM, KVCompress, LastQueries, Policy, Ratio, SamplingParams, Scorer, register_policy
from models import load_model, load_tokenizer, save_model

STORY = (
    "The ship left Bremen on the ninth of May with a cargo of oranges, and Captain Adler kept the key in his boot. "
    * 12
)
STEPS: list[Callable[[LLM], object]] = []


def step(function: Callable[[LLM], object]) -> Callable[[LLM], object]:
    STEPS.append(function)
    return function


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    chosen = parser.parse_args(arguments)
    print(f"jaxkv {jaxkv.__version__}")
    llm = LLM(chosen.model, compression="kv-compress", ratio=8, cache_memory="500M")
    for function in STEPS:
        print(f"{function.__name__}: {function(llm)!r}")
    refusals(llm)
    print(f"models by name: {names(chosen.model)}")


@step
def generate(llm: LLM) -> object:
    return llm.generate("The capital of France is", max_tokens=3)[0]


@step
def chat(llm: LLM) -> object:
    return llm.chat([{"role": "user", "content": "Name a colour."}], max_tokens=4)[0].text


@step
def sampling(llm: LLM) -> object:
    [answer] = llm.generate(
        "Once upon a time",
        max_tokens=4,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.1,
        logit_bias={28: -100},
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[0],
        top_logprobs=2,
    )
    assert answer.top_logprobs is not None
    return [list(top) for top in answer.top_logprobs]


@step
def several(llm: LLM) -> object:
    [answer] = llm.generate("My favourite fruit is", max_tokens=3, temperature=1.0, n=3)
    return [choice.text for choice in answer.choices]


@step
def read_and_ask(llm: LLM) -> object:
    with llm.read(STORY, ratio=4) as context, tempfile.TemporaryDirectory() as folder:
        answers = context.ask(["\nWhere did the ship leave? ", "\nWho kept the key? "], SamplingParams(max_tokens=3))
        context.save(f"{folder}/story.npz")
        [again] = llm.load_context(f"{folder}/story.npz").ask("\nWho kept the key? ", max_tokens=3)
        assert again.token_ids == answers[1].token_ids
        return [answer.text for answer in answers]


@dataclass(frozen=True, kw_only=True)
class Mixture(Scorer):
    """A score with a setting."""

    mix: float = 0.5

    @property
    def observes(self) -> LastQueries:
        return LastQueries(count=16)

    def score(self, mass: jnp.ndarray, held: jnp.ndarray) -> jnp.ndarray:
        return self.mix * mass.mean(-2) + (1 - self.mix) * mass.max(-2)


@step
def own_policy(llm: LLM) -> object:
    if "first-hour" not in jaxkv.POLICIES:
        register_policy("first-hour", lambda budget, mix=0.5: Policy(budget=budget, scorer=Mixture(mix=mix)))
    return llm.generate(STORY, max_tokens=2, compression="first-hour", ratio=4)[0].cache


def refusals(llm: LLM) -> None:
    """What can't be right says at once what to write."""
    wrong: dict[str, Callable[[], object]] = {
        "KVCompress(budget=8)": lambda: KVCompress(budget=8),  # pyright: ignore[reportArgumentType]
        'chat_prompt("hi")': lambda: llm.chat_prompt("hi"),  # pyright: ignore[reportArgumentType]
        "logprobs=5": lambda: SamplingParams(logprobs=5),  # pyright: ignore[reportArgumentType]
        "max_token=3": lambda: llm.generate("hi", max_token=3),
        "a scorer without observes": lambda: Policy(scorer=type("Own", (Scorer,), {"weigh": abs})(), budget=Ratio(8)),
    }
    for typed, attempt in wrong.items():
        try:
            attempt()
        except (ValueError, TypeError) as error:
            print(f"{typed}: {error}")
        else:
            raise AssertionError(f"{typed} was taken")


def names(model: str) -> list[int]:
    """A checkpoint of one's own, from a model by name, with its tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(load_model(model), f"{folder}/own", tokenizer=load_tokenizer(model))
        return LLM(Path(f"{folder}/own")).generate("The capital of France is", max_tokens=2)[0].token_ids


if __name__ == "__main__":
    main()
