"""What an engine's programs need of a device beside the weights and the cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.cache import CacheConfig, init_cache
from jaxkv.engine.programs import Programs
from jaxkv.engine.reading import MOST_TOGETHER
from jaxkv.engine.schedule import STEPS
from jaxkv.generation.prefill import CHUNK
from jaxkv.generation.prompt import observation_of
from jaxkv.generation.sampling import Greedy
from jaxkv.policies import Policy


def temporary_bytes(programs: Programs, config: CacheConfig, policy: Policy | None) -> int:
    """Bytes of the largest, over all devices: those that a long prompt and a full batch run are compiled for such a
    cache, which needn't be there, and stay compiled."""
    cache: Any = jax.eval_shape(partial(init_cache, config))
    one, batch = _ints(1), _ints(config.batch)
    state = programs.start(cache, one, one, policy, fresh=True)
    programs.chunk(cache, state, one, _ints(1, CHUNK), one, policy, None)
    if policy is not None:
        if observation_of(policy).rereads:
            programs.reread(cache, state, one, _ints(1, CHUNK), one, policy, None)
        for prompts in {1, min(MOST_TOGETHER, config.batch)}:
            programs.compress_rows(cache, _ints(prompts), _ints(prompts), policy, _bools(prompts))
    programs.finish(cache, state, one, Greedy(), policy)
    acts = policy if policy is not None and policy.acts_in_decoding else None
    programs.decode(cache, batch, batch, Greedy(), STEPS, acts, None, _bools(config.batch))
    return programs.temporary_bytes * programs.devices.shards.count


def _ints(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _bools(count: int) -> Any:
    return jax.ShapeDtypeStruct((count,), jnp.bool_)
