"""The lines of a batch job's input: what each asks for, or what is wrong with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from jaxkv.batch.openai import ANSWERED, UNUSED, WITHOUT_EFFECT, check_without_effect
from jaxkv.checks import cut, shown, shown_json
from jaxkv.policies import policy_from
from jaxkv.policies.names import settings_of
from jaxkv.requests import SamplingParams, check_unicode
from jaxkv.words import SETTINGS

Id = str | int | float
T = TypeVar("T")

NUMBERS = {
    "max_tokens": "a whole number",
    "temperature": "a number",
    "top_k": "a whole number",
    "top_p": "a number",
    "min_p": "a number",
    "seed": "a whole number",
    "n": "a whole number",
    "repetition_penalty": "a number",
    "presence_penalty": "a number",
    "frequency_penalty": "a number",
    "min_tokens": "a whole number",
    "top_logprobs": "a whole number",
    "ignore_eos": "true or false",
}
COMPRESSION = {"compression": "a text", "ratio": "a number"}
COMPRESSION |= {"max_cache_tokens": "a whole number", "max_cache_bytes": "a whole number"} | SETTINGS
KINDS = {"a text": str, "a number": int | float, "a whole number": int, "true or false": bool}
ASKED = {"prompt", "messages", "stop", "stop_token_ids", "logit_bias", "logprobs", *NUMBERS, *COMPRESSION}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Those that a message may have, and what each is to a chat template."""
MOST_NAMED = 3
"""Unknown fields that an error names."""


class Place(NamedTuple):
    """Where a line is: of these there is one for each line of an input, and they sort as the input is read."""

    file: str
    """Its name in the input's directory; nothing where the input is one file."""
    line: int
    """Of a JSONL file from 1, blank ones counted; or the row of a Parquet file, from 1."""

    def __str__(self) -> str:
        return f"{self.file} line {self.line}" if self.file else f"line {self.line}"

    def fields(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"file": self.file, "line": self.line} if self.file else {"line": self.line}


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line that was read."""

    file: str = ""
    line: int
    """Both as in a ``Place``."""

    @property
    def place(self) -> Place:
        return Place(self.file, self.line)


@dataclass(frozen=True, kw_only=True)
class Job(Line):
    """A line that can be answered."""

    id: Id
    prompt: str | list[int] | None
    """A text, or token ids."""
    messages: list[dict[str, str]] | None
    """Exactly one of ``prompt`` and ``messages`` is given."""
    params: SamplingParams
    digest: str
    """Of the whole line."""

    def broken(self, error: str) -> Broken:
        """It can't be answered after all."""
        return Broken(file=self.file, line=self.line, id=self.id, error=error)


@dataclass(frozen=True, kw_only=True)
class Broken(Line):
    """A line that can't."""

    id: Id | None
    """None where the line has no readable one."""
    error: str


class LineError(ValueError):
    """What is wrong with a line."""


def digest(data: bytes) -> str:
    """By which a record knows its line again: whether it was changed since."""
    return hashlib.sha256(data).hexdigest()[:16]


