"""Policies by the names that command lines and job files use."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, cast

from jaxkv.checks import shown
from jaxkv.compression.budget import IN_WORDS, Budget, budget_in_words
from jaxkv.compression.policy import Policy
from jaxkv.compression.two_precisions import TwoPrecisions
from jaxkv.policies.auto import Auto
from jaxkv.policies.expected_attention import ExpectedAttention
from jaxkv.policies.gate import Gate
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
from jaxkv.words import SETTINGS
from pallas_kernels.quantised_block import Format

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
    "auto": Auto,
    "gate": Gate,
    "leankv": LeanKV,
    "mixed": partial(Mixed.over, KVCompress),
}
"""Each takes ``budget`` and its own settings by keyword."""
FIELDS_OF: dict[str, tuple[Any, ...]] = {"kv-compress-full": (KVCompress,), "mixed": (KVCompress, TwoPrecisions)}
"""Whose fields a policy's settings are, where it isn't a dataclass itself."""
UNBOUNDED = ("leankv",)
"""Those that need no budget."""
BUDGETS = IN_WORDS


def register_policy(name: str, make: Callable[..., Policy]) -> None:
    """Gives a policy a name for ``compression=``, command lines and job files, in this process.

    A package gives its own to all by an entry point of the group ``jaxkv.policies``.

    Args:
      name: must not be taken.
      make: a ``Policy`` that is a dataclass, or anything that takes ``budget`` and settings by keyword.

    Raises:
      ValueError: the name is taken, or holds a colon.
    """
    if name in POLICIES or name == "none" or ":" in name:
        raise ValueError(f"{shown(name)} can't be a policy's name: it is taken, or has a colon; take another")
    if not callable(make):
        raise ValueError(f"a policy is made by a class or a function, got {shown(make)}")
    POLICIES[name] = make


def find_policy(name: str) -> Callable[..., Policy]:
    """What makes the policy of a name: a known one, ``module:Class``, or an entry point of ``jaxkv.policies``.

    Raises:
      ValueError: there is none.
    """
    if name in POLICIES:
        return POLICIES[name]
    module, colon, attribute = name.partition(":")
    if colon:
        try:
            found = getattr(import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"no policy is at {shown(name)}: {error!s:.100}; is its module on PYTHONPATH?") from None
        if not callable(found):
            raise ValueError(f"{shown(name)} is no policy's class, but {shown(found)}")
        return cast(Callable[..., Policy], found)
    for entry in entry_points(group="jaxkv.policies", name=name):
        return entry.load()
    raise ValueError(
        f"no policy is named {shown(name)}; there are none, {', '.join(POLICIES)}, and module:Class for one of your own"
    )


def settings_of(name: str) -> dict[str, str]:
    """A policy's settings and what each is annotated with; empty where it isn't known."""
    owners = FIELDS_OF.get(name, (find_policy(name),))
    owners = [owner for owner in owners if is_dataclass(owner)]
    return {each.name: str(each.type) for owner in owners for each in fields(owner) if each.init}


def policy_from(options: Mapping[str, Any]) -> Policy | None:
    """The policy that options ask for: ``compression`` (a name), one of ``BUDGETS``, and settings; None: not given.

    With a budget alone it is KV-Compress, with neither the full cache. A ``window`` of 0 observes all queries.
    ``settings`` are a policy's own, beside those of ``SETTINGS``.

    Raises:
      ValueError: two budgets, or as ``make_policy``.
    """
    budget = budget_in_words(options)
    given = {name: options[name] for name in SETTINGS if options.get(name) is not None} | (
        options.get("settings") or {}
    )
    name = options.get("compression") or ("kv-compress" if budget is not None else "none")
    if name == "none" and given:
        raise ValueError(f"nothing is compressed, so there is no {', '.join(given)}; give a budget, such as a ratio")
    if given.get("window") == 0:
        given["window"] = None
    return make_policy(name, budget, **given)


def named(compression: Policy | str | None, budget: Mapping[str, Any]) -> Policy | None:
    """What a ``compression`` argument means: a policy, or one by its name, with one of ``BUDGETS`` beside it or none.

    With a budget alone it is KV-Compress, with neither the full cache.

    Raises:
      ValueError: neither of these, a policy that has a budget already, or as ``policy_from``.
    """
    given = {name: budget[name] for name in BUDGETS if budget.get(name) is not None}
    if isinstance(compression, str) or (compression is None and given):
        return policy_from({**given, "compression": compression})
    if compression is not None and not isinstance(compression, Policy):
        raise ValueError(
            f"compression must be a policy, its name, or None for the full cache, got {shown(compression)}; "
            'write compression="auto", ratio=8'
        )
    if compression is not None and given:
        [name] = list(given)[:1]
        raise ValueError(
            f"{compression} has a budget, {compression.budget}; leave {name} out, or give it a policy's name"
        )
    return compression


def make_policy(name: str, budget: Budget | None = None, **settings) -> Policy | None:
    """The policy of that name with this budget; None for ``none``, which keeps everything.

    Raises:
      ValueError: no such policy, a budget for ``none`` or none for another, or a setting that the policy hasn't.
    """
    if name == "none":
        if budget is not None:
            raise ValueError("policy none keeps everything; drop the budget, or name a policy")
        return None
    make = find_policy(name)
    if (said := budget_in_words(settings)) is not None:
        if budget is not None:
            raise ValueError(f"give one budget, got {budget} and {said}")
        budget, settings = said, {key: value for key, value in settings.items() if key not in BUDGETS}
    if budget is None and name in UNBOUNDED:
        budget = UNLIMITED
    if budget is None and ":" not in name:
        raise ValueError(f"policy {name} needs a budget: a ratio, tokens or bytes, such as ratio=8")
    known = settings_of(name)
    for setting in settings:
        if known and setting not in known:
            raise ValueError(f"policy {name} has no {setting}")
    formats = {key: Format.named(settings[key]) for key in ("high", "low") if isinstance(settings.get(key), str)}
    given = settings if budget is None else {"budget": budget, **settings}
    try:
        made = make(**given | formats)
    except TypeError as error:
        raise ValueError(f"policy {name} can't be made of {', '.join(given) or 'nothing'}: {error}") from None
    if not isinstance(made, Policy):
        raise ValueError(f"{name} makes {shown(made)}, which is no policy")
    return made
