"""The seam between a model and whatever holds its keys and values: what each must be to the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

from models.errors import CheckpointError

State = TypeVar("State")
ParameterPath = tuple[str, ...]
"""Such as ``("layers", "3", "attention", "query", "kernel")``."""


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What one layer's attention does beyond a causal softmax. Static."""

    window: int | None = None
    """A query sees itself and ``window - 1`` tokens before it; None: all before it."""
    softcap: float | None = None
    """Logits become ``softcap * tanh(logits / softcap)``."""
    scale: float | None = None
    """What logits are multiplied by; None: ``head_dim**-0.5``."""

    @property
    def plain(self) -> bool:
        """Whether it is ``FULL``."""
        return self == FULL


FULL = AttentionSpec()
"""Attention to all tokens before, scaled by ``head_dim**-0.5``."""


def check_supported(specs: tuple[AttentionSpec, ...]) -> None:
    """Refuse layers that would be computed as if they were ``FULL``.

    Raises:
      CheckpointError: a layer's attention isn't plain.
    """
    for layer, spec in enumerate(specs):
        if not spec.plain:
            raise CheckpointError(
                f"layer {layer} has {spec}, expected {FULL}: windows, softcaps and scales aren't supported yet. Use "
                "another model; a scale alone can be folded into the queries, which are then multiplied by "
                "scale * head_dim**0.5."
            )


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """What a cache and an engine need to know of a decoder. A model's own config is a subclass.

    Raises:
      CheckpointError: sizes that don't belong together, or attention that isn't supported.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    """Tokens; with a sliding window at most the window: within it, full attention is the same thing."""
    eos_token_ids: tuple[int, ...] = ()
    specs: tuple[AttentionSpec, ...] = ()
    """Each layer's attention; empty: ``FULL`` in all of them."""

    def __post_init__(self) -> None:
        self._check_counts("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "max_context")
        if not 2 <= self.head_dim <= 2**16 or self.head_dim % 2:
            raise CheckpointError(
                f"head_dim is {self.head_dim}, expected an even number from 2 to 2**16. The config is damaged."
            )
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"query heads must be a multiple of KV heads, got num_heads={self.num_heads} and "
                f"num_kv_heads={self.num_kv_heads}. The config is damaged."
            )
        if len(self.specs) not in (0, self.num_layers):
            raise CheckpointError(
                f"specs has {len(self.specs)} layers' attention, expected num_layers={self.num_layers} or none. "
                "Give one a layer, or leave them out where all layers attend fully."
            )
        check_supported(self.specs)

    def _check_counts(self, *names: str) -> None:
        for name in names:
            if not 1 <= getattr(self, name) < 2**31:
                raise CheckpointError(
                    f"{name} is {getattr(self, name)}, expected 1 to 2**31 - 1. The config is damaged."
                )


class Attend(Protocol[State]):
    """Attention as the caller supplies it to a model: it stores new keys and values where it likes, and attends.

    How a layer attends isn't an argument: it is ``sizes.specs[layer]``, known before any layer runs, so that the caller
    has it while it makes its ``attend``, and an ``attend`` for plain models needs to know nothing of it.
    """

    def __call__(self, state: State, layer: int | Array, query: Array, key: Array, value: Array) -> tuple[State, Array]:
        """Attend in one layer.

        Args:
          state: whatever the caller threads through the layers: a cache, or None.
          layer: 0 for the first; a traced ``i32[]`` where the layers are stacked (``models.stack_layers``), which
            indexes arrays but no lists or dicts; and then ``state`` must keep its structure, shapes and dtypes.
          query: ``[batch, length, heads, head_dim]``, after RoPE and any qk-norm. Not yet scaled.
          key: ``[batch, length, kv_heads, head_dim]``, after RoPE and any qk-norm.
          value: ``[batch, length, kv_heads, head_dim]``.

        Returns:
          The new state, and the output, of the query's shape and dtype.
        """
        ...


@runtime_checkable
class Decoder(Protocol):
    """A decoder-only model that leaves attention to its caller, and knows nothing of caches."""

    @property
    def sizes(self) -> ModelSizes:
        """The model's own; static."""
        ...

    def __call__(self, tokens: Array, positions: Array, attend: Attend[State], state: State) -> tuple[State, Array]:
        """Run every layer, in order.

        Args:
          tokens: ``i32[batch, length]``.
          positions: ``i32[batch, length]``, each token's place in its sequence, from 0.
          attend: called once a layer; traced once for all of them where they are stacked.
          state: handed to the first layer's ``attend``, and from each layer to the next. Where the layers are stacked,
            a pytree of arrays whose shapes and dtypes stay as they are.

        Returns:
          The last layer's state, and ``[batch, length, hidden]`` after the final norm.
        """
        ...

    def logits(self, hidden: Array) -> Array:
        """``f32[..., vocab]`` from ``[..., hidden]`` after the final norm."""
        ...


@runtime_checkable
class Rotary(Decoder, Protocol):
    """A decoder with rotary positions that it can tell, for policies that move queries to other positions."""

    def rotation(self, layer: int | Array, positions: Array) -> tuple[Array, Array]:
        """By what a layer turns the queries and keys at some positions, as ``models.layers.rotate`` takes it.

        Args:
          layer: 0 for the first; may be traced.
          positions: ``i32[batch, length]``.

        Returns:
          Cosine and sine of each pair's angle, both ``f32[batch, length, 1, head_dim / 2]``.
        """
        ...


class Split(Enum):
    """How a module's matrix is split over devices, so that each runs some of the heads and hidden units."""

    OUTPUTS = auto()
    """Each device makes some of its outputs: queries, keys, values, hidden units."""
    INPUTS = auto()
    """Each device has some of its inputs, and what they make of them is summed."""
    VOCABULARY = auto()
    """As ``OUTPUTS``, which are the vocabulary's, joined for logits; whole on each device if it doesn't divide."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What a module of one device's part of a model knows of the others. Static."""

    axis: str
    """Of the mesh."""
    count: int
    """Devices."""
    split: Split

    def sum(self, part: Array) -> Array:
        """What the devices' parts make together."""
        return jax.lax.psum(part, self.axis) if self.split is Split.INPUTS else part

    def join(self, part: Array) -> Array:
        """All devices' outputs, along the last axis."""
        return jax.lax.all_gather(part, self.axis, axis=part.ndim - 1, tiled=True)


@runtime_checkable
class Shardable(Decoder, Protocol):
    """A decoder that can be split over devices by ``models.sharding.shard``: an ``nnx.Module`` of layers alike, whose
    ``Linear`` and ``Embed`` are those of ``models.layers``, which sum and join."""

    config: Any
    """Its ``sizes``; a dataclass."""
    layers: Any
    """As in ``models.layers.Layered``."""

    @property
    def splits(self) -> Mapping[str, Split]:
        """By module: ``embed`` of the model, ``layers.attention.query`` of each layer."""
        ...


def causal_attention(state: State, layer: int | Array, query: Array, key: Array, value: Array) -> tuple[State, Array]:
    """Dense causal attention among the tokens of this call, for training and as a baseline. Returns ``state`` as it
    came.

    Takes and returns what ``Attend`` says. The softmax is in float32, and its scores take
    ``batch * heads * length**2 * 4`` bytes.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=jnp.float32) * head_dim**-0.5
    visible = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgqs,bskd->bqkgd", weights.astype(value.dtype), value)
    return state, out.reshape(query.shape).astype(query.dtype)