def read_line(data: bytes, line: int, defaults: SamplingParams, file: str = "") -> Job | Broken:
    """Reads one line: our own shape, or that of OpenAI's batch files.

    Ours: ``prompt`` (a text, or token ids) or ``messages`` (``role`` and ``content`` each, perhaps a ``name`` for the
    chat template), and perhaps ``id``, ``max_tokens``, ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``seed``,
    ``logprobs`` and ``stop`` (a text or several); and what compresses its cache, named as on the command line:
    ``compression``, ``ratio`` and so on. A line that names any of these says all of it, and a ``compression`` of
    ``none`` keeps everything. OpenAI's: ``custom_id`` and a ``body`` with the same, or ``max_completion_tokens`` for
    ``max_tokens``; what else a body may have is in ``batch.openai``. A value of null is as none given; any other field
    is an error.

    Args:
      line: its number, and where it has no id that too.
      defaults: what the line doesn't say.
      file: where the input is a directory, the name of the line's file; an id that isn't given then begins with it.
    """
    name: Id | None = None
    try:
        record = _parse(data)
        outer = "custom_id" in record or "body" in record
        name = _id(record, "custom_id" if outer else "id", f"{file}:{line}" if file else line)
        if outer:
            _no_others(record, {"custom_id", "body", "method", "url"}, "")
            body = record.get("body")
            if not isinstance(body, dict):
                raise LineError(f"body must be an object, got {shown_json(body)}")
            known = ASKED | {"max_completion_tokens", *UNUSED, *WITHOUT_EFFECT} | _own_settings(body).keys()
            _no_others(body, known, "body.")
            _of_line(check_without_effect, body)
            fields = _one_limit(body)
        else:
            _no_others(record, ASKED | {"id"} | _own_settings(record).keys(), "")
            fields = record
        prompt, messages = _question(fields)
        params = _params(fields, defaults)
    except LineError as error:
        return Broken(file=file, line=line, id=name, error=str(error))
    return Job(file=file, line=line, id=name, prompt=prompt, messages=messages, params=params, digest=digest(data))


