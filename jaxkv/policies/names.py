"""Policies by the names that command lines and job files use."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp

from jaxkv.compression.budget import Budget, MaxBytes, MaxTokens, Ratio
from jaxkv.compression.policy import Policy
from jaxkv.policies.expected_attention import ExpectedAttention
from jaxkv.policies.h2o import H2O
from jaxkv.policies.keydiff import KeyDiff
from jaxkv.policies.knorm import KNorm
from jaxkv.policies.kv_compress import KVCompress
from jaxkv.policies.kvzip import KVzip
from jaxkv.policies.lean_kv import UNLIMITED, LeanKV
from jaxkv.policies.mixed import Mixed
from jaxkv.policies.snapkv import AdaKV, PyramidKV, SnapKV
from jaxkv.policies.streaming_llm import StreamingLLM
from jaxkv.policies.tova import TOVA

POLICIES: dict[str, Callable[..., Policy]] = {
    "kv-compress": KVCompress,
    "kv-compress-full": KVCompress.full,
    "snapkv": SnapKV,
    "ada-kv": AdaKV,
    "pyramidkv": PyramidKV,
    "h2o": H2O,
    "streaming-llm": StreamingLLM,
    "tova": TOVA,
    "knorm": KNorm,
    "keydiff": KeyDiff,
    "expected-attention": ExpectedAttention,
    "kvzip": KVzip,
    # What kept most, of all that docs/evaluation.md has.
    "auto": partial(Mixed.over, partial(KVzip, group=jnp.mean, protected_window=2, sinks=4)),
    "leankv": LeanKV.named,
    "mixed": partial(Mixed.over, KVCompress),
}
"""Each takes ``budget`` and its own settings by keyword."""
UNBOUNDED = ("leankv",)
"""Those that need no budget."""
BUDGETS: dict[str, Callable[[Any], Budget]] = {
    "ratio": lambda value: Ratio(ratio=value),
    "max_cache_tokens": lambda value: MaxTokens(tokens=value),
    "max_cache_bytes": lambda value: MaxBytes(size=value),
}
SETTINGS = {
    "protected_window": "a whole number",
    "sinks": "a whole number",
    "window": "a whole number",
    "compress_every": "a whole number",
    "high_threshold": "a number",
    "low_threshold": "a number",
    "high": "a text",
    "low": "a text",
    "high_share": "a number",
    "unquantised_window": "true or false",
}
"""What command lines and job files may say of a policy beside its budget."""


def policy_from(options: Mapping[str, Any]) -> Policy | None:
    """The policy that options ask for: ``compression`` (a name), one of ``BUDGETS``, and ``SETTINGS``; None: not given.

    With a budget alone it is KV-Compress, with neither the full cache. A ``window`` of 0 observes all queries.

    Raises:
      ValueError: two budgets, or as ``make_policy``.
    """
    given = {name: options[name] for name in (*BUDGETS, *SETTINGS) if options.get(name) is not None}
    budgets = [make(given.pop(name)) for name, make in BUDGETS.items() if name in given]
    if len(budgets) > 1:
        raise ValueError(f"give one of {', '.join(BUDGETS)}, got {len(budgets)}")
    name = options.get("compression") or ("kv-compress" if budgets else "none")
    if name == "none" and given:
        raise ValueError(f"nothing is compressed, so there is no {', '.join(given)}; give a budget, such as a ratio")
    if given.get("window") == 0:
        given["window"] = None
    return make_policy(name, budgets[0] if budgets else None, **given)


def make_policy(name: str, budget: Budget | None, **settings) -> Policy | None:
    """The policy of that name with this budget; None for ``none``, which keeps everything.

    Raises:
      ValueError: no such policy, a budget for ``none`` or none for another, or a setting that the policy hasn't.
    """
    if name == "none":
        if budget is not None:
            raise ValueError("policy none keeps everything; drop the budget, or name a policy")
        return None
    if name not in POLICIES:
        raise ValueError(f"no policy is named {name!r}; there are none, {', '.join(POLICIES)}")
    if budget is None and name in UNBOUNDED:
        budget = UNLIMITED
    if budget is None:
        raise ValueError(f"policy {name} needs a budget: a ratio, tokens or bytes")
    try:
        return POLICIES[name](budget=budget, **settings)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise
        raise ValueError(f"policy {name} has no {unknown[1]}") from None
