"""Facts planted in real prose: what is told, and what is asked. Everything follows from the seed."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

TEXT = Path(__file__).parents[1] / "data" / "emma-chapters-1-10.txt"

CITIES = (
    *("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Dublin", "Prague", "Havana", "Nairobi", "Vienna"),
    *("Boston", "Madrid", "Delhi", "Athens", "Quito", "Zurich", "Tunis", "Seoul", "Warsaw", "Bogota"),
    *("Geneva", "Manila", "Denver", "Naples", "Ankara", "Berlin", "Sydney", "Toronto", "Moscow", "Paris"),
)
WORDS = (
    *("apple", "banana", "cherry", "lemon", "orange", "grape", "copper", "silver", "iron", "tiger"),
    *("rabbit", "eagle", "horse", "salmon", "guitar", "piano", "violin", "drum", "table", "window"),
    *("mirror", "candle", "river", "mountain", "desert", "island", "winter", "summer", "thunder", "rainbow"),
    *("coffee", "butter", "pepper", "honey", "garden", "castle", "bridge", "tower", "hammer", "ladder"),
)


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A sentence to plant, the question that it answers, and the answer's beginning, after which it is due."""

    sentence: str
    question: str
    stem: str
    answer: str


def word_fact(city: str, rng: random.Random) -> Fact:
    word = rng.choice(WORDS)
    return _fact(f"The secret word of {city} is", word, f"What is the secret word of {city}?")


def number_fact(city: str, rng: random.Random) -> Fact:
    number = str(rng.randint(1000, 9999))
    return _fact(f"The magic number of {city} is", number, f"What is the magic number of {city}?")


def _fact(stem: str, answer: str, asked: str) -> Fact:
    return Fact(
        sentence=f"{stem} {answer}.", question=f"\n\nQuestion: {asked}", stem=f"\nAnswer: {stem}", answer=f" {answer}"
    )


def paragraphs() -> list[str]:
    """The novel's, each on one line, without headings."""
    found = re.split(r"\n\s*\n", TEXT.read_text(encoding="utf-8"))
    lines = [" ".join(p.split()) for p in found]
    return [p for p in lines if len(p) > 60]


def passage(words: int, rng: random.Random) -> tuple[list[str], str]:
    """About so many words of consecutive paragraphs, in sentences, and the paragraphs that follow."""
    text = paragraphs()
    start = rng.randrange(len(text) // 2)
    sentences: list[str] = []
    while sum(len(s.split()) for s in sentences) < words:
        sentences += re.split(r"(?<=[.!?])\s+(?=[A-Z])", text[start])
        start += 1
    return sentences, " ".join(text[start : start + 8])


def plant(facts: list[Fact], sentences: list[str], rng: random.Random) -> str:
    """The text with the facts at even depths, each between two sentences."""
    text = list(sentences)
    step = len(text) / len(facts)
    for i, fact in reversed(list(enumerate(facts))):
        text.insert(int((i + rng.random()) * step), fact.sentence)
    return " ".join(text)
