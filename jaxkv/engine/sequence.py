"""A request and its answer in the making: tokens become text, stop texts cut it, and it ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from jaxkv.cache.snapshot import Snapshot
from jaxkv.cache.stats import CacheStats
from jaxkv.engine.prompt_plan import PromptPlan, Unservable
from jaxkv.requests import Completion, Finished, Request, TextMade, Timings
from models import Tokenizer


class Sequence:
    """What became of a request so far, on this side of the model.

    Args:
      request: what was asked.
      plan: how its prompt is read.
      tokenizer: None where only token ids are wanted.
      ends: the model's own tokens that end an answer, themselves left out.
      load_seconds: goes into the timings.
    """

    def __init__(
        self,
        request: Request,
        plan: PromptPlan | Unservable,
        tokenizer: Tokenizer | None = None,
        ends: Iterable[int] = (),
        load_seconds: float = 0.0,
    ):
        self.request, self.plan = request, plan
        params, own = request.params, () if request.params.ignore_eos else tuple(ends)
        self.stops_at_own = bool(own)
        """Whether the model's own tokens end it."""
        self.ends = tuple(dict.fromkeys((*own, *params.stop_token_ids)))
        self.stream = tokenizer.stream() if tokenizer is not None else None
        self.timings = Timings(load=load_seconds)
        self.siblings: list[Sequence] = []
        """Those that answer the same prompt, from what this one reads of it; each ``answers`` together with it."""
        self.answers: dict[int, Completion] = {}
        """By their choice, so far; one and the same of all siblings."""
        self.order = 0
        """Place among all that ever joined: the largest is the youngest."""
        self.pending = 0
        """The last token, not yet cached."""
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[dict[int, float]] = []
        self.replayed = 0
        """How many of them the present residency has made; the others are made again without a word."""
        self.text = ""
        """All text made, that not yet sent included."""
        self.sent = self.stop_from = 0
        """Length of the text that is out, and of that in which no stop text is looked for."""
        self.finish_reason: str | None = None
        self.cache: CacheStats | None = None
        """Of the sequence, after its prompt was compressed."""
        self.kept: Snapshot | None = None
        """What it held then, if that is wanted."""

    @property
    def index(self) -> int:
        return self.request.index

    @property
    def tokens_left(self) -> int:
        """Tokens still to make in this residency."""
        return self.request.limit - self.replayed

    @property
    def replaying(self) -> int:
        """Tokens still to make again."""
        return len(self.token_ids) - self.replayed

    @property
    def ends_here(self) -> bool:
        """Whether it may end, or its next token depend on those before, where only this side knows."""
        params = self.request.params
        return bool(params.stop or params.stop_token_ids) or params.penalises

    def begin(self, order: int) -> None:
        """A residency begins, the first or another."""
        self.order, self.replayed = order, 0

    def take(
        self, tokens: list[int], logprobs: list[float], top_logprobs: list[dict[int, float]] | None = None
    ) -> TextMade | None:
        """Takes new tokens: text, stop texts, the end. Gives what is new to the asker."""
        top_logprobs = top_logprobs or []
        again = min(self.replaying, len(tokens))
        if again:
            # Told, not drawn: they are the old ones, whatever the model would say to them in other company.
            self.replayed += again
            self.pending = self.token_ids[self.replayed - 1]
            tokens, logprobs, top_logprobs = tokens[again:], logprobs[again:], top_logprobs[again:]
        before = len(self.token_ids)
        end = next((at for at, token in enumerate(tokens) if token in self.ends), None) if self.ends else None
        stopped_by_text = False
        if end is not None:
            self.finish_reason, tokens = "stop", tokens[:end]
        if self.stream is not None:
            for at, token in enumerate(tokens, 1):
                self.text += self.stream.push(token)
                if before + at < self.request.params.min_tokens:
                    self.stop_from = len(self.text)
                elif self._cut_at_stop():
                    self.finish_reason, stopped_by_text, tokens = "stop", True, tokens[:at]
                    break
        if tokens:
            self.pending = tokens[-1]
            self.replayed += len(tokens)
            self.token_ids += tokens
            self.logprobs += logprobs[: len(tokens)]
            self.top_logprobs += top_logprobs[: len(tokens)]
        if self.finish_reason is None and self.tokens_left == 0:
            self.finish_reason = "length"
        if self.finish_reason and self.stream is not None and not stopped_by_text:
            self.text += self.stream.flush()
            self._cut_at_stop()
        ready = len(self.text) if self.finish_reason else self._safe_length()
        if len(self.token_ids) == before and ready <= self.sent:
            return None
        new = self.text[self.sent : max(ready, self.sent)]
        self.sent = max(ready, self.sent)
        return TextMade(request=self.index, text=new, token_ids=self.token_ids[before:], choice=self.request.choice)

    def has(self, siblings: list[Sequence]) -> Sequence:
        """The same, to answer together with these, which are forked from it once it has read their prompt."""
        self.siblings = siblings
        for sibling in siblings:
            sibling.answers = self.answers
        return self

    def finished(self, cache_at_end: CacheStats) -> Iterator[Finished]:
        """The event that ends it; none while others are still answering the same prompt."""
        assert self.cache is not None
        assert self.finish_reason is not None
        completion = Completion(
            text=self.text,
            token_ids=self.token_ids,
            prompt_tokens=len(self.request.prompt),
            finish_reason=self.finish_reason,
            logprobs=self.logprobs if self.request.params.logprobs else None,
            top_logprobs=self.top_logprobs if self.request.params.top_logprobs else None,
            cache=self.cache,
            cache_at_end=cache_at_end,
            timings=replace(self.timings),
        )
        self.answers[self.request.choice] = completion
        if len(self.answers) < self.request.params.n:
            return
        first, *others = (self.answers[choice] for choice in range(self.request.params.n))
        yield Finished(request=self.index, completion=replace(first, others=others))

    def _cut_at_stop(self) -> bool:
        """Cuts the text at its first stop text; True where there is one."""
        found = [at for at in (self.text.find(stop, self.stop_from) for stop in self.request.params.stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)

    def _safe_length(self) -> int:
        """How much of the text can be given out: not what may be the beginning of a stop text."""
        longest, searched = 0, self.text[self.stop_from :]
        for stop in self.request.params.stop:
            for n in range(min(len(stop) - 1, len(searched)), longest, -1):
                if searched.endswith(stop[:n]):
                    longest = n
                    break
        return len(self.text) - longest
