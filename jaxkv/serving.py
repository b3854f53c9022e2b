"""A model with what it keeps between calls: its compiled programs, and a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxkv.arguments import Prompt, ids_of, of_prompt, one_each
from jaxkv.cache import CacheConfig, PagedCache
from jaxkv.checks import shown
from jaxkv.engine import Engine, sequence, sizing
from jaxkv.engine.costs import Costs
from jaxkv.engine.devices import Devices
from jaxkv.engine.programs import Programs
from jaxkv.engine.prompt_plan import Unservable, plan_prompt
from jaxkv.engine.sampling import Samplers
from jaxkv.engine.schedule import Latency, Schedule, Throughput
from jaxkv.engine.scheduler import Scheduler
from jaxkv.engine.temporaries import temporary_bytes
from jaxkv.policies import Policy
from jaxkv.requests import Event, Refused, Request, SamplingParams
from models import Decoder, Tokenizer
from models.generation_config import SamplingDefaults
from models.hub import cache_directory


def keep_compiled_programs() -> None:
    """Compiled programs go to the user's cache directory, so that a second run starts in seconds; unless JAX was told
    where they go, or that they don't."""
    told = jax.config.values["jax_compilation_cache_dir"] or not jax.config.values["jax_enable_compilation_cache"]
    if not told:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


