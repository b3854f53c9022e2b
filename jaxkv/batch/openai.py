"""What lines of OpenAI's batch files may have beside what is asked for: fields that change no answer of ours."""

from __future__ import annotations

from typing import Any

from jaxkv.checks import shown_json

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
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "stream_options": (),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "top_logprobs": (0,),
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
