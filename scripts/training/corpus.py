"""Texts to learn from: prose, manuals, lists, tables, records, code, letters and dialogue, in some languages, with
facts in them that no evaluation asks for."""

from __future__ import annotations

import json
import random
import re
import string
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

NAMES = (
    *("Agnes", "Bruno", "Clara", "Dario", "Edith", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Lucas"),
    *("Maren", "Nils", "Olga", "Pavel", "Rosa", "Simon", "Tilda", "Viktor", "Wanda", "Xenia", "Yusuf", "Zelda"),
    *("Mr Abbott", "Mrs Finch", "Dr Okafor", "Captain Reyes", "Professor Lindqvist", "Sister Margit", "Old Tom"),
)
THINGS = (
    *("umbrella", "ledger", "bicycle", "telescope", "passport", "recipe", "compass", "blanket", "kettle", "atlas"),
    *("camera", "lantern", "trumpet", "suitcase", "calendar", "necklace", "typewriter", "ladle", "spade", "saddle"),
    *("barometer", "quilt", "anvil", "teapot", "wheelbarrow", "sextant", "harpsichord", "inkwell", "sledge", "loom"),
)
PLACES = (
    *("attic", "cellar", "pantry", "stable", "library", "workshop", "greenhouse", "chapel", "office", "boathouse"),
    *("kitchen", "garage", "mill", "orchard", "station", "museum", "bakery", "harbour", "school", "theatre"),
)
TOWNS = (
    *("Ghent", "Porto", "Turku", "Split", "Bergen", "Leeds", "Graz", "Nantes", "Padua", "Utrecht", "Bremen", "Cork"),
    *("Tartu", "Lublin", "Malmo", "Seville", "Perth", "Tampa", "Osaka", "Accra", "Lahore", "Cusco", "Fez", "Izmir"),
)
COLOURS = ("crimson", "teal", "ochre", "violet", "ivory", "maroon", "indigo", "olive", "scarlet", "amber")
ANIMALS = ("heron", "badger", "otter", "falcon", "hedgehog", "lynx", "donkey", "magpie", "weasel", "tortoise")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November")
FACTS = (
    "{name} keeps the {thing} in the {place}.",
    "The parcel for {name} weighs {number} grams.",
    "Room {number} of the {place} belongs to {name}.",
    "The train to {town} leaves at {clock}.",
    "{name} sold the {thing} to {other} for {number} crowns.",
    "The code of the {place} door is {number}, as {name} told {other}.",
    "On the {thing} somebody had written the name {name}.",
    "In {town} they call the {animal} {name}.",
    "The favourite colour of {name} is {colour}.",
    "The password for the {place} in {town} was changed to {thing}.",
    "The {town} office has the telephone number {digits}.",
    "{name} was born in {town} on {day} {month} {year}.",
    "Remember: the key to the {place} hangs behind the {thing}.",
    "The winner of the {town} race was {name}, with number {number}.",
    "Invoice {code} from {town} was paid by {name}.",
    "The {colour} {thing} costs {price} in {town}.",
    "Of all animals {name} likes the {animal} best.",
    "The distance from {town} to {city} is {number} miles.",
    "The lucky number of {name} is {number}.",
    "The capital letter on the {thing} of {name} is {letter}.",
    "The answer that {name} gave to {other} was '{thing}'.",
    "{town} has {number} inhabitants, and its emblem is the {animal}.",
    "You can write to {name} at {mail}.",
    "The serial number of the {thing} is {code}.",
    "The {town} choir chose the word {colour} for its banner.",
    "La clé de {name} est dans le tiroir {number}.",
    "Le mot de passe de {town} est {thing}.",
    "{name} wohnt in {town}, Haus Nummer {number}.",
    "Das Kennwort von {name} lautet {animal}.",
    "El número de teléfono de {name} es {digits}.",
    "En {town} la palabra de hoy es {colour}.",
    "Il treno per {town} parte alle {clock}.",
    "O cofre de {name} abre com {number}.",
)
"""What nothing else tells; none is of the form that ``scripts/evaluation`` asks for."""
FRAMES = (
    "{}",
    "{}",
    "By the way: {}",
    "Nobody should forget this. {}",
    "({})",
    "As somebody remarked, {}",
    "Note that {}",
)
CODE = (
    *("argparse.py", "heapq.py", "textwrap.py", "statistics.py", "csv.py", "calendar.py", "bisect.py", "shlex.py"),
    *("ast.py", "cmd.py", "configparser.py", "datetime.py", "difflib.py", "fractions.py", "ftplib.py", "gzip.py"),
    *("inspect.py", "locale.py", "mailbox.py", "optparse.py", "pathlib.py", "pickle.py", "random.py", "sched.py"),
    *("smtplib.py", "string.py", "tarfile.py", "threading.py", "timeit.py", "typing.py", "uuid.py", "zipfile.py"),
)
"""Modules of Python's own library, which is wherever this runs; those that a version hasn't are left out."""


SIZES = ((10, 99), (100, 999), (1000, 9999), (10_000, 1_000_000))
"""Of numbers."""


def slots(rng: random.Random) -> dict[str, str]:
    """What fills a fact."""
    number = rng.choice([rng.randint(least, most) for least, most in SIZES])
    letters = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(2, 3)))
    name = rng.choice(NAMES)
    return {
        "name": name,
        "other": rng.choice(NAMES),
        "thing": rng.choice(THINGS),
        "place": rng.choice(PLACES),
        "town": rng.choice(TOWNS),
        "city": rng.choice(TOWNS),
        "colour": rng.choice(COLOURS),
        "animal": rng.choice(ANIMALS),
        "month": rng.choice(MONTHS),
        "day": str(rng.randint(1, 28)),
        "year": str(rng.randint(1700, 2020)),
        "clock": f"{rng.randint(1, 12)}:{rng.randint(0, 59):02}",
        "number": str(number),
        "digits": " ".join(str(rng.randint(10, 999)) for _ in range(3)),
        "price": f"${rng.randint(1, 999)}.{rng.randint(0, 99):02}",
        "code": f"{letters}-{rng.randint(100, 99_999)}",
        "letter": rng.choice(string.ascii_uppercase),
        "mail": f"{name.split()[-1].lower()}{rng.randint(1, 99)}@{rng.choice(TOWNS).lower()}.org",
    }


