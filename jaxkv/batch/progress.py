"""How a batch job is going: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from jaxkv.report import megabytes, rate
from jaxkv.requests import Completion, Event, PromptRead, TextMade

MEMORY = 30.0
"""Seconds after which a speed has half forgotten what was before."""


@dataclass(kw_only=True)
class Speed:
    """Recent tokens a second of one phase."""

    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        keep = math.exp2(-seconds / MEMORY)
        self.tokens = self.tokens * keep + tokens
        self.seconds = self.seconds * keep + seconds

    def __str__(self) -> str:
        return f"{rate(round(self.tokens), self.seconds):.0f} tok/s"


class Progress:
    """Shows what the events tell.

    Args:
      total: requests of the job.
      skipped: those of them done in an earlier run.
      log_seconds: between two lines where standard error is no terminal.
      compile_seconds: what compiling has taken so far.
    """

    def __init__(
        self,
        *,
        total: int,
        skipped: int,
        log_seconds: float = 10.0,
        compile_seconds: Callable[[], float] = lambda: 0.0,
    ):
        self._compile_seconds, self._compiled_before = compile_seconds, compile_seconds()
        self._made: dict[int, int] = {}
        """Tokens of answers that aren't complete, by their requests."""
        self.total, self.done, self.skipped = total, skipped, skipped
        self.prompt_tokens = self.answer_tokens = self.held = self.full = 0
        self.prefill, self.decode = Speed(), Speed()
        self._read: dict[int, int] = {}
        self._began = self._last_event = self._last_shown = time.perf_counter()
        self._bar = None
        self._every = log_seconds
        if sys.stderr.isatty():
            self._every = 0.2
            self._bar = tqdm(total=total, initial=skipped, unit="req", file=sys.stderr, smoothing=0, dynamic_ncols=True)

    def see(self, event: Event) -> None:
        """Takes note of an event. The time since the one before it was spent on it, since all come from one loop."""
        now = time.perf_counter()
        seconds, self._last_event = now - self._last_event, now
        match event:
            case PromptRead(request=request, tokens=tokens):
                # A request that lost its place begins again at 0.
                self.prefill.add(max(tokens - self._read.get(request, 0), 0), seconds)
                self._read[request] = tokens
            case TextMade(token_ids=token_ids):
                self.decode.add(len(token_ids), seconds)
                self._made[event.request] = self._made.get(event.request, 0) + len(token_ids)
            case _:
                self._read.pop(event.request, None)
                self._made.pop(event.request, None)
        self.show()

    def answered(self, completion: Completion) -> None:
        self.prompt_tokens += completion.prompt_tokens
        self.answer_tokens += len(completion.token_ids)
        self.held += completion.cache.bytes_held
        self.full += completion.cache.bytes_full
        self.done += 1

    def failed(self) -> None:
        self.done += 1
        self.show()

    def show(self) -> None:
        """Draws the bar or writes a line, where it is time to."""
        now = time.perf_counter()
        if now - self._last_shown < self._every:
            return
        self._last_shown = now
        figures = f"prefill {self.prefill}, decode {self.decode}"
        if self.full:
            figures += f", cache held {megabytes(self.held)} of {megabytes(self.full)} so far"
        if self._bar is not None:
            self._bar.n = self.done
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.refresh()
        else:
            self.say(f"{self.done} of {self.total} requests, {figures}, {self._time_left(now)}")

    def compiling(self, program: str) -> None:
        """A program is going to be compiled, in which time nothing else happens."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"compiling {program}", refresh=True)
        else:
            self.say(f"{self.done} of {self.total} requests, compiling {program}")

    def say(self, line: str) -> None:
        """A line for people, above the bar where there is one."""
        text = f"jaxkv: {line}"
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.n = self.done
            self._bar.close()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def _time_left(self, now: float) -> str:
        left = self.seconds_left(now)
        return "time left unknown" if left is None else f"{tqdm.format_interval(left)} left"

    def seconds_left(self, now: float) -> float | None:
        """About, without compiling; answers in the making count by how long others were. None: nobody knows yet."""
        done = self.done - self.skipped
        if not done:
            return None
        usual = max(self.answer_tokens / done, 1.0)
        done += sum(min(made / usual, 1.0) for made in self._made.values())
        spent = now - self._began - (self._compile_seconds() - self._compiled_before)
        return max(spent, 0.0) / done * max(self.total - self.skipped - done, 0.0)
