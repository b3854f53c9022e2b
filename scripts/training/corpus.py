"""Texts to learn from: prose, lists, records, code and dialogue, with facts in them that no evaluation asks for."""

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

NAMES = (
    *("Agnes", "Bruno", "Clara", "Dario", "Edith", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Lucas"),
    *("Maren", "Nils", "Olga", "Pavel", "Rosa", "Simon", "Tilda", "Viktor", "Wanda", "Xenia", "Yusuf", "Zelda"),
)
THINGS = (
    *("umbrella", "ledger", "bicycle", "telescope", "passport", "recipe", "compass", "blanket", "kettle", "atlas"),
    *("camera", "lantern", "trumpet", "suitcase", "calendar", "necklace", "typewriter", "ladle", "spade", "saddle"),
)
PLACES = (
    *("attic", "cellar", "pantry", "stable", "library", "workshop", "greenhouse", "chapel", "office", "boathouse"),
    *("kitchen", "garage", "mill", "orchard", "station", "museum", "bakery", "harbour", "school", "theatre"),
)
CODE = ("argparse.py", "heapq.py", "textwrap.py", "statistics.py", "csv.py", "calendar.py", "bisect.py", "shlex.py")
"""Modules of Python's own library, which is wherever this runs."""


def fact(rng: random.Random) -> str:
    """A sentence that says something which nothing else tells."""
    name, other, thing, place = (rng.choice(words) for words in (NAMES, NAMES, THINGS, PLACES))
    number, clock = rng.randint(100, 99_999), f"{rng.randint(1, 12)}:{rng.randint(0, 59):02}"
    return rng.choice(
        (
            f"{name} keeps the {thing} in the {place}.",
            f"The parcel for {name} weighs {number} grams.",
            f"Room {number} of the {place} belongs to {name}.",
            f"The train to the {place} leaves at {clock}.",
            f"{name} sold the {thing} to {other} for {number} crowns.",
            f"The code of the {place} door is {number}, as {name} told {other}.",
            f"On the {thing} somebody had written the name {name}.",
        )
    )


def prose(path: Path, words: int, rng: random.Random) -> str:
    """Consecutive paragraphs of a text, with facts between sentences."""
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))]
    paragraphs = [p for p in paragraphs if len(p) > 60]
    sentences: list[str] = []
    at = rng.randrange(len(paragraphs))
    while sum(len(s.split()) for s in sentences) < words:
        sentences += re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraphs[at % len(paragraphs)])
        at += 1
    for _ in range(rng.randint(4, 10)):
        sentences.insert(rng.randrange(len(sentences)), fact(rng))
    return " ".join(sentences)


def records(words: int, rng: random.Random) -> str:
    """Lines of a table."""
    lines = ["name, thing, place, price"]
    while 5 * len(lines) < words:
        values = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES), rng.randint(10, 9999)
        lines.append(", ".join(map(str, values)))
    return "\n".join(lines)


def listing(words: int, rng: random.Random) -> str:
    """Numbered facts."""
    facts = [fact(rng) for _ in range(words // 9)]
    return "\n".join(f"{at}. {each}" for at, each in enumerate(facts, 1))


def dialogue(words: int, rng: random.Random) -> str:
    """Two people who ask and answer."""
    one, other = rng.sample(NAMES, 2)
    lines: list[str] = []
    while sum(len(line.split()) for line in lines) < words:
        place, thing = rng.choice(PLACES), rng.choice(THINGS)
        lines += [f"{one}: Have you been to the {place}?", f"{other}: I have. {fact(rng)}"]
        lines += [f"{one}: And the {thing}?", f"{other}: {fact(rng)} I am quite sure of it."]
    return "\n".join(lines)


def code(words: int, rng: random.Random) -> str:
    """A piece of a program."""
    lines = Path(sysconfig.get_path("stdlib"), rng.choice(CODE)).read_text(encoding="utf-8").splitlines()
    start = rng.randrange(max(1, len(lines) - words // 4))
    return "\n".join(lines[start : start + words // 3])


def texts(files: list[Path], words: int, seed: int) -> Iterator[str]:
    """Without end, each of about so many words: half of them prose of the files, the others of all kinds in turn."""
    rng = random.Random(seed)
    kinds: tuple[Callable[[int, random.Random], str], ...] = records, listing, dialogue, code
    while True:
        for kind in kinds:
            yield prose(rng.choice(files), words, rng)
            yield kind(words, rng)
