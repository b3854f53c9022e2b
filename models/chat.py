"""A conversation in a model's own format, by the Jinja template that its checkpoint carries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from models.bounded_jinja import BoundedEnvironment
from models.errors import CheckpointError


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as one text.

    Args:
      template: Jinja, as transformers takes it.
      messages: each with ``role`` and ``content``.
      add_generation_prompt: end with the words that begin the model's answer.
      special_tokens: ``bos_token`` and others that the template may name.
      tools: functions that the model may call, as JSON schemas.
      options: other variables of the template, such as ``enable_thinking``.

    Raises:
      ValueError: a message without role or content, or an option that the template never reads.
      CheckpointError: the template is broken, takes too long or makes too much, or refuses the conversation.
    """
    for i, message in enumerate(messages):
        has_content = isinstance(message.get("content"), str) or message.get("tool_calls")
        if not isinstance(message.get("role"), str) or not has_content:
            raise ValueError(f"message {i} needs a 'role' and a 'content', both texts, got {dict(message)!r:.200}")
    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    given = {**(options or {}), **({} if tools is None else {"tools": tools})}
    try:
        known = meta.find_undeclared_variables(environment.parse(template)) if given else given.keys()
        if not (unknown := given.keys() - known):
            said = {"tools": None, "documents": None, **special_tokens, **given}
            said |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
            return environment.from_string(template).render(**said)
    except Exception as error:  # a template is a program, and may fail as one
        raise CheckpointError(f"the model's chat template can't take this conversation: {error}") from error
    reads = sorted(known - {"messages", "add_generation_prompt", *special_tokens, *environment.globals})
    raise ValueError(
        f"the model's chat template knows no {', '.join(sorted(unknown))}; it reads {', '.join(reads) or 'no options'}"
    )


class _Generation(Extension):
    """``{% generation %}`` marks what the model itself says, for training; here what is inside is as outside."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own way)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)
