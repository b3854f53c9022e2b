"""A conversation in a model's own format, by the Jinja template that its checkpoint carries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.errors import CheckpointError


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str],
) -> str:
    """The conversation as one text.

    Args:
      template: Jinja, as transformers takes it.
      messages: each with ``role`` and ``content``.
      add_generation_prompt: end with the words that begin the model's answer.
      special_tokens: ``bos_token`` and others that the template may name.

    Raises:
      ValueError: a message without role or content.
      CheckpointError: the template is broken, or refuses the conversation.
    """
    for i, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {i} needs a 'role' and a 'content', both texts, got {dict(message)!r}")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, **special_tokens
        )
    except Exception as error:  # a template is a program, and may fail as one
        raise CheckpointError(f"the model's chat template can't take this conversation: {error}") from error


def _refuse(message: str) -> None:
    raise TemplateError(message)
