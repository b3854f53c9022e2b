"""Policies by the names that command lines and job files use."""

from collections.abc import Callable

from jaxkv.policies.base import Policy
from jaxkv.policies.budget import Budget
from jaxkv.policies.h2o import H2O
from jaxkv.policies.kv_compress import KVCompress
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
}
"""Each takes ``budget`` and its own settings by keyword."""


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
    if budget is None:
        raise ValueError(f"policy {name} needs a budget: a ratio, tokens or bytes")
    try:
        return POLICIES[name](budget=budget, **settings)
    except TypeError as error:
        raise ValueError(f"policy {name}: {error}") from None
