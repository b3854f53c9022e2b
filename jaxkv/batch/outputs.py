"""What a batch job makes of its records at its end: a Parquet file, or a file for each one of the input's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from jaxkv.batch import parquet
from jaxkv.batch.lines import Place
from jaxkv.batch.records import place_of
from jaxkv.batch.sources import Source


@dataclass(frozen=True, kw_only=True)
class Final:
    """A file that is made of records, once all are there."""

    path: Path
    of: str | None
    """The input's file whose records it has; None: all of them."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What was asked for, and the file that the job writes to and goes on by."""

    records: Path
    finals: tuple[Final, ...] = ()
    """Where there are none, the records are what was asked for."""

    def make(self) -> None:
        """Makes the final files, each at once, with records in the order of the input.

        Raises:
          OSError: one can't be written; it is then as it was.
        """
        if not self.finals:
            return
        found = _find(self.records)
        parts = {file: [at for _, at in group] for file, group in groupby(found, lambda pair: pair[0].file)}
        for final in self.finals:
            offsets = [at for _, at in found] if final.of is None else parts.get(final.of, [])
            try:
                with _replaced(final.path) as beside:
                    WRITERS[final.path.suffix.lower()](beside, _at(self.records, offsets))
            except OSError as error:
                raise OSError(
                    f"can't write {final.path}: {error.strerror or error}; all records are in {self.records}: start "
                    "the same command again to go on"
                ) from None


def output_for(given: Path | str, source: Source, output_format: str) -> Output:
    """Where records go and what is made of them: given a directory (one that is there, or a name that ends in ``/``)
    a file for each of the input's; given a name that ends in ``.parquet`` that; else the records are all.

    Raises:
      OSError: a directory for an input of one file, or one that can't be made.
      ValueError: an output that is among the input, that this job didn't write, or that can't be in this format.
    """
    path = Path(given)
    into = path.is_dir() or str(given).endswith("/")
    if into:
        path = path.resolve()  # of . and .. too there is a beside
    if into and not source.is_directory:
        raise OSError(f"can't write {path}: Is a directory, and the input one file; give a file")
    finals: list[Final] = []
    if into:
        finals = [Final(path=path / name, of=name) for name in source.files]
    elif path.suffix.lower() == ".parquet":
        finals = [Final(path=path, of=None)]
    if any(final.path.suffix.lower() == ".parquet" for final in finals):
        if output_format == "openai":
            raise ValueError(f"--output-format openai is JSONL, not Parquet; give another --output than {path}")
        parquet.pyarrow()
    records = path.with_name(f"{path.name}.records.jsonl") if finals else path
    made = Output(records=records, finals=tuple(finals))
    _check(made, source)
    if into:
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise OSError(f"can't write {path}: {error.strerror}") from None
    return made


def jsonl(path: Path, records: Iterable[bytes]) -> None:
    """Writes records, JSON each and a line's end, as they are."""
    with path.open("wb") as file:
        file.writelines(records)


WRITERS = {".jsonl": jsonl, ".parquet": parquet.write}


def _check(output: Output, source: Source) -> None:
    """Raises ValueError where a job would read what it writes, or replace what it didn't write."""
    paths = [output.records, *(final.path for final in output.finals)]
    inputs = {_identity(path): path for path in source.files.values()}
    for path in paths:
        if path.exists() and (same := inputs.get(_identity(path))) is not None:
            raise ValueError(f"--input and --output are the same file, {same}")
        if source.is_directory and path.parent.resolve() == source.path.resolve():
            raise ValueError(f"{path} would be among the input, {source.path}; give an --output elsewhere")
    there = [path for path in paths if path.exists()]
    if output.finals and there and not output.records.exists():
        raise ValueError(
            f"{there[0]} is there, but not {output.records}, by which the job that wrote it would go on; give another "
            "--output, or take it away"
        )


def _identity(path: Path) -> tuple[int, int]:
    told = path.stat()
    return told.st_dev, told.st_ino


def _find(records: Path) -> list[tuple[Place, int]]:
    """The lines that there are records of, in the order of the input, and where each record begins."""
    found: list[tuple[Place, int]] = []
    offset = 0
    with records.open("rb") as file:
        for raw in file:
            found.append((place_of(json.loads(raw)), offset))
            offset += len(raw)
    return sorted(found)


def _at(records: Path, offsets: Iterable[int]) -> Iterator[bytes]:
    with records.open("rb") as file:
        for offset in offsets:
            file.seek(offset)
            yield file.readline()


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A name beside a file, whose content becomes the file's all at once; where it fails the file is as it was."""
    real = Path(os.path.realpath(path))  # not through a link: a rename would replace the link
    beside = real.with_name(f".{real.name}.new")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, real)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