def _parse(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LineError(f"not UTF-8: byte {data[error.start]:#04x} at offset {error.start}") from None
    try:
        record = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        near = shown_json(text[max(error.pos - 10, 0) : error.pos + 20])
        raise LineError(f"not JSON: {error.msg} at column {error.pos + 1}, near {near}") from None
    except RecursionError:
        raise LineError("not JSON that can be read: nested too deeply") from None
    except LineError:
        raise
    except ValueError as error:  # a whole number of thousands of digits
        raise LineError(f"not JSON that can be read: {error}") from None
    if not isinstance(record, dict):
        raise LineError(f"expected a JSON object with prompt or messages, got {shown_json(record)}")
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise LineError(f"the field {shown(name)} is there twice; give it once")
        result[name] = value
    return result


def _no_constant(name: str) -> None:
    raise LineError(f"not JSON: {name} is no number; give a finite one")


def _id(record: dict[str, Any], field: str, otherwise: Id) -> Id:
    value = record.get(field)
    if value is None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value in (float("inf"), float("-inf")):
        raise LineError(f"{field} must be a text or a number, got {shown_json(value)}")
    return value


def _no_others(record: dict[str, Any], known: set[str], where: str) -> None:
    unknown = [name for name in record if name not in known]
    if unknown:
        named = ", ".join(shown_json(f"{where}{cut(name)}") for name in unknown[:MOST_NAMED])
        more = f" and {len(unknown) - MOST_NAMED} more" if len(unknown) > MOST_NAMED else ""
        raise LineError(
            f"unknown field {named}{more}; known are {', '.join(sorted(known.difference(UNUSED, WITHOUT_EFFECT)))}"
        )


def _one_limit(body: dict[str, Any]) -> dict[str, Any]:
    """The body with its ``max_completion_tokens`` as ``max_tokens``, which has the same meaning."""
    old, new = body.get("max_tokens"), body.get("max_completion_tokens")
    if old is not None and new is not None:
        raise LineError(
            f"give max_tokens or max_completion_tokens, not both: got {shown_json(old)} and {shown_json(new)}"
        )
    return body | {"max_tokens": old if new is None else new}


def _question(fields: dict[str, Any]) -> tuple[str | list[int] | None, list[dict[str, str]] | None]:
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if prompt is None and messages is None:
        raise LineError("no prompt: give prompt (a text) or messages (a list)")
    if prompt is not None and messages is not None:
        raise LineError("give prompt or messages, not both")
    if prompt is not None:
        return _prompt(prompt), None
    if not isinstance(messages, list) or not messages:
        raise LineError(f"messages must be a list with at least one message, got {shown_json(messages)}")
    return None, [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, list):
        if len(prompt) == 1 and isinstance(prompt[0], str | list):
            return _prompt(prompt[0])
        if not prompt or not all(type(token) is int and 0 <= token < 2**31 for token in prompt):
            raise LineError(f"prompt must be one text or one list of token ids, got {shown_json(prompt)}")
        return prompt
    if not _text(prompt, "prompt").strip():
        raise LineError(f"prompt must not be empty, got {shown_json(prompt)}")
    return prompt


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise LineError(f"{where} must be an object with role and content, got {shown_json(message)}")
    _no_others(message, {"role", "content", "name", *ANSWERED}, f"{where}.")
    for name in ANSWERED:
        if message.get(name):
            raise LineError(f"{where}.{name} isn't supported, got {shown_json(message[name])}; leave it out")
    role, content, named = message.get("role"), message.get("content"), message.get("name")
    if not isinstance(role, str) or role not in ROLES:
        raise LineError(f"{where}.role must be one of {', '.join(ROLES)}, got {shown_json(role)}")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
                raise LineError(f'{where}.content may only hold {{"type": "text", "text": …}}, got {shown_json(part)}')
        content = "".join(_text(part["text"], f"{where}.content text") for part in content)
    made = {"role": ROLES[role], "content": _text(content, f"{where}.content")}
    return made if named is None else made | {"name": _text(named, f"{where}.name")}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise LineError(f"{where} must be a text, got {shown_json(value)}")
    _of_line(check_unicode, value, where)
    return value


def _of_line(check: Callable[..., T], *given: Any) -> T:
    """What a check gives, its refusal as the line's."""
    try:
        return check(*given)
    except ValueError as error:
        raise LineError(str(error)) from None


def _params(fields: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    given = _typed(fields, NUMBERS)
    if (logprobs := fields.get("logprobs")) is not None:
        # Of a prompt, OpenAI's count how many alternatives come with each token's own.
        counts = type(logprobs) is int and "prompt" in fields
        if not isinstance(logprobs, bool) and not counts:
            raise LineError(f"logprobs must be true or false, or with a prompt a number, got {shown_json(logprobs)}")
        given["logprobs"] = logprobs is not False
        if counts:
            given["top_logprobs"] = logprobs
    for name, kind in (("logit_bias", dict), ("stop_token_ids", list)):
        if (value := fields.get(name)) is not None:
            if not isinstance(value, kind):
                raise LineError(f"{name} must be {'an object' if kind is dict else 'a list'}, got {shown_json(value)}")
            given[name] = value
    compression = _typed(fields, COMPRESSION)
    stop = fields.get("stop")
    if stop is not None:
        if not isinstance(stop, str | list):
            raise LineError(f"stop must be a text or a list of texts, got {shown_json(stop)}")
        given["stop"] = tuple(_text(s, "stop") for s in ([stop] if isinstance(stop, str) else stop))
    if own := _own_settings(fields):
        compression["settings"] = {name: fields[name] for name in own if fields.get(name) is not None}
    if compression:
        given["compression"] = _of_line(policy_from, compression)
    return _of_line(lambda: replace(defaults, **given))


def _own_settings(fields: dict[str, Any]) -> dict[str, str]:
    """Settings of the policy that a line names which aren't everybody's, with what each is annotated with."""
    name = fields.get("compression")
    if not isinstance(name, str) or name == "none":
        return {}
    return {key: kind for key, kind in _of_line(settings_of, name).items() if key not in {*ASKED, "budget", "scorer"}}


def _typed(fields: dict[str, Any], expected: dict[str, str]) -> dict[str, Any]:
    """Those of the fields that are given and expected, each of its kind."""
    given = {name: fields[name] for name in expected if fields.get(name) is not None}
    for name, value in given.items():
        kind = KINDS[expected[name]]
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
            raise LineError(f"{name} must be {expected[name]}, got {shown_json(value)}")
    return given