def fact(rng: random.Random) -> str:
    """A sentence that says something which nothing else tells."""
    return rng.choice(FACTS).format(**slots(rng))


def planted(sentences: list[str], rng: random.Random) -> list[str]:
    """Sentences with facts between them."""
    sentences = list(sentences)
    for _ in range(rng.randint(4, 20)):
        sentences.insert(rng.randrange(len(sentences) + 1), rng.choice(FRAMES).format(fact(rng)))
    return sentences


def paragraphs(path: Path) -> list[str]:
    """Of a file of prose, each on one line."""
    found = (" ".join(p.split()) for p in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")))
    return [p for p in found if len(p) > 60]


def prose(text: Sequence[str], words: int, rng: random.Random) -> str:
    """Consecutive paragraphs, with facts between sentences."""
    sentences: list[str] = []
    at = rng.randrange(len(text))
    while sum(len(s.split()) for s in sentences) < words:
        sentences += re.split(r"(?<=[.!?])\s+(?=[A-Z])", text[at % len(text)])
        at += 1
    return " ".join(planted(sentences, rng))


def manual(words: int, rng: random.Random) -> str:
    """Python's own manual, with facts between paragraphs."""
    parts: list[str] = []
    while sum(len(p.split()) for p in parts) < words:
        parts += re.split(r"\n\s*\n", topics[rng.choice(sorted(topics))])
    return "\n\n".join(planted(parts, rng))


def table(words: int, rng: random.Random) -> str:
    """Lines of a table, parted by commas or by bars."""
    columns = rng.sample(("name", "thing", "place", "town", "number", "price", "code", "month"), rng.randint(3, 5))
    bar = rng.choice((", ", " | ", "\t"))
    lines = [bar.join(columns)]
    while 2 * len(columns) * len(lines) < words:
        values = slots(rng)
        lines.append(bar.join(values[column] for column in columns))
    return "\n".join(lines)


def records(words: int, rng: random.Random) -> str:
    """Lines of JSON."""
    lines: list[str] = []
    while 10 * len(lines) < words:
        values = slots(rng)
        lines.append(json.dumps({key: values[key] for key in rng.sample(sorted(values), 5)}))
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


def letters(words: int, rng: random.Random) -> str:
    """Short letters, one after the other."""
    parts: list[str] = []
    while sum(len(p.split()) for p in parts) < words:
        values = slots(rng)
        body = " ".join(fact(rng) for _ in range(rng.randint(2, 5)))
        head = f"{values['town']}, {values['day']} {values['month']} {values['year']}\n\nDear {values['other']},"
        parts.append(f"{head}\n\n{body} More when we meet.\n\nYours,\n{values['name']}")
    return "\n\n".join(parts)


def code(words: int, rng: random.Random) -> str:
    """A piece of a program."""
    found = [path for path in (Path(sysconfig.get_path("stdlib"), name) for name in CODE) if path.exists()]
    lines = rng.choice(found).read_text(encoding="utf-8").splitlines()
    start = rng.randrange(max(1, len(lines) - words // 4))
    return "\n".join(lines[start : start + words // 3])


def texts(files: Sequence[Sequence[str]], words: int, seed: int) -> Iterator[str]:
    """Without end, each of about so many words: half of them prose of the files' paragraphs, the others of all kinds in
    turn."""
    rng = random.Random(seed)
    kinds: tuple[Callable[[int, random.Random], str], ...]
    kinds = table, listing, dialogue, code, manual, letters, records
    while True:
        for kind in kinds:
            yield prose(rng.choice(files), words, rng)
            yield kind(words, rng)
