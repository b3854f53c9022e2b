"""The input of a batch job: its lines, in whatever files they are, and where each is."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxkv.batch import parquet
from jaxkv.batch.lines import Place

Numbered = Iterator[tuple[int, bytes]]
"""A file's lines with their numbers, from 1."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file, or those of a directory, all of one kind."""

    path: Path
    """As it was given."""
    files: Mapping[str, Path]
    """In their order, by what records call them: the name in the directory, nothing for one file."""
    read: Callable[[Path], Numbered]

    @property
    def is_directory(self) -> bool:
        return "" not in self.files

    def lines(self) -> Iterator[tuple[Place, bytes]]:
        """What there is to answer, as lines of JSON; may be read again.

        Raises:
          ValueError: a file that is damaged.
        """
        for name, path in self.files.items():
            for number, data in self.read(path):
                yield Place(name, number), data


def source_of(path: Path) -> Source:
    """The input that this is: by its name a JSONL or a Parquet file, or a directory of such.

    Raises:
      OSError: it can't be read.
      ValueError: a directory without them or of both kinds, or Parquet where pyarrow isn't installed.
    """
    try:
        files = _of_directory(path) if path.is_dir() else {"": path}
    except OSError as error:
        raise OSError(f"can't read {path}: {error.strerror}") from None
    for each in files.values():
        _check(each)
    kind = next(iter(files.values())).suffix.lower()
    if kind == ".parquet":
        parquet.pyarrow()
    return Source(path=path, files=files, read=READERS.get(kind, jsonl_lines))


def jsonl_lines(path: Path) -> Numbered:
    """Lines without their ends; blank ones are counted and left out."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            data = raw.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else raw.strip()
            if data:
                yield number, data


READERS: dict[str, Callable[[Path], Numbered]] = {".jsonl": jsonl_lines, ".parquet": parquet.rows}
"""By how a file's name ends. Alone, a file of another name is JSONL too."""


def _of_directory(path: Path) -> dict[str, Path]:
    files = {each.name: each for each in path.iterdir() if each.suffix.lower() in READERS and each.name[0] != "."}
    first = {each.suffix.lower(): name for name, each in sorted(files.items(), reverse=True)}
    if not first:
        raise ValueError(f"{path} holds no file whose name ends in {' or '.join(READERS)}; give a directory that does")
    if len(first) > 1:
        both = " and ".join(sorted(first.values()))
        raise ValueError(f"{path} holds files of two kinds, such as {both}; give a directory of one kind")
    return dict(sorted(files.items()))


def _check(path: Path) -> None:
    """Raises OSError where a file can't be read, or not twice."""
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
        if regular:
            with path.open("rb"):
                pass
    except OSError as error:
        raise OSError(f"can't read {path}: {error.strerror}") from None
    if not regular:
        raise OSError(f"can't read {path}: it must be a regular file, since it is read twice")
