"""Prints what a tiny model answers, for processes with settings of JAX that are to be tried; a policy of each kind."""

import json
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from jaxkv import LLM, SamplingParams, generate
from jaxkv.policies import make_policy
from jaxkv.policies.names import BUDGETS

POLICIES = {
    "kv-compress": {"compress_every": 8, "sinks": 2},
    "expected-attention": {},
    "auto": {"unquantised_window": True},
    "leankv": {},
}
PROMPTS = [tiny.prompt(150).tolist(), tiny.prompt(90, seed=1).tolist()]


def answers(name: str) -> list[list[int]]:
    """Token ids from an ``LLM``, greedy and drawn, and from the functions, given what ``jnp.array`` makes of ids."""
    policy = make_policy(name, BUDGETS["ratio"](4), **POLICIES[name])
    params = [SamplingParams(max_tokens=12), SamplingParams(max_tokens=12, temperature=0.7, top_p=0.9, top_k=50)]
    made = [answer.token_ids for answer in LLM(tiny.MODEL, compression=policy).generate(PROMPTS, params)]
    tokens, lengths = (jnp.array(np.asarray(part).tolist()) for part in tiny.padded([np.array(p) for p in PROMPTS]))
    cache = tiny.empty_cache(batch=2, layout=policy.placement.layout(tiny.CONFIG.head_dim))
    run = jax.jit(lambda cache, *prompt: generate(tiny.MODEL, cache, *prompt, max_tokens=12, policy=policy))
    return made + run(cache, tokens, lengths).tokens.tolist()


if __name__ == "__main__":
    warnings.simplefilter("error")
    print(json.dumps({name: answers(name) for name in sys.argv[1:] or POLICIES}))
