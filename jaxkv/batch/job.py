"""``python -m jaxkv batch``: a file of requests, answered so that a killed job goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxkv.batch.lines import Broken, Id, Job, Place, digest, read_line
from jaxkv.batch.openai import response
from jaxkv.batch.outputs import output_for
from jaxkv.batch.progress import Progress
from jaxkv.batch.records import Done, OutputFile
from jaxkv.batch.sources import source_of
from jaxkv.checks import cut, shown_json
from jaxkv.report import rate
from jaxkv.requests import Completion, Event, Finished, Refused, SamplingParams

MOST_REASONS = 3
"""Errors that a job's last words name."""
Jobs = Iterable[tuple[str | Sequence[int], SamplingParams] | None]
"""What is to be answered; None: nothing for now."""


class Model(Protocol):
    """What a job needs of an ``LLM``."""

    on_compile: Callable[[str], None] | None

    def run(self, jobs: Jobs, *, max_context: int | None = None) -> Iterator[Event]: ...

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> Sequence[int]: ...


class BatchJob:
    """An input and its output, checked and locked; a context manager.

    Args:
      source: the input, a JSONL or a Parquet file or a directory of such; read line by line, twice.
      output: what ``outputs.output_for`` makes of it. Where that isn't the file of records, it is made of them each
        time that a job ends with nothing left to do.
      params: what a line doesn't say.
      settings: by name, what else the answers depend on; every record has it.
      retry_failed: whether lines with error records are tried again.
      output_format: ``"jaxkv"``, or ``"openai"``: answers as OpenAI's batch files have them, beside what a job goes on
        by.

    Raises:
      OSError: a file that can't be read or written.
      ValueError: files that don't belong together, or an output that another process writes.
    """

    def __init__(
        self,
        source: Path,
        output: Path | str,
        params: SamplingParams,
        settings: Mapping[str, Any] | None = None,
        *,
        retry_failed: bool = False,
        output_format: str = "jaxkv",
    ):
        self.output_format = output_format
        self.source, self.params, self.settings = source_of(source), params, dict(settings or {})
        self.wanted = output_for(output, self.source, output_format)
        self.output = OutputFile(self.wanted.records)
        try:
            self.total = self._check()
            self.torn = self.output.cut_torn_line()
            if retry_failed:
                self.output.drop_failed()
        except BaseException:
            os.close(self.output.fd)
            raise
        self.skipped = len(self.output.done)
        self.failed_before = sum(done.failed for done in self.output.done.values())
        self.answered = self.failed = 0
        self.reasons: dict[Place, str] = {}
        """Of the first lines that failed, each another one."""
        self.waiting: dict[int, Job] = {}
        """Requests that the model has, by its number of them."""

    def __enter__(self) -> BatchJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.output.close()

    @property
    def left(self) -> int:
        return self.total - self.skipped

    def finish(self) -> int:
        """Ends a job that has nothing left to do; returns the exit status, as ``run`` does.

        Raises:
          OSError: the output can't be written.
        """
        self._progress().say(self._summary(0.0))
        self.wanted.make()
        return self._status()

    def run(
        self,
        model: Model,
        *,
        max_context: int | None = None,
        heed: Callable[[Iterable[Event]], Iterable[Event]] = iter,
    ) -> int:
        """Answers what is left; returns the exit status: 0, or 1 where some line has an error record.

        Args:
          model: what answers.
          max_context: as ``LLM.run`` takes it.
          heed: passes events on; may raise between them, to stop.

        Raises:
          OSError: the output can't be written.
        """
        progress = self._progress(lambda: getattr(model, "compile_seconds", 0.0))
        model.on_compile = progress.compiling
        try:
            for event in heed(model.run(self._requests(model, progress), max_context=max_context)):
                match event:
                    case Finished(request=request, completion=completion):
                        self.output.write(self._record(self.waiting.pop(request), completion, model))
                        self.answered += 1
                        progress.answered(completion)
                    case Refused(request=request, error=error):
                        self._fail(self.waiting.pop(request).broken(error), progress)
                self.output.tick()
                progress.see(event)
            if self.waiting:
                lines = ", ".join(str(job.place) for job in list(self.waiting.values())[:5])
                raise RuntimeError(f"the model left {len(self.waiting)} requests unanswered: {lines}")
        finally:
            progress.close()
            progress.say(self._summary(progress.seconds, progress.prompt_tokens, progress.answer_tokens))
        self.wanted.make()
        return self._status()

    def _progress(self, compile_seconds: Callable[[], float] = lambda: 0.0) -> Progress:
        progress = Progress(total=self.total, skipped=self.skipped, compile_seconds=compile_seconds)
        if self.torn:
            progress.say(f"cut off the {self.torn} bytes of a record that was not written to its end")
        return progress

    def _requests(self, model: Model, progress: Progress) -> Iterator[tuple[str | Sequence[int], SamplingParams]]:
        """What the model is to answer, drawn as it has room; broken lines get their records on the way."""
        index = 0
        for job in self._lines():
            if isinstance(job, Broken):
                self._fail(job, progress)
                continue
            try:
                prompt = model.chat_prompt(job.messages) if job.messages is not None else job.prompt
            except ValueError as error:
                self._fail(job.broken(f"messages: {error}"), progress)
                continue
            assert prompt is not None
            self.waiting[index] = job
            index += 1
            yield prompt, job.params

    def _fail(self, broken: Broken, progress: Progress) -> None:
        self.output.write(self._error(broken))
        if len(self.reasons) < MOST_REASONS and broken.error not in self.reasons.values():
            self.reasons[broken.place] = broken.error
        self.failed += 1
        progress.failed()

    def _record(self, job: Job, completion: Completion, model: Model) -> dict[str, Any]:
        begins = {"id": job.id, **job.place.fields(), "digest": job.digest, "settings": self.settings}
        if self.output_format != "openai":
            return begins | _answer(completion)
        tokenizer = getattr(model, "tokenizer", None)

        def token(i: int) -> str:
            return str(i) if tokenizer is None else tokenizer.decode([i], skip_special=False)

        named, chat = str(self.settings.get("model", "jaxkv")), job.messages is not None
        return begins | response(job.id, completion, chat=chat, model=named, token=token)

    def _error(self, broken: Broken) -> dict[str, Any]:
        begins = {"id": broken.id, **broken.place.fields()}
        if self.output_format != "openai":
            return begins | {"error": broken.error}
        told = {"code": "invalid_request", "message": broken.error}
        return begins | {"custom_id": str(broken.id), "response": None, "error": told}

    def _status(self) -> int:
        return 1 if self.failed or self.failed_before else 0

    def _check(self) -> int:
        """Counts the requests, and compares those done with their lines and with the settings.

        Raises:
          ValueError: the output belongs to another input, or to other settings.
        """
        for place, done in self.output.done.items():
            if done.settings not in (None, self.settings):
                other = [n for n in {**done.settings, **self.settings} if done.settings.get(n) != self.settings.get(n)]
                now, before = (json.dumps({n: s[n] for n in other if n in s}) for s in (self.settings, done.settings))
                raise ValueError(
                    f"{self.output.path} was written with other settings: {place} with {before}, not {now}; go on "
                    "with those, or give another --output"
                )
        total, missing = 0, set(self.output.done)
        for place, data in self.source.lines():
            total += 1
            done = self.output.done.get(place)
            if done is not None:
                missing.discard(place)
                self._same(self._read(place, data), data, done)
        if missing:
            raise ValueError(
                f"{self.output.path} belongs to another input: it has a record of {min(missing)}, but "
                f"{self.source.path} has no such line; give another --output"
            )
        return total

    def _same(self, job: Job | Broken, data: bytes, done: Done) -> None:
        """Compares a line with its record; one that failed may have been mended since."""
        if done.failed:
            return
        if job.id != done.id:
            raise ValueError(
                f"{self.output.path} belongs to another input: {job.place} has id {shown_json(done.id)} there, but "
                f"{shown_json(job.id)} in {self.source.path}; give another --output"
            )
        if done.digest not in (None, digest(data)):
            raise ValueError(
                f"{job.place} of {self.source.path} is not what {self.output.path} has the answer to; put it back as "
                "it was, or give another --output"
            )

    def _lines(self) -> Iterator[Job | Broken]:
        """The lines that are left to do."""
        seen: dict[Id, Place] = {}
        for place, data in self.source.lines():
            done = self.output.done.get(place)
            job = self._read(place, data)
            first = seen.setdefault(job.id, place) if job.id is not None else place
            if done is not None:
                self._same(job, data, done)
            elif first != place and isinstance(job, Job):
                error = f"the id {shown_json(job.id)} is already that of {first}; give each line its own"
                yield job.broken(error)
            else:
                yield job

    def _read(self, place: Place, data: bytes) -> Job | Broken:
        return read_line(data, place.line, self.params, place.file)

    def _summary(self, seconds: float, prompt_tokens: int = 0, answer_tokens: int = 0) -> str:
        skipped = f"{self.skipped} skipped as already done"
        if self.failed_before:
            skipped += f" ({self.failed_before} of them failed; --retry-failed tries them again)"
        reasons = "".join(f"\n  {place}: {cut(error, 200)}" for place, error in self.reasons.items())
        reasons += f"\n  all reasons are in {self.output.path}" if reasons else ""
        return (
            f"{self.answered} answered, {self.failed} failed, {skipped}; {prompt_tokens} prompt tokens and "
            f"{answer_tokens} answer tokens in {seconds:.1f} s "
            f"({rate(prompt_tokens, seconds):.0f} and {rate(answer_tokens, seconds):.1f} tok/s){reasons}"
        )


def _answer(completion: Completion) -> dict[str, Any]:
    record = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.token_ids),
        "cache_bytes_held": completion.cache.bytes_held,
        "cache_bytes_full": completion.cache.bytes_full,
    }
    if completion.logprobs is not None:
        record["logprobs"] = completion.logprobs
    if completion.top_logprobs is not None:
        record["top_logprobs"] = completion.top_logprobs
    if completion.others:
        record["others"] = [_answer(other) for other in completion.others]
    return record
