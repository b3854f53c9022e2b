"""Prompts in, answers out: a model, its tokenizer and a compressed cache behind one class."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxkv.cache import CacheConfig, PagedCache
from jaxkv.checks import check_dtype, number, shown
from jaxkv.dtypes import dtype_and_weights
from jaxkv.engine import Engine, sequence
from jaxkv.engine.costs import Costs
from jaxkv.engine.devices import devices_for
from jaxkv.engine.programs import Programs
from jaxkv.engine.prompt_plan import Unservable, plan_prompt
from jaxkv.engine.schedule import Latency, Schedule, Throughput
from jaxkv.policies import Policy
from jaxkv.requests import Completion, Event, Finished, Refused, Request, SamplingParams, TextMade, check_unicode
from models import Decoder, Tokenizer, are_alike, load_model, load_tokenizer, resolve, stack_layers
from models.generation_config import SamplingDefaults, sampling_defaults
from pallas_kernels import default_block_size

Prompt = str | Sequence[int]


class LLM:
    """A loaded model. Each call answers with the weights that the model has when it begins.

    A copy, also by pickling, has the same model and settings, but programs and a cache of its own.

    Args:
      model: a built-in name, a directory, a ``.gguf`` file, a name on the Hugging Face Hub (``org/name@revision``), or
        a loaded model: any ``models.Decoder`` (``docs/functional.md``).
      tokenizer: for a loaded model; without one, prompts are token ids and answers have no text.
      cache_memory: bytes for the whole cache; None: what the prompts of a call need uncompressed, of ``run`` as many
        whole contexts as there may be rows, but no more than the device has left, or half of the memory beside a CPU.
      compression: a policy, or None for the full cache; a prompt's ``SamplingParams`` may say otherwise.
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
        tokenizer: Tokenizer | None = None,
        cache_memory: int | None = None,
        compression: Policy | None = None,
        block_size: int | None = None,
        max_batch: int = 16,
        share_prefixes: bool = True,
        schedule: Schedule | None = None,
        split_prompts: bool | None = None,
        dtype: DTypeLike | None = None,
        weights: str | None = None,
        cache_dtype: DTypeLike | None = None,
        generation_config: bool = True,
        devices: int | Sequence[Any] = 1,
    ):
        if number(max_batch, "max_batch") < 1:
            raise ValueError(f"max_batch must be at least 1, got {shown(max_batch)}")
        if compression is not None and not isinstance(compression, Policy):
            raise ValueError(f"compression must be a policy, or None for the full cache, got {shown(compression)}")
        if schedule is not None and not isinstance(schedule, Schedule):
            raise ValueError(f"schedule must be Throughput() or Latency(), or None, got {shown(schedule)}")
        for value, name in ((dtype, "dtype"), (cache_dtype, "cache_dtype")):
            if value is not None:
                check_dtype(value, name)
        self.devices = devices_for(devices)
        began = time.perf_counter()
        self.sampling = SamplingDefaults()
        """What the model's makers chose, for what a prompt's ``SamplingParams`` leave open."""
        self.dtype, held = dtype_and_weights(dtype, weights)
        self.cache_dtype = self.dtype if cache_dtype is None else jnp.dtype(cache_dtype)
        if isinstance(model, str | Path):
            path = resolve(str(model))
            self.sampling = sampling_defaults(path) if generation_config else self.sampling
            self.model = load_model(path, dtype=self.dtype, weights=held, mesh=self.devices.mesh_of_weights)
            self.tokenizer = tokenizer or load_tokenizer(path)
            if _compiles_stacked_layers_well() and are_alike(self.model):
                self.model = stack_layers(self.model)
        elif weights is not None:
            raise ValueError(f"weights={shown(weights)} is for a model that is yet to be loaded; give its path or name")
        else:
            self.model, self.tokenizer = _checked(model), tokenizer
        self.devices.check(self.model)
        self.load_seconds = time.perf_counter() - began
        self.cache_memory = None if cache_memory is None else number(cache_memory, "cache_memory")
        self.compression = compression and compression.for_model(self.model.sizes)
        self.block_size = default_block_size() if block_size is None else number(block_size, "block_size")
        self.max_batch = number(max_batch, "max_batch")
        self.share_prefixes, self.schedule, self.split_prompts = share_prefixes, schedule, split_prompts
        self._cache: tuple[CacheConfig, PagedCache] | None = None
        """That of the latest call which came to its end."""
        self._programs: Programs | None = None
        self._costs = Costs()
        """Of the programs, for a cache of the sizes that it has now."""
        self.engine: Engine | None = None
        """Of the latest call."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": None, "_programs": None, "engine": None}  # a cache is donated, so not shared

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Answers prompts, each as if it were alone.

        Args:
          prompts: a text, token ids (a list, or an array of numpy's or JAX's), or several of either.
          params: one for all prompts, or one each.

        Returns:
          The answers in the prompts' order.

        Raises:
          ValueError: a prompt that is none, empty, or too long for the model or the pool; a budget that can't be met.
        """
        batch: Sequence[Prompt] = [prompts] if _is_one(prompts) else prompts  # pyright: ignore[reportAssignmentType]
        done = {e.request: e.completion for e in self.events(batch, params) if isinstance(e, Finished)}
        return [done[i] for i in range(len(batch))]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The answer to one prompt, piece by piece; only whole characters, and nothing of a stop text."""
        for event in self.events([prompt], params):
            if isinstance(event, TextMade):
                yield event.text

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation (``role``, ``content``) in the model's own chat format, ready for the answer.

        Raises:
          ValueError: there is no tokenizer or no chat template, or it can't take the conversation.
        """
        if self.tokenizer is None:
            raise ValueError("this LLM has no tokenizer, so it has no chat format; give prompts as token ids")
        return self.tokenizer.encode_chat(self.tokenizer.chat(messages))

    def events(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[Event]:
        """Everything that happens on the way from prompts to answers: progress, pieces of text, completions.

        Raises:
          ValueError: as ``generate``.
        """
        each = _one_each(SamplingParams() if params is None else params, len(prompts))
        requests = []
        for i, job in enumerate(zip(prompts, each, strict=True)):
            try:
                requests.append(self._request(i, *job))
            except ValueError as error:
                raise _of_prompt(error, i, len(prompts)) from None
        longest = max((len(r.prompt) + r.limit for r in requests), default=1)
        config = self._cache_config(longest, rows=len(requests))
        sequences = [self._sequence(request, config) for request in requests]
        for i, planned in enumerate(sequences):
            if isinstance(planned.plan, Unservable):
                raise _of_prompt(planned.plan.reason, i, len(prompts))
        usual = Latency() if len(sequences) == 1 else Throughput()
        for event in self._serve(sequences, config, usual):
            if isinstance(event, Refused):
                raise _of_prompt(event.error, event.request, len(prompts))
            yield event

    def run(self, jobs: Iterable[tuple[Prompt, SamplingParams]], *, max_context: int | None = None) -> Iterator[Event]:
        """Answers jobs as they are drawn from the iterable, in any order, as many together as memory allows.

        A job that can't be served gives ``Refused``, and the others go on.

        Args:
          jobs: prompts with how to answer them; an event's ``request`` is a job's place among them.
          max_context: tokens that a prompt and its answer may take together; None: the model's own.

        Raises:
          ValueError: a cache memory or a budget with which nothing could be served.
        """
        context = self.model.sizes.max_context
        most = context if max_context is None else number(max_context, "max_context")
        if not 1 < most <= context:
            raise ValueError(f"max_context must lie between 2 and the model's {context}, got {max_context}")

        config = self._cache_config(most, rows=self.max_batch)

        def sequences() -> Iterator[sequence.Sequence | Refused]:
            for i, (prompt, params) in enumerate(jobs):
                try:
                    made = self._sequence(self._request(i, prompt, params, most), config)
                except ValueError as error:
                    yield Refused(request=i, error=str(error))
                else:
                    yield made

        yield from self._serve(sequences(), config, Throughput())

    def _serve(
        self, sequences: Iterable[sequence.Sequence | Refused], config: CacheConfig, usual: Schedule
    ) -> Iterator[Event]:
        """Answers them with the cache that is left of an earlier call, or a new one, of these sizes."""
        if self._programs is None or self._programs.stop_tokens != self._ends():
            self._programs = Programs(self.model, self._ends(), self.devices)
        self._programs.refresh(self.model)  # its weights may have been updated since the call before
        kept, self._cache = self._cache, None
        cache = self.devices.empty_cache(config) if kept is None else kept[1]
        self.engine = engine = Engine(
            self._programs,
            config,
            cache,
            share_prefixes=self.share_prefixes,
            schedule=self.schedule or usual,
            costs=self._costs,
            split_prompts=self.split_prompts,
        )
        del kept, cache
        yield from engine.run(sequences)
        self._cache = (config, engine.cache)  # only now: what is cut short leaves a cache that is not empty

    def _sequence(self, request: Request, config: CacheConfig) -> sequence.Sequence:
        plan = plan_prompt(request, config)
        return sequence.Sequence(request, plan, self.tokenizer, self._ends(), self.load_seconds)

    def _request(self, index: int, prompt: Prompt, params: SamplingParams, context: int | None = None) -> Request:
        """A request for these tokens.

        Raises:
          ValueError: no tokens, too many, or none of the model's; stop texts without a tokenizer.
        """
        context = self.model.sizes.max_context if context is None else context
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, one for all prompts or one each, got {shown(params)}")
        ids = self._encode(prompt)
        if len(ids) == 0:
            raise ValueError("the prompt is empty; give at least one token")
        if len(ids) >= context:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, but the model's context is {context}, with at least one token "
                "for the answer; shorten it"
            )
        vocab = self.model.sizes.vocab_size
        if ids.min() < 0 or ids.max() >= vocab:
            raise ValueError(f"the prompt has token ids outside 0..{vocab - 1}: {ids.min()}..{ids.max()}")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop texts need a tokenizer, and this LLM has none")
        limit = min(params.max_tokens, context - len(ids))
        policy = self.compression if params.compression == "default" else params.compression
        policy = policy and policy.for_model(self.model.sizes)
        params = params.filled(self.sampling)
        return Request(index=index, prompt=ids.astype(np.int32), params=params, limit=limit, policy=policy)

    def _encode(self, prompt: Prompt) -> np.ndarray:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this LLM has no tokenizer; give prompts as token ids")
            check_unicode(prompt, "the prompt")
            prompt = self.tokenizer.encode(prompt)
        try:
            ids = np.asarray(prompt)
        except ValueError:  # lists of unequal lengths
            ids = np.asarray(None)
        if ids.ndim != 1 or ids.dtype == object:
            raise ValueError(f"a prompt must be a text or a list of token ids, got {shown(prompt)}")
        if len(ids) and not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"token ids must be whole numbers, got {ids.dtype}: {ids[:4].tolist()}")
        return ids

    def _cache_config(self, longest: int, *, rows: int) -> CacheConfig:
        """A cache for so many requests; rounded up, so that calls of like sizes share compiled programs.

        Raises:
          ValueError: a cache memory or a budget with which nothing could be served.
        """
        rows = min(self.max_batch, 1 << (max(rows, 1) - 1).bit_length())
        config = None if self._cache is None else self._cache[0]
        if config is None or config.batch != rows or longest > config.max_context:
            # An old cache goes before there is a new one, and isn't memory that is taken; so does a call's cut short.
            self._cache = self.engine = None
            self._costs = Costs()
            config = self._new_config(rows, _rounded_up(longest))
        if self.compression is not None:
            self.compression.check(config)
        return config

    def _new_config(self, rows: int, max_context: int) -> CacheConfig:
        """Of the memory that was asked for; else for whole contexts, but of no more than is usual here."""

        placement = self.compression and self.compression.placement

        def within(memory: int | None) -> CacheConfig:
            return CacheConfig.for_model(
                self.model.sizes,
                batch=rows,
                max_context=max_context,
                memory=memory,
                block_size=self.block_size,
                dtype=self.cache_dtype,
                layout=placement and placement.layout(self.model.sizes.head_dim),
                prompts=1 if placement is None or placement.quantises_decoding else 2,
                shards=self.devices.shards,
            )

        most, usual = self.devices.memory()
        config = within(self.cache_memory)
        if self.cache_memory is None and config.nbytes > usual:
            config = within(usual)
        if (need := config.nbytes) > most:
            raise ValueError(
                f"a cache of {need} bytes for {rows} sequences of {config.max_context} tokens is more than the "
                f"{most} that this machine can give it; give less cache_memory, a smaller max_context or max_batch"
            )
        return config

    def _ends(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        known = {*self.model.sizes.eos_token_ids, *(self.tokenizer.eos_ids if self.tokenizer is not None else ())}
        return tuple(sorted(i for i in known if 0 <= i < self.model.sizes.vocab_size))  # some files say -1 for none


def _checked(model: Decoder) -> Decoder:
    """The model, if it is one."""
    if lacking := [name for name in ("sizes", "logits", "__call__") if not hasattr(model, name)]:
        raise ValueError(
            "expected a models.Decoder: sizes, logits and a call that takes tokens, positions, attend and state, got a "
            f"{type(model).__name__} without {', '.join(lacking)}"
        )
    return model


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
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
    return len(prompts) > 0 and not isinstance(prompts[0], str | Sequence) and np.ndim(prompts[0]) == 0


def _one_each(params: SamplingParams | Sequence[SamplingParams], prompts: int) -> list[SamplingParams]:
    """The params of each of so many prompts."""
    if isinstance(params, SamplingParams):
        return [params] * prompts
    each: list[SamplingParams] = list(params) if isinstance(params, Sequence) else [params]
    if len(each) != prompts:
        raise ValueError(f"give one SamplingParams, or one a prompt: {prompts} prompts, {len(each)} params")
    return each


def _of_prompt(error: object, index: int, prompts: int) -> ValueError:
    """What is wrong with one of a call's prompts."""
    return ValueError(f"prompt {index}: {error}" if prompts > 1 else str(error))


def _rounded_up(tokens: int) -> int:
    """To 256, 384, 512, 768, 1024, …: few different sizes, none more than half too large."""
    size = 256
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _compiles_stacked_layers_well() -> bool:
    """On TPUs, where 30 unrolled layers take long to compile; for v7x XLA lays stacked weights out anew every time."""
    return jax.default_backend() == "tpu" and "7x" not in jax.devices()[0].device_kind