class Serving:
    """Base of ``LLM``, which sets all of this and documents it."""

    model: Decoder
    devices: Devices
    tokenizer: Tokenizer | None
    sampling: SamplingDefaults
    samplers: Samplers
    compression: Policy | None
    cache_memory: int | None
    cache_dtype: DTypeLike
    block_size: int
    max_batch: int
    share_prefixes: bool
    schedule: Schedule | None
    split_prompts: bool | None
    load_seconds: float
    engine: Engine | None
    """Of the latest call."""
    _cache: tuple[CacheConfig, PagedCache] | None
    """That of the latest call which came to its end."""
    _programs: Programs | None
    on_compile: Callable[[str], None] | None = None
    """Is told when a program is going to be compiled, and which."""
    _costs: Costs
    """Of the programs, for a cache of the sizes that it has now."""

    @property
    def compile_seconds(self) -> float:
        """What compiling has taken so far."""
        return 0.0 if self._programs is None else self._programs.compile_seconds

    def _requests(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        context: int = 0,
    ) -> list[Request]:
        """Of a call's prompts, which follow so many tokens that their rows hold.

        Raises:
          ValueError: as ``_request``; it names the prompt.
        """
        each = one_each(SamplingParams() if params is None else params, len(prompts))
        requests = []
        for i, job in enumerate(zip(prompts, each, strict=True)):
            try:
                requests.append(self._request(i, *job, context=context))
            except ValueError as error:
                raise of_prompt(error, i, len(prompts)) from None
        return requests

    def _request(
        self, index: int, prompt: Prompt, params: SamplingParams, most: int | None = None, *, context: int = 0
    ) -> Request:
        """A request for these tokens, that with its answer may be at most so many.

        Raises:
          ValueError: no tokens, too many, or none of the model's; stop texts without a tokenizer.
        """
        most = self.model.sizes.max_context if most is None else most
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, one for all prompts or one each, got {shown(params)}")
        ids = ids_of(prompt, self.tokenizer, add_special=not context)
        if len(ids) == 0:
            raise ValueError("the prompt is empty; give at least one token")
        if context + len(ids) >= most:
            after = f" after {context} of what was read" if context else ""
            raise ValueError(
                f"the prompt has {len(ids)} tokens{after}, but the model's context is {most}, with at least one token "
                "for the answer; shorten it"
            )
        self._check_ids(ids, params)
        if params.n > self.max_batch:
            raise ValueError(f"n={params.n} answers are decoded together, and max_batch is {self.max_batch}; raise it")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop texts need a tokenizer, and this LLM has none")
        policy = self.compression if params.compression == "default" else params.compression
        if context or isinstance(policy, str):
            policy = None
        return Request(
            index=index,
            prompt=ids.astype(np.int32),
            params=params.filled(self.sampling),
            limit=min(params.max_tokens, most - context - len(ids)),
            policy=policy and policy.for_model(self.model.sizes),
            context=context,
        )

    def _check_ids(self, ids: np.ndarray, params: SamplingParams) -> None:
        vocab = self.model.sizes.vocab_size
        if ids.min() < 0 or ids.max() >= vocab:
            raise ValueError(f"the prompt has token ids outside 0..{vocab - 1}: {ids.min()}..{ids.max()}")
        for name, told in (("stop_token_ids", params.stop_token_ids), ("logit_bias", dict(params.logit_bias))):
            if told and not 0 <= min(told) <= max(told) < vocab:
                raise ValueError(f"{name} has token ids outside 0..{vocab - 1}: {shown(told)}")

    def _sequence(self, request: Request, config: CacheConfig) -> sequence.Sequence:
        """What is to become of a request, and with it of the other answers that it asks for."""

        def one(request: Request) -> sequence.Sequence:
            plan = plan_prompt(request, config)
            return sequence.Sequence(request, plan, self.tokenizer, self._ends(), self.load_seconds)

        params = request.params
        others = [
            replace(request, choice=i, params=replace(params, seed=(params.seed + i) % 2**32))
            for i in range(1, params.n)
        ]
        return one(request).has([one(other) for other in others])

    def _answers(
        self, requests: Sequence[Request], config: CacheConfig, held: PagedCache | None = None
    ) -> Iterator[Event]:
        """Answers all requests of a call.

        Raises:
          ValueError: one that can't be served.
        """
        sequences = [self._sequence(request, config) for request in requests]
        for i, planned in enumerate(sequences):
            if isinstance(planned.plan, Unservable):
                raise of_prompt(planned.plan.reason, i, len(requests))
        usual = Latency() if len(sequences) == 1 else Throughput()
        for event in self._serve(sequences, config, usual, held):
            if isinstance(event, Refused):
                raise of_prompt(event.error, event.request, len(requests))
            yield event

    def _serve(
        self,
        sequences: Iterable[sequence.Sequence | Refused | None],
        config: CacheConfig,
        usual: Schedule,
        held: PagedCache | None = None,
    ) -> Iterator[Event]:
        """Answers them with the cache that is left of an earlier call, or a new one, of these sizes.

        Args:
          held: a cache, given away, whose last row holds the context that all of them begin with.
        """
        programs = self._programs_now()
        if held is not None:
            yield from self._engine(programs, config, held, usual, context=True).run(sequences)
            return
        kept, self._cache = self._cache, None
        engine = self._engine(programs, config, self.devices.empty_cache(config) if kept is None else kept[1], usual)
        del kept
        yield from engine.run(sequences)
        self._cache = (config, engine.cache)  # only now: what is cut short leaves a cache that is not empty

    def _read(self, reads: sequence.Sequence, config: CacheConfig) -> Iterator[Event]:
        """Reads a sequence in a cache of its own, which goes with it."""
        cache = self.devices.empty_cache(config)
        yield from self._engine(self._programs_now(), config, cache, Latency(), apart=True).run([reads])
        self.engine = None

    def _engine(
        self,
        programs: Programs,
        config: CacheConfig,
        cache: PagedCache,
        usual: Schedule,
        *,
        context: bool = False,
        apart: bool = False,
    ) -> Engine:
        scheduler = Scheduler(
            config,
            share_prefixes=self.share_prefixes and not context,
            schedule=self.schedule or usual,
            costs=Costs() if context or apart else self._costs,
            split_prompts=self.split_prompts,
            context=context,
        )
        self.engine = Engine(programs, scheduler, cache, samplers=self.samplers)
        return self.engine

    def _programs_now(self) -> Programs:
        """The programs of the model as it is."""
        if self._programs is None or self._programs.stop_tokens != self._ends():
            self._programs = Programs(self.model, self._ends(), self.devices)
        self._programs.refresh(self.model)  # its weights may have been updated since the call before
        self._programs.on_compile = self.on_compile
        return self._programs

    def _cache_config(self, longest: int, *, rows: int) -> CacheConfig:
        """A cache for so many requests; rounded up, so that calls of like sizes share compiled programs.

        Raises:
          ValueError: a cache memory or a budget with which nothing could be served.
        """
        rows = min(self.max_batch, sizing.power_of_two(rows))
        config = None if self._cache is None else self._cache[0]
        if config is None or config.batch != rows or longest > config.max_context:
            # An old cache goes before there is a new one, and isn't memory that is taken; so does a call's cut short.
            self._cache = self.engine = None
            self._costs = Costs()
            config = self._new_config(self.compression, longest, rows)
        if self.compression is not None:
            self.compression.check(config)
        return config

    def _new_config(self, policy: Policy | None, longest: int, rows: int) -> CacheConfig:
        sizes = self.model.sizes
        counted = policy and policy.for_model(sizes)
        return sizing.cache_for(
            sizes,
            policy and policy.placement,
            rows=rows,
            max_context=sizing.rounded_up(longest),
            memory=self.cache_memory,
            block_size=self.block_size,
            dtype=self.cache_dtype,
            devices=self.devices,
            temporaries=lambda config: temporary_bytes(self._programs_now(), config, counted),
        )

    def _ends(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        known = {*self.model.sizes.eos_token_ids, *(self.tokenizer.eos_ids if self.tokenizer is not None else ())}
        return tuple(sorted(i for i in known if 0 <= i < self.model.sizes.vocab_size))  # some files say -1 for none
