"""Prompts in, answers out: a model, its tokenizer and a compressed cache behind one class."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxkv.arguments import (
    SAMPLING,
    Messages,
    Prompt,
    chat_prompt,
    check_model,
    conversations,
    is_one,
    params_with,
)
from jaxkv.checks import check_dtypes, number, shown
from jaxkv.context import Context, load, read
from jaxkv.dtypes import dtype_and_weights
from jaxkv.engine import sequence
from jaxkv.engine.costs import Costs
from jaxkv.engine.devices import devices_for
from jaxkv.engine.sampling import Samplers
from jaxkv.engine.schedule import Schedule, Throughput
from jaxkv.generation.sampling import Sampler
from jaxkv.policies import Policy
from jaxkv.policies.names import named
from jaxkv.requests import Completion, Event, Finished, Refused, SamplingParams, TextMade
from jaxkv.serving import Serving, keep_compiled_programs
from jaxkv.words import byte_count
from models import Decoder, Tokenizer, are_alike, load_model, load_tokenizer, resolve, stack_layers
from models.generation_config import SamplingDefaults, sampling_defaults
from pallas_kernels import default_block_size


class LLM(Serving):
    """A loaded model. Each call answers with the weights that the model has when it begins.

    A copy, also by pickling, has the same model and settings, but programs and a cache of its own.

    Args:
      model: a built-in name, a directory, a ``.gguf`` file, a name on the Hugging Face Hub (``org/name@revision``), or
        a loaded model: any ``models.Decoder`` (``docs/functional.md``).
      tokenizer: for a loaded model, of ours, of transformers or of tokenizers; without one, prompts are token
        ids and answers have no text.
      cache_memory: bytes for the whole cache; None: what the prompts of a call need uncompressed, of ``run`` as many
        whole contexts as there may be rows, but no more than the device has left beside what programs take, or half of
        the memory beside a CPU.
        A text, too: ``"500M"``, ``"2GiB"``.
      compression: a policy, or the name of one, such as ``"auto"``; None: the full cache. A prompt's ``SamplingParams``
        may say otherwise.
      ratio: the budget of a compression that is named, or of KV-Compress where none is.
      max_cache_tokens: the same in tokens a head.
      max_cache_bytes: the same in bytes a sequence.
      block_size: token slots a block; None: what suits the platform's kernels.
      max_batch: sequences that are decoded together.
      share_prefixes: whether a prefix with which several prompts begin is read once, and held once while uncompressed.
      schedule: what goes first where prompts wait while others are answered; None: ``Latency()`` for a single prompt,
        else ``Throughput()``.
      split_prompts: whether a prompt that will be compressed is read in parts where as a whole it would join others
        only later. Answers then depend on what else runs, and facts in early parts may be lost. None: where the
        policy's scores don't depend on what follows (``Scorer.settled``).
      dtype: to compute in; None: float32 on a CPU, else bfloat16.
      weights: what kernels and embeddings are held as: ``"stored"``, codes with scales where the file has them;
        ``"bfloat16"`` or ``"float32"``, which is then also ``dtype``; ``"int8"`` or ``"fp8"``, quantised as they are
        loaded, with a scale for each output. None: floats on a CPU, which is slower with codes, else stored.
      cache_dtype: of K and V in the cache; None: as ``dtype``.
      generation_config: whether a checkpoint's own sampling defaults fill what a prompt's ``SamplingParams`` leave
        open (``docs/models.md``); without them, and of a loaded model, that is greedy.
      sampler: chooses every token, instead of drawing as the prompts' ``SamplingParams`` say: a pure function of
        logits, ``f32[n, vocab]``, and positions, ``i32[n]``, that gives ``i32[n]``, or a ``Sampler``.
      logits_processor: what becomes of the logits first: a pure function of both that gives logits.
      devices: how many share the KV heads, and with them the weights and the cache (``docs/parallel.md``), or which of
        ``jax.devices()``.

    Raises:
      CheckpointError: the model can't be found or read.
      ValueError: a setting out of range, or a loaded model that lacks what one must offer.
    """

    def __init__(
        self,
        model: str | Path | Decoder,
        *,
        tokenizer: Any = None,
        cache_memory: int | str | None = None,
        compression: Policy | str | None = None,
        ratio: float | None = None,
        max_cache_tokens: int | None = None,
        max_cache_bytes: int | None = None,
        block_size: int | None = None,
        max_batch: int = 16,
        share_prefixes: bool = True,
        schedule: Schedule | None = None,
        split_prompts: bool | None = None,
        dtype: DTypeLike | None = None,
        weights: str | None = None,
        cache_dtype: DTypeLike | None = None,
        generation_config: bool = True,
        sampler: Sampler | Callable[[Array, Array], Array] | None = None,
        logits_processor: Callable[[Array, Array], Array] | None = None,
        devices: int | Sequence[Any] = 1,
    ):
        if number(max_batch, "max_batch") < 1:
            raise ValueError(f"max_batch must be at least 1, got {shown(max_batch)}")
        if schedule is not None and not isinstance(schedule, Schedule):
            raise ValueError(f"schedule must be Throughput() or Latency(), or None, got {shown(schedule)}")
        check_dtypes(dtype=dtype, cache_dtype=cache_dtype)
        keep_compiled_programs()
        budget = {"ratio": ratio, "max_cache_tokens": max_cache_tokens, "max_cache_bytes": max_cache_bytes}
        self.devices = devices_for(devices)
        policy = named(compression, budget)
        memory = byte_count(cache_memory) if isinstance(cache_memory, str) else cache_memory
        self.cache_memory = None if memory is None else number(memory, "cache_memory")
        self.dtype, held = dtype_and_weights(dtype, weights)
        self.cache_dtype = self.dtype if cache_dtype is None else jnp.dtype(cache_dtype)
        self.block_size = default_block_size() if block_size is None else number(block_size, "block_size")
        self.max_batch = number(max_batch, "max_batch")
        self.share_prefixes, self.schedule, self.split_prompts = share_prefixes, schedule, split_prompts
        began, own = time.perf_counter(), None if tokenizer is None else Tokenizer.from_hf(tokenizer)
        self.sampling = SamplingDefaults()
        """What the model's makers chose, for what a prompt's ``SamplingParams`` leave open."""
        if isinstance(model, str | Path):
            self._load(resolve(str(model)), held, own, generation_config)
        elif weights is not None:
            raise ValueError(f"weights={shown(weights)} is for a model that is yet to be loaded; give its path or name")
        else:
            self.model, self.tokenizer = check_model(model), own
        self.devices.check(self.model)
        self.load_seconds = time.perf_counter() - began
        self.compression = policy and policy.for_model(self.model.sizes)
        self.samplers = Samplers(
            vocab_size=self.model.sizes.vocab_size,
            chooses=None if sampler is None else Sampler.of(sampler),
            changes=logits_processor,
        )
        self._cache = self._programs = self.engine = None
        self._costs = Costs()

    def _load(self, path: Path, weights: str, tokenizer: Tokenizer | None, generation_config: bool) -> None:
        self.sampling = sampling_defaults(path) if generation_config else self.sampling
        mesh = self.devices.mesh_of_weights
        self.model: Decoder = load_model(path, dtype=self.dtype, weights=weights, mesh=mesh)
        self.tokenizer = tokenizer or load_tokenizer(path)
        if _compiles_stacked_layers_well() and are_alike(self.model):
            self.model = stack_layers(self.model)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": None, "_programs": None, "engine": None}  # a cache is donated, so not shared

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Answers prompts, each as if it were alone.

        Args:
          prompts: a text, token ids (a list, or an array of numpy's or JAX's), or several of either.
          params: one for all prompts, or one each.
          sampling: fields of ``SamplingParams``, over those of ``params``: ``generate("hi", max_tokens=3)``.

        Returns:
          The answers in the prompts' order.

        Raises:
          ValueError: a prompt that is none, empty, or too long for the model or the pool; a budget that can't be met.
          TypeError: ``sampling`` that ``SamplingParams`` doesn't have.
        """
        params = params_with(params, sampling, "generate")
        batch: Sequence[Prompt] = [prompts] if is_one(prompts) else prompts  # pyright: ignore[reportAssignmentType]
        done = {e.request: e.completion for e in self.events(batch, params) if isinstance(e, Finished)}
        return [done[i] for i in range(len(batch))]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **sampling: Any) -> Iterator[str]:
        """The answer to one prompt, piece by piece; only whole characters, and nothing of a stop text.

        Arguments as for ``generate``.
        """
        for event in self.events([prompt], params_with(params, sampling, "stream")):
            if isinstance(event, TextMade):
                yield event.text

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Answers a conversation, or several: ``chat([{"role": "user", "content": "hi"}], max_tokens=3)``.

        Args:
          messages: ``role`` and ``content`` each; a list of such lists: several conversations.
          params: one for all, or one each.
          tools: functions that the model may call, as JSON schemas; what it says of them is text.
          options: fields of ``SamplingParams``, and variables of the chat template, such as ``enable_thinking=False``.

        Raises:
          ValueError: as ``generate`` and ``chat_prompt``.
        """
        sampling = {name: options.pop(name) for name in SAMPLING if name in options}
        prompts = [self.chat_prompt(each, tools=tools, **options) for each in conversations(messages)]
        return self.generate(prompts, params_with(params, sampling, "chat"))

    def chat_prompt(
        self, messages: Messages, *, tools: Sequence[Mapping[str, Any]] | None = None, **options: Any
    ) -> list[int]:
        """Token ids of a conversation (``role``, ``content``) in the model's own chat format, ready for the answer.

        Arguments as for ``chat``.

        Raises:
          ValueError: there is no tokenizer or no chat template, it can't take the conversation, or it doesn't know an
            option.
        """
        return chat_prompt(self.tokenizer, messages, tools=tools, **options)

    def read(
        self,
        context: Prompt | Messages,
        *,
        compression: Policy | str | None = "default",
        ratio: float | None = None,
        max_cache_tokens: int | None = None,
        max_cache_bytes: int | None = None,
    ) -> Context:
        """Reads a text once, compresses what it leaves in the cache, and keeps that, to be asked about.

        Args:
          context: a text, token ids, or a conversation whose last message is the user's: questions go on with that.
          compression: as in ``SamplingParams``, the next three too.

        Raises:
          ValueError: a context that is empty or too long, or a budget that can't be met.
        """
        budget = {"ratio": ratio, "max_cache_tokens": max_cache_tokens, "max_cache_bytes": max_cache_bytes}
        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, compression=compression, **budget)
        return read(self, context, params)

    def load_context(self, path: str | Path) -> Context:
        """What ``Context.save`` wrote.

        Raises:
          ValueError: a file that is none, or one of another model, block size or dtype.
          OSError: it can't be read.
        """
        return load(self, Path(path))

    def events(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[Event]:
        """Everything that happens on the way from prompts to answers: progress, pieces of text, completions.

        Raises:
          ValueError: as ``generate``.
        """
        requests = self._requests(prompts, params)
        longest = max((len(r.prompt) + r.limit for r in requests), default=1)
        config = self._cache_config(longest, rows=sum(r.params.n for r in requests))
        yield from self._answers(requests, config)

    def run(
        self, jobs: Iterable[tuple[Prompt, SamplingParams] | None], *, max_context: int | None = None
    ) -> Iterator[Event]:
        """Answers jobs as they are drawn from the iterable, in any order, as many together as memory allows.

        A job that can't be served gives ``Refused``, and the others go on.

        Args:
          jobs: prompts with how to answer them; an event's ``request`` is a job's place among them. None, which has no
            place, says that there is none for now: it is asked again after what runs has gone on.
          max_context: tokens that a prompt and its answer may take together; None: the model's own.

        Raises:
          ValueError: a cache memory or a budget with which nothing could be served.
        """
        context = self.model.sizes.max_context
        most = context if max_context is None else number(max_context, "max_context")
        if not 1 < most <= context:
            raise ValueError(f"max_context must lie between 2 and the model's {context}, got {max_context}")

        config = self._cache_config(most, rows=self.max_batch)

        def sequences() -> Iterator[sequence.Sequence | Refused | None]:
            place = count()
            for job in jobs:
                yield None if job is None else made(next(place), *job)

        def made(i: int, prompt: Prompt, params: SamplingParams) -> sequence.Sequence | Refused:
            try:
                return self._sequence(self._request(i, prompt, params, most), config)
            except ValueError as error:
                return Refused(request=i, error=str(error))

        yield from self._serve(sequences(), config, Throughput())


def _compiles_stacked_layers_well() -> bool:
    """On TPUs, where 30 unrolled layers take long to compile; for v7x XLA lays stacked weights out anew every time."""
    return jax.default_backend() == "tpu" and "7x" not in jax.devices()[0].device_kind
