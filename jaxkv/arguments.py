"""What ``LLM``'s methods take, as people write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import jax
import numpy as np

from jaxkv.checks import shown
from jaxkv.requests import SamplingParams, check_unicode
from models import Decoder, Tokenizer

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
"""A conversation: ``role`` and ``content`` of each message."""


def check_model(model: Decoder) -> Decoder:
    """The model, if it is one."""
    if lacking := [name for name in ("sizes", "logits", "__call__") if not hasattr(model, name)]:
        raise ValueError(
            "expected a models.Decoder: sizes, logits and a call that takes tokens, positions, attend and state, got a "
            f"{type(model).__name__} without {', '.join(lacking)}"
        )
    return model


def is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether it is one prompt, not several.

    Raises:
      ValueError: it is neither.
    """
    if isinstance(prompts, np.ndarray | jax.Array):
        return prompts.ndim < 2
    if isinstance(prompts, str):
        return True
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts must be a text, a list of token ids, or a list of either, got {shown(prompts)}")
    if len(prompts) > 0 and isinstance(prompts[0], Mapping):
        raise ValueError("these are messages, not prompts; write llm.chat(messages)")
    return len(prompts) > 0 and not isinstance(prompts[0], str | Sequence) and np.ndim(prompts[0]) == 0


def ids_of(prompt: Prompt, tokenizer: Tokenizer | None, *, add_special: bool = True) -> np.ndarray:
    """Token ids ``[tokens]`` of a prompt.

    Raises:
      ValueError: it is none, or a text where there is no tokenizer.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("this LLM has no tokenizer; give prompts as token ids")
        check_unicode(prompt, "the prompt")
        prompt = tokenizer.encode(prompt) if add_special else tokenizer.encode(prompt, add_special=False)
    try:
        ids = np.asarray(prompt)
    except ValueError:  # lists of unequal lengths
        ids = np.asarray(None)
    if ids.ndim != 1 or ids.dtype == object:
        raise ValueError(f"a prompt must be a text or a list of token ids, got {shown(prompt)}")
    if len(ids) and not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"token ids must be whole numbers, got {ids.dtype}: {ids[:4].tolist()}")
    return ids


def conversations(messages: Messages | Sequence[Messages]) -> Sequence[Messages]:
    """One conversation, or several, as several.

    Raises:
      ValueError: it is none.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        said = messages if isinstance(messages, str) else "…"
        raise ValueError(
            f"messages must be a list with a role and a content each, got {shown(messages)}; write "
            f'[{{"role": "user", "content": {shown(said)}}}]'
        )
    one = len(messages) == 0 or isinstance(messages[0], Mapping)
    return [messages] if one else messages  # pyright: ignore[reportReturnType]


def chat_prompt(
    tokenizer: Tokenizer | None, messages: Messages, *, tools: Sequence[Mapping[str, Any]] | None = None, **options: Any
) -> list[int]:
    """As ``LLM.chat_prompt``, of the model that has this tokenizer."""
    [messages] = conversations(messages)
    if tokenizer is None:
        raise ValueError("this LLM has no tokenizer, so it has no chat format; give prompts as token ids")
    if tools is not None:
        options["tools"] = tools  # only then: a tokenizer of one's own may know none
    return tokenizer.encode_chat(tokenizer.chat(messages, **options))


SAMPLING = tuple(each.name for each in fields(SamplingParams))


def params_with(
    params: SamplingParams | Sequence[SamplingParams] | None, sampling: Mapping[str, Any], what: str
) -> SamplingParams | Sequence[SamplingParams]:
    """``SamplingParams``, or several, with some of their fields given beside.

    Raises:
      TypeError: a field that there isn't; ``what`` tells whose argument it was.
    """
    for name in sampling:
        if name not in SAMPLING:
            raise TypeError(f"{what} takes no {name}; of SamplingParams it takes {', '.join(SAMPLING)}")
    if params is None:
        return SamplingParams(**sampling)
    if isinstance(params, SamplingParams):
        return replace(params, **sampling)
    if not sampling or not isinstance(params, Sequence):
        return params
    return [replace(each, **sampling) for each in params]


def one_each(params: SamplingParams | Sequence[SamplingParams], prompts: int) -> list[SamplingParams]:
    """The params of each of so many prompts."""
    if isinstance(params, SamplingParams):
        return [params] * prompts
    each: list[SamplingParams] = list(params) if isinstance(params, Sequence) else [params]
    if len(each) != prompts:
        raise ValueError(f"give one SamplingParams, or one a prompt: {prompts} prompts, {len(each)} params")
    return each


def of_prompt(error: object, index: int, prompts: int) -> ValueError:
    """What is wrong with one of a call's prompts."""
    return ValueError(f"prompt {index}: {error}" if prompts > 1 else str(error))
