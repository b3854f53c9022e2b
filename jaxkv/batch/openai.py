"""OpenAI's batch files: what their lines may have beside what is asked for, and answers as theirs have them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from jaxkv.checks import shown_json
from jaxkv.requests import Completion

UNUSED = (
    "model",
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
"""Of accounts and servers: they may be anything. The job has one model."""
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "stream": (False,),
    "stream_options": (),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
}
"""Values at which a field means what we do."""
ANSWERED = ("refusal", "audio", "annotations", "function_call", "tool_calls")
"""Fields of messages that are OpenAI's own answers; they must be empty."""


def check_without_effect(body: dict[str, Any]) -> None:
    """Raises ValueError where a field would change the answer."""
    for name, allowed in WITHOUT_EFFECT.items():
        value = body.get(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in allowed):
            expected = " or ".join(shown_json(one) for one in allowed if type(one) is not float)
            instead = f"must be {expected}" if expected else "isn't supported"
            raise ValueError(f"body.{name} {instead}, got {shown_json(value)}; leave it out")


def response(
    name: Any, completion: Completion, *, chat: bool, model: str, token: Callable[[int], str]
) -> dict[str, Any]:
    """What a record has of an answer in OpenAI's form.

    Args:
      name: the line's.
      completion: the answer.
      chat: whether it was asked by messages.
      model: what to call the model.
      token: the text of a token.
    """
    made = sum(len(choice.token_ids) for choice in completion.choices)
    usage = {"prompt_tokens": completion.prompt_tokens, "completion_tokens": made}
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(i, one, chat, token) for i, one in enumerate(completion.choices)],
        "usage": usage | {"total_tokens": completion.prompt_tokens + made},
    }
    answer = {"status_code": 200, "request_id": str(name), "body": body}
    return {"custom_id": str(name), "response": answer, "error": None}


def _choice(index: int, one: Completion, chat: bool, token: Callable[[int], str]) -> dict[str, Any]:
    said: dict[str, Any] = {"message": {"role": "assistant", "content": one.text}} if chat else {"text": one.text}
    tops = one.top_logprobs or [{}] * len(one.token_ids)
    logprobs: dict[str, Any] | None = None
    if one.logprobs is not None and chat:
        each = zip(one.token_ids, one.logprobs, tops, strict=True)
        logprobs = {
            "content": [
                _told(i, p, token) | {"top_logprobs": [_told(*pair, token) for pair in top.items()]}
                for i, p, top in each
            ]
        }
    elif one.logprobs is not None:
        likeliest = [{token(i): p for i, p in top.items()} for top in tops]
        logprobs = {
            "tokens": [token(i) for i in one.token_ids],
            "token_logprobs": one.logprobs,
            "top_logprobs": likeliest if one.top_logprobs else None,
        }
    return {"index": index, **said, "logprobs": logprobs, "finish_reason": one.finish_reason}


def _told(i: int, logprob: float, token: Callable[[int], str]) -> dict[str, Any]:
    text = token(i)
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
