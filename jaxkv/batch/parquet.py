"""Parquet files of a batch job: rows as lines of JSON, and records as rows (``pip install jaxkv[parquet]``)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROWS = 256
"""Rows that are read at a time."""
PAGES = 2**20
"""Bytes of a column that are read at a time."""
MOST_ROWS, MOST_BYTES = 4096, 2**24
"""Of a row group that is written; the bytes are of its records as JSON."""


def pyarrow() -> Any:
    """The ``pyarrow`` module.

    Raises:
      ValueError: it isn't installed.
    """
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"Parquet files need pyarrow: pip install 'jaxkv[parquet]' ({error})") from None
    return pyarrow


def rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """Row numbers from 1, and rows as lines of JSON, in which what is null isn't there.

    Raises:
      ValueError: it is no Parquet file, or a damaged one.
    """
    arrow = pyarrow()
    number = 0
    try:
        # Said, since versions differ: so memory grows neither with the file nor with its row groups.
        streaming = {"buffer_size": PAGES, "pre_buffer": False}
        with arrow.parquet.ParquetFile(path, **streaming, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{path} has two columns {twice[0]!r}; give each a name of its own")
            for batch in file.iter_batches(batch_size=ROWS):
                for data in _lines(batch):
                    number += 1
                    yield number, data
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"can't read {path} after row {number}: no Parquet file, or a damaged one: {error}") from None


def write(path: Path, records: Iterable[bytes]) -> None:
    """Writes records, JSON each, as the rows of a file, in row groups of bounded size.

    Raises:
      OSError: it can't be written.
    """
    arrow = pyarrow()
    schema = _schema(arrow)
    # An open file, since a name with a colon would be read as a URI.
    with path.open("wb") as file, arrow.parquet.ParquetWriter(file, schema, write_page_checksum=True) as table:
        for group in _groups(records):
            table.write_table(arrow.Table.from_pylist([_row(json.loads(record)) for record in group], schema=schema))


def _lines(batch: Any) -> Iterator[bytes]:
    """Each row of a record batch; one with a text that isn't UTF-8 is that text, of which a reader says so."""
    try:
        made = batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            yield error.object
            return
        for i in range(batch.num_rows):
            yield from _lines(batch.slice(i, 1))
        return
    types = pyarrow().types
    for row in made:
        given = {field.name: _given(row[field.name], field.type, types) for field in batch.schema}
        yield json.dumps({name: value for name, value in given.items() if value is not None}, default=_foreign).encode()


def _given(value: Any, kind: Any, types: Any) -> Any:
    """A value of an Arrow type as JSON has it: fields of a struct that are null aren't there; ``types``: pyarrow's."""
    if value is None or not types.is_nested(kind):
        return value
    if types.is_struct(kind):
        fields = {field.name: _given(value[field.name], field.type, types) for field in kind}
        return {name: each for name, each in fields.items() if each is not None}
    if types.is_map(kind):
        return {str(name): _given(each, kind.item_type, types) for name, each in value}
    return [_given(each, kind.value_type, types) for each in value] if types.is_nested(kind.value_type) else value


def _foreign(value: Any) -> dict[str, str]:
    """In place of what JSON has no word for, such as bytes: nothing that a line may have, by which it is refused."""
    return {type(value).__name__: str(value)}


def _groups(records: Iterable[bytes]) -> Iterator[list[bytes]]:
    group: list[bytes] = []
    size = 0
    for record in records:
        if group and (len(group) == MOST_ROWS or size + len(record) > MOST_BYTES):
            yield group
            group, size = [], 0
        group.append(record)
        size += len(record)
    if group:
        yield group


def _schema(arrow: Any) -> Any:
    """The columns, the same for all jobs."""
    text, whole = arrow.string(), arrow.int64()
    return arrow.schema(
        {
            "id": text,
            "file": text,
            "line": whole,
            "text": text,
            "error": text,
            "finish_reason": text,
            "prompt_tokens": whole,
            "completion_tokens": whole,
            "token_ids": arrow.list_(arrow.int32()),
            "logprobs": arrow.list_(arrow.float64()),
            "top_logprobs": text,
            "others": text,
            "cache_bytes_held": whole,
            "cache_bytes_full": whole,
            "digest": text,
            "settings": text,
        }
    )


def _row(record: dict[str, Any]) -> dict[str, Any]:
    """A record with its nested values, and an id that is a number, as JSON text."""
    for name in ("id", "top_logprobs", "others", "settings"):
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            record[name] = json.dumps(value)
    return {name: _writable(value) if isinstance(value, str) else value for name, value in record.items()}


def _writable(text: str) -> str:
    """A text in which half a surrogate pair, as an id may have, is spelt out: Parquet holds UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
