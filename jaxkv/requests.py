"""What a user asks for and what comes back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral

import numpy as np

from jaxkv.cache.stats import CacheStats
from jaxkv.checks import check_numbers, number, shown
from jaxkv.policies import Policy
from jaxkv.policies.names import named
from jaxkv.words import BUDGETS
from models.generation_config import SamplingDefaults

GREEDY = SamplingDefaults(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
"""What choosing tokens means where neither user nor model says it."""


MOST_LIKELIEST = 20
"""Alternatives that may be asked for beside each token."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, when to stop, and what of the cache stays.

    Raises:
      ValueError: a value out of range.
    """

    max_tokens: int = 256
    temperature: float | None = None
    """0: greedy. None, here and of the next four: as the model's makers say (generation_config.json), else greedy."""
    top_k: int | None = None
    """0: all."""
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    """Logits of tokens that are in the prompt or the answer are divided by it where positive, else multiplied."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that are in the answer."""
    frequency_penalty: float = 0.0
    """Taken from them for each time that they are."""
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    """What is added to logits, by token id; a mapping, kept as pairs."""
    seed: int = 0
    n: int = 1
    """Answers to the prompt, which is read once; the i-th of them has the seed ``seed + i``."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, themselves left out; one alone, a list of them, or None, is taken too."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that do, beside the model's own."""
    ignore_eos: bool = False
    """Whether the model's own don't."""
    min_tokens: int = 0
    """Before so many nothing ends the answer."""
    logprobs: bool = False
    """Whether to return each token's log probability under the model."""
    top_logprobs: int = 0
    """So many of the likeliest tokens at each place are returned, too, with theirs."""
    compression: Policy | str | None = "default"
    """A policy or the name of one, None or ``"none"`` for the full cache, or ``"default"``: the LLM's."""
    ratio: float | None = field(default=None, compare=False, repr=False)
    """The budget of a compression that is named; it and the next two become its own, and are None afterwards."""
    max_cache_tokens: int | None = field(default=None, compare=False, repr=False)
    max_cache_bytes: int | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.logprobs, int) and not isinstance(self.logprobs, bool):
            raise ValueError(
                f"logprobs must be true or false, got {shown(self.logprobs)}; write "
                f"top_logprobs={shown(self.logprobs)} for the likeliest tokens at each place"
            )
        check_numbers(self)
        self._check_choice()
        self._check_end()
        _set(
            self,
            compression=self._compression(),
            **dict.fromkeys(BUDGETS),
            logprobs=self.logprobs or self.top_logprobs > 0,
        )

    def _check_choice(self) -> None:
        check = self._check
        check(0 <= (self.temperature or 0) <= 1e6, "temperature", "0 (greedy) or a positive number up to 1e6")
        check(0 <= (self.top_k or 0) < 2**31, "top_k", "0 (all) or positive, below 2**31")
        check(self.top_p is None or 0 < self.top_p <= 1, "top_p", "in (0, 1]")
        check(0 <= (self.min_p or 0) <= 1, "min_p", "in [0, 1]")
        check(
            self.repetition_penalty is None or 0 < self.repetition_penalty <= 1e6, "repetition_penalty", "in (0, 1e6]"
        )
        for name in ("presence_penalty", "frequency_penalty"):
            check(abs(getattr(self, name)) <= 1e6, name, "between -1e6 and 1e6")
        check(0 <= self.seed < 2**32, "seed", "in [0, 2**32)")
        check(1 <= self.n < 2**16, "n", "at least 1 and below 2**16")
        check(0 <= self.top_logprobs <= MOST_LIKELIEST, "top_logprobs", f"between 0 and {MOST_LIKELIEST}")
        bias = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias or ()
        try:
            bias = tuple(sorted((int(token), number(float(value), "logit_bias", "float")) for token, value in bias))
        except (TypeError, ValueError):
            bias = None
        finite = bias is not None and all(0 <= i < 2**31 and abs(value) < 1e30 for i, value in bias)
        check(finite, "logit_bias", "a mapping of token ids to numbers, such as {50: -100}")
        _set(self, logit_bias=bias)

    def _check_end(self) -> None:
        check = self._check
        check(self.max_tokens >= 1, "max_tokens", "at least 1")
        check(0 <= self.min_tokens <= self.max_tokens, "min_tokens", f"between 0 and max_tokens, {self.max_tokens}")
        stop = (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        stop = tuple(stop) if isinstance(stop, Iterable) else (stop,)
        check(all(isinstance(s, str) and s for s in stop), "stop", "texts, none of them empty")
        ids = (self.stop_token_ids,) if isinstance(self.stop_token_ids, int) else self.stop_token_ids or ()
        ids = tuple(ids) if isinstance(ids, Iterable) else (ids,)
        check(all(isinstance(i, Integral) and not isinstance(i, bool) for i in ids), "stop_token_ids", "token ids")
        _set(self, stop=stop, stop_token_ids=tuple(map(int, ids)))

    def _compression(self) -> Policy | str | None:
        given = {name: getattr(self, name) for name in BUDGETS}
        if isinstance(self.compression, str) and self.compression == "default":
            return named(None, given) or "default"
        return named(self.compression, given)

    def _check(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ValueError(f"{name} must be {expected}, got {shown(getattr(self, name))}")

    @property
    def penalises(self) -> bool:
        """Whether what is in the text already changes what comes next."""
        return self.repetition_penalty not in (None, 1.0) or self.presence_penalty != 0 or self.frequency_penalty != 0

    def filled(self, defaults: SamplingDefaults = GREEDY) -> SamplingParams:
        """With what isn't said by the model's defaults, and where these don't say it either, as ``GREEDY``."""
        unsaid = [each.name for each in fields(SamplingDefaults) if getattr(self, each.name) is None]
        if not unsaid:
            return self
        chosen = {name: (getattr(defaults, name), getattr(GREEDY, name)) for name in unsaid}
        return replace(self, **{name: usual if own is None else own for name, (own, usual) in chosen.items()})


def _set(record: object, **values: object) -> None:
    """Sets fields of a frozen dataclass while it is made."""
    for name, value in values.items():
        object.__setattr__(record, name, value)


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


@dataclass(frozen=True, kw_only=True, repr=False)
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
    top_logprobs: list[dict[int, float]] | None = None
    """One a token, where asked for: the likeliest tokens at its place, first the likeliest, with theirs."""
    cache: CacheStats
    """Of this sequence, after its prompt was compressed."""
    cache_at_end: CacheStats
    timings: Timings
    others: list[Completion] = field(default_factory=list)
    """The further answers to the same prompt, where ``n`` asked for several."""

    def __repr__(self) -> str:
        """A line: what it says, and what of its prompt's cache was kept."""
        more = f", {len(self.others)} others" if self.others else ""
        kept = f"{self.cache.bytes_held / 1e6:.1f} of {self.cache.bytes_full / 1e6:.1f} MB kept"
        return (
            f"Completion({shown(self.text)}, {len(self.token_ids)} tokens, {self.finish_reason!r}, prompt of "
            f"{self.prompt_tokens}, {kept}{more})"
        )

    @property
    def choices(self) -> list[Completion]:
        """All answers to the prompt."""
        return [self, *self.others]


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
    choice: int = 0
    """Which of the answers to the prompt, where ``n`` asked for several."""


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
    context: int = 0
    """Tokens that its row holds before its prompt is read: those of a context that many requests begin with."""
    choice: int = 0
    """Which of several answers to the prompt it is."""
    keeps: bool = False
    """Whether what its row holds once its prompt is compressed is kept."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", self.params.filled())  # the one way into a frozen dataclass

    @property
    def first_position(self) -> int:
        """Of the answer's first token in the text."""
        return self.context + len(self.prompt)

    @property
    def until_compressed(self) -> int:
        """Tokens that are made at most before what they added is compressed, or the answer ends."""
        every = None if self.policy is None else self.policy.compress_every
        return self.limit if every is None else min(self.limit, every)
