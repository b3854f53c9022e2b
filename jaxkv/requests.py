"""What a user asks for and what comes back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np

from jaxkv.cache.stats import CacheStats
from jaxkv.checks import check_numbers, shown
from jaxkv.policies import Policy
from models.generation_config import SamplingDefaults

GREEDY = SamplingDefaults(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
"""What choosing tokens means where neither user nor model says it."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, when to stop, and what of the cache stays.

    Raises:
      ValueError: a value out of range.
    """

    max_tokens: int = 256
    temperature: float | None = None
    """0: greedy. None, here and of the next three: as the model's makers say (generation_config.json), else greedy."""
    top_k: int | None = None
    """0: all."""
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end the answer, themselves left out; one alone, a list of them, or None, is taken too."""
    ignore_eos: bool = False
    logprobs: bool = False
    """Whether to return each token's log probability under the model."""
    compression: Policy | Literal["default"] | None = "default"
    """A policy, None for the full cache, or ``"default"``: the LLM's."""

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ValueError(f"{name} must be {expected}, got {shown(getattr(self, name))}")

        check_numbers(self)
        check(self.max_tokens >= 1, "max_tokens", "at least 1")
        check(0 <= (self.temperature or 0) <= 1e6, "temperature", "0 (greedy) or a positive number up to 1e6")
        check(0 <= (self.top_k or 0) < 2**31, "top_k", "0 (all) or positive, below 2**31")
        check(self.top_p is None or 0 < self.top_p <= 1, "top_p", "in (0, 1]")
        check(0 <= (self.min_p or 0) <= 1, "min_p", "in [0, 1]")
        check(0 <= self.seed < 2**32, "seed", "in [0, 2**32)")
        policy = self.compression
        chosen = policy is None or isinstance(policy, Policy) or (isinstance(policy, str) and policy == "default")
        check(chosen, "compression", 'a policy, None for the full cache, or "default" for the LLM\'s')
        stop = (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        stop = tuple(stop) if isinstance(stop, Iterable) else (stop,)
        check(all(isinstance(s, str) and s for s in stop), "stop", "texts, none of them empty")
        object.__setattr__(self, "stop", stop)  # the one way into a frozen dataclass

    def filled(self, defaults: SamplingDefaults = GREEDY) -> SamplingParams:
        """With what isn't said by the model's defaults, and where these don't say it either, as ``GREEDY``."""
        unsaid = [each.name for each in fields(SamplingDefaults) if getattr(self, each.name) is None]
        if not unsaid:
            return self
        chosen = {name: (getattr(defaults, name), getattr(GREEDY, name)) for name in unsaid}
        return replace(self, **{name: usual if own is None else own for name, (own, usual) in chosen.items()})


def check_unicode(text: str, name: str) -> None:
    """Raises ValueError for a text that no tokenizer can take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        lone = text[error.start]
        raise ValueError(f"{name} must be Unicode text, got half a surrogate pair {lone!a}") from None


@dataclass(kw_only=True)
class Timings:
    """Seconds of each phase. Of a batch, decoding is shared by its requests."""

    load: float = 0.0
    compile: float = 0.0
    prefill: float = 0.0
    compress: float = 0.0
    decode: float = 0.0

    def add(self, seconds: Mapping[str, float]) -> None:
        """Adds to phases, by their names."""
        for phase, more in seconds.items():
            setattr(self, phase, getattr(self, phase) + more)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """An answer."""

    text: str
    token_ids: list[int]
    """Without the token that ended it."""
    prompt_tokens: int
    finish_reason: str
    """``"stop"``: an end-of-text token or a stop text; ``"length"``: ``max_tokens`` or the context's end."""
    logprobs: list[float] | None
    """One a token, where asked for."""
    cache: CacheStats
    """Of this sequence, after its prompt was compressed."""
    cache_at_end: CacheStats
    timings: Timings


@dataclass(frozen=True, kw_only=True)
class PromptRead:
    """Event: so much of a prompt is read."""

    request: int
    tokens: int
    total: int


@dataclass(frozen=True, kw_only=True)
class TextMade:
    """Event: more of an answer."""

    request: int
    text: str
    token_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Event: an answer is complete."""

    request: int
    completion: Completion


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Event: a request can't be served; the others go on."""

    request: int
    error: str


Event = PromptRead | TextMade | Finished | Refused


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt on its way through the model."""

    index: int
    prompt: np.ndarray
    """``i32[tokens]``."""
    params: SamplingParams
    """Nothing of them is left open."""
    limit: int
    """Tokens to make at most: ``max_tokens``, or less where the context ends before."""
    policy: Policy | None
    """What compresses its cache; None: nothing."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", self.params.filled())  # the one way into a frozen dataclass

    @property
    def until_compressed(self) -> int:
        """Tokens that are made at most before what they added is compressed, or the answer ends."""
        every = None if self.policy is None else self.policy.compress_every
        return self.limit if every is None else min(self.limit, every)
