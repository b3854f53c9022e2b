"""The lines of a batch job's input: what each asks for, or what is wrong with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxkv.policies import policy_from
from jaxkv.requests import SamplingParams, check_unicode
from jaxkv.words import SETTINGS

Id = str | int | float

NUMBERS = {
    "max_tokens": "a whole number",
    "temperature": "a number",
    "top_k": "a whole number",
    "top_p": "a number",
    "min_p": "a number",
    "seed": "a whole number",
}
COMPRESSION = {"compression": "a text", "ratio": "a number"}
COMPRESSION |= {"max_cache_tokens": "a whole number", "max_cache_bytes": "a whole number"} | SETTINGS
KINDS = {"a text": str, "a number": int | float, "a whole number": int, "true or false": bool}
ASKED = {"prompt", "messages", "stop", *NUMBERS, *COMPRESSION}
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A line that can be answered."""

    line: int
    """From 1, blank lines counted."""
    id: Id
    prompt: str | None
    messages: list[dict[str, str]] | None
    """Exactly one of ``prompt`` and ``messages`` is given."""
    params: SamplingParams
    digest: str
    """Of the whole line."""

    def broken(self, error: str) -> Broken:
        """It can't be answered after all."""
        return Broken(line=self.line, id=self.id, error=error)


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A line that can't."""

    line: int
    id: Id | None
    """None where the line has no readable one."""
    error: str


class LineError(ValueError):
    """What is wrong with a line."""


def digest(data: bytes) -> str:
    """By which a record knows its line again: whether it was changed since."""
    return hashlib.sha256(data).hexdigest()[:16]


def input_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line numbers from 1, and lines without their ends; blank ones are left out."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            data = raw.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else raw.strip()
            if data:
                yield number, data


def read_line(data: bytes, line: int, defaults: SamplingParams) -> Job | Broken:
    """Reads one line: our own shape, or that of OpenAI's batch files.

    Ours: ``prompt`` (a text) or ``messages`` (``role`` and ``content`` each), and perhaps ``id``, ``max_tokens``,
    ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``seed`` and ``stop`` (a text or several); and what compresses its
    cache, named as on the command line: ``compression``, ``ratio`` and so on. A line that names any of these says all
    of it, and a ``compression`` of ``none`` keeps everything. OpenAI's: ``custom_id`` and a ``body`` with the same, or
    ``max_completion_tokens`` for ``max_tokens``; ``method``, ``url`` and the body's ``model`` are ignored, since the
    job has one model. A value of null is as none given; any other field is an error.

    Args:
      defaults: what the line doesn't say.
    """
    name: Id | None = None
    try:
        record = _parse(data)
        outer = "custom_id" in record or "body" in record
        name = _id(record, "custom_id" if outer else "id", line)
        if outer:
            _no_others(record, {"custom_id", "body", "method", "url"}, "")
            body = record.get("body")
            if not isinstance(body, dict):
                raise LineError(f"body must be an object, got {_shown(body)}")
            _no_others(body, ASKED | {"model", "max_completion_tokens"}, "body.")
            fields = _one_limit(body)
        else:
            _no_others(record, ASKED | {"id"}, "")
            fields = record
        prompt, messages = _question(fields)
        params = _params(fields, defaults)
    except LineError as error:
        return Broken(line=line, id=name, error=str(error))
    return Job(line=line, id=name, prompt=prompt, messages=messages, params=params, digest=digest(data))


def _parse(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LineError(f"not UTF-8: byte {data[error.start]:#04x} at offset {error.start}") from None
    try:
        record = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        near = _shown(text[max(error.pos - 10, 0) : error.pos + 20])
        raise LineError(f"not JSON: {error.msg} at column {error.pos + 1}, near {near}") from None
    except RecursionError:
        raise LineError("not JSON that can be read: nested too deeply") from None
    except LineError:
        raise
    except ValueError as error:  # a whole number of thousands of digits
        raise LineError(f"not JSON that can be read: {error}") from None
    if not isinstance(record, dict):
        raise LineError(f"expected a JSON object with prompt or messages, got {_shown(record)}")
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise LineError(f"the field {next(n for n in names if names.count(n) > 1)!r} is there twice; give it once")
    return result


def _no_constant(name: str) -> None:
    raise LineError(f"not JSON: {name} is no number; give a finite one")


def _id(record: dict[str, Any], field: str, line: int) -> Id:
    value = record.get(field)
    if value is None:
        return line
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value in (float("inf"), float("-inf")):
        raise LineError(f"{field} must be a text or a number, got {_shown(value)}")
    return value


def _no_others(record: dict[str, Any], known: set[str], where: str) -> None:
    unknown = [f"{where}{name}" for name in record if name not in known]
    if unknown:
        raise LineError(f"unknown field {', '.join(map(_shown, unknown))}; known are {', '.join(sorted(known))}")


def _one_limit(body: dict[str, Any]) -> dict[str, Any]:
    """The body with its ``max_completion_tokens`` as ``max_tokens``, which has the same meaning."""
    old, new = body.get("max_tokens"), body.get("max_completion_tokens")
    if old is not None and new is not None:
        raise LineError(f"give max_tokens or max_completion_tokens, not both: got {_shown(old)} and {_shown(new)}")
    return body | {"max_tokens": old if new is None else new}


def _question(fields: dict[str, Any]) -> tuple[str | None, list[dict[str, str]] | None]:
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if prompt is None and messages is None:
        raise LineError("no prompt: give prompt (a text) or messages (a list)")
    if prompt is not None and messages is not None:
        raise LineError("give prompt or messages, not both")
    if prompt is not None:
        if not _text(prompt, "prompt").strip():
            raise LineError(f"prompt must not be empty, got {_shown(prompt)}")
        return prompt, None
    if not isinstance(messages, list) or not messages:
        raise LineError(f"messages must be a list with at least one message, got {_shown(messages)}")
    return None, [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise LineError(f"{where} must be an object with role and content, got {_shown(message)}")
    _no_others(message, {"role", "content"}, f"{where}.")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise LineError(f"{where}.role must be one of {', '.join(ROLES)}, got {_shown(role)}")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
                raise LineError(f'{where}.content may only hold {{"type": "text", "text": …}}, got {_shown(part)}')
        content = "".join(_text(part["text"], f"{where}.content text") for part in content)
    return {"role": role, "content": _text(content, f"{where}.content")}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise LineError(f"{where} must be a text, got {_shown(value)}")
    try:
        check_unicode(value, where)
    except ValueError as error:
        raise LineError(str(error)) from None
    return value


def _params(fields: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    given = _typed(fields, NUMBERS)
    compression = _typed(fields, COMPRESSION)
    stop = fields.get("stop")
    if stop is not None:
        if not isinstance(stop, str | list):
            raise LineError(f"stop must be a text or a list of texts, got {_shown(stop)}")
        given["stop"] = tuple(_text(s, "stop") for s in ([stop] if isinstance(stop, str) else stop))
    try:
        if compression:
            given["compression"] = policy_from(compression)
        return replace(defaults, **given)
    except ValueError as error:
        raise LineError(str(error)) from None


def _typed(fields: dict[str, Any], expected: dict[str, str]) -> dict[str, Any]:
    """Those of the fields that are given and expected, each of its kind."""
    given = {name: fields[name] for name in expected if fields.get(name) is not None}
    for name, value in given.items():
        kind = KINDS[expected[name]]
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
            raise LineError(f"{name} must be {expected[name]}, got {_shown(value)}")
    return given


def _shown(value: Any) -> str:
    """A value in an error, not longer than a line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
