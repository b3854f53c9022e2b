"""What a policy of quantised tiers has to say beside what an evicting one does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxkv.cache.moves import Held
from jaxkv.cache.quantised import Tiers
from jaxkv.compression.budget import MOST, Budget
from jaxkv.compression.policy import Policy
from pallas_kernels.dispatch import block_tile
from pallas_kernels.paged_attention import Significance
from pallas_kernels.quantised_block import BlockLayout, Format

if TYPE_CHECKING:
    from jaxkv.cache.state import CacheConfig

K8V4 = Format(key_bits=8, value_bits=4)
K4V2 = Format(key_bits=4, value_bits=2)


class Goal(NamedTuple):
    """Where KVs shall live; see ``tiering.move``."""

    home: Array
    positions: Array
    """What to store as a KV's position."""
    worth: Array


class Step(NamedTuple):
    """What a decode step does to each head's tiers, ``[layers, batch, kv_heads]``."""

    lengths: Array
    """``i32[..., 2]`` afterwards."""
    new: Array
    """``i32`` index in the high tier where the new token goes."""
    lowered: Array
    """``i32`` index in the high tier of the KV that is requantised."""
    to: Array
    """``i32`` index in the low tier where that one goes; -1: none is."""


def with_formats(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a policy with the formats that they name."""
    return settings | {name: Format.named(settings[name]) for name in ("high", "low") if name in settings}


def most_blocks(budget: Budget, held: Held, tiers: Tiers, unquantised: Array | None = None) -> Array:
    """``i32[]``: quantised blocks that the sequence may hold, its table rows paid for; at least one a head.

    ``unquantised``: ``bool`` like ``held.home``, the KVs that stay so; their blocks are paid for too.
    """
    layers, _, kv_heads, width = tiers.block_table.shape
    heads, size = layers * kv_heads, tiers.layout.block_bytes
    full, tables = heads * 4 * tiers.layout.head_dim, tiers.row_bytes + held.table_bytes
    taken = 0
    if unquantised is not None:
        taken = held.block_bytes * jnp.sum(-(-unquantised.sum(-1) // held.block_size))
    fixed = budget.fixed_bytes(full)
    if fixed is None:
        blocks = jnp.floor((budget.most_bytes(held.whole, full)[0] - tables - taken) / size)
    else:  # in whole numbers: float32 may round a block up
        whole, rest = divmod(fixed - tables, size)
        blocks = max(min(whole, MOST), -heads) + (rest - taken) // size
    return jnp.clip(blocks, heads, heads * width).astype(jnp.int32)


@dataclass(frozen=True, kw_only=True)
class TierPolicy(Policy):
    """Base of policies that keep KVs at two precisions."""

    high: Format = K8V4
    low: Format = K4V2
    block_tokens: int = 64
    """KVs in a high block."""

    def layout(self, head_dim: int) -> BlockLayout:
        return BlockLayout(head_dim=head_dim, high=self.high, low=self.low, tokens=self.block_tokens, tile=block_tile())

    @property
    def unquantised_window(self) -> bool:
        """Whether ``assign`` may leave KVs unquantised (``RAW``)."""
        return False

    @property
    def quantises_decoding(self) -> bool:
        """Whether a decoded token is quantised at once (``step``) or cached unquantised."""
        return False

    @property
    def protected_tokens(self) -> int:
        """KVs that a head keeps of any text, at high precision, or unquantised where there is such a window."""
        return self.protected_window

    def check(self, config: CacheConfig) -> None:
        layout, heads, protected = self.layout(config.head_dim), config.heads, self.protected_tokens
        budget = self.budget.fixed_bytes(heads * 4 * config.head_dim)
        if budget is None:
            return
        quantised, window = max(1, -(-protected // layout.tokens)), 0
        if self.unquantised_window:
            quantised, window = 1, -(-protected // config.block_size)
        tables = config.table_bytes // config.batch
        need = tables + heads * (quantised * layout.block_bytes + window * config.block_bytes)
        if budget < need:
            raise ValueError(
                f"{self.budget} leaves a sequence {budget} bytes, but tables ({tables} bytes), a block a head and the "
                f"protected {protected} tokens take {need}; give more, or a smaller protected_window"
            )

    def assign(self, held: Held, tiers: Tiers) -> Goal:
        """Where each KV of one sequence shall live."""
        raise NotImplementedError

    def step(self, tiers: Tiers, position: Array) -> Step | None:
        """What to do with the token at ``i32[batch]`` position; None: it is cached unquantised."""
        return None

    @property
    def significance(self) -> Significance | None:
        """How decoding changes scores; None: not at all."""
        return None
