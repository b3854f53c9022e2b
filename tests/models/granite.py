"""IBM's Granite, ported against ``models.interface`` and ``models.layers`` alone, as a user would port a model.

Beside a Llama it multiplies embeddings, residuals, logits and attention's scores by numbers of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.interface import Attend, ModelSizes, State
from models.layers import RMSNorm, SwiGLU, rotate, rotation, run_layers, split_heads


@dataclass(frozen=True, kw_only=True)
class GraniteConfig(ModelSizes):
    """The shape of a ``Granite``, whose embeddings are tied."""

    intermediate_size: int
    embedding_multiplier: float
    residual_multiplier: float
    attention_multiplier: float
    """What attention's scores are multiplied by."""
    logits_divisor: float
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6


class Layer(nnx.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: GraniteConfig, *, rngs: nnx.Rngs, dtype):
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)
        norm = partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.attention_norm = norm()
        self.query = linear(config.hidden_size, wide)
        self.key = linear(config.hidden_size, narrow)
        self.value = linear(config.hidden_size, narrow)
        self.output = linear(wide, config.hidden_size)
        self.feed_forward_norm = norm()
        self.feed_forward = SwiGLU(config.hidden_size, config.intermediate_size, rngs=rngs, dtype=dtype)
        self.config = config

    def __call__(self, x, rotated_by, layer, attend: Attend[State], state: State) -> tuple[State, Array]:
        config, normed = self.config, self.attention_norm(x)
        projected = (project(normed) for project in (self.query, self.key, self.value))
        query, key, value = (split_heads(each, config.head_dim) for each in projected)
        query *= config.attention_multiplier * config.head_dim**0.5  # attend divides by the root of head_dim
        state, out = attend(state, layer, rotate(query, rotated_by), rotate(key, rotated_by), value)
        x = x + config.residual_multiplier * self.output(out.reshape(*x.shape[:2], -1))
        return state, x + config.residual_multiplier * self.feed_forward(self.feed_forward_norm(x))


class Granite(nnx.Module):
    """A ``models.interface.Rotary`` decoder; its layers may be stacked."""

    def __init__(self, config: GraniteConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)

    @property
    def sizes(self) -> GraniteConfig:
        return self.config

    def __call__(self, tokens, positions, attend: Attend[State], state: State) -> tuple[State, Array]:
        rotated_by = self.rotation(0, positions)

        def step(layer, index, state, x):
            return layer(x, rotated_by, index, attend, state)

        x = self.embed(tokens) * self.config.embedding_multiplier
        state, x = run_layers(self, step, state, x)
        return state, self.norm(x)

    def rotation(self, layer, positions) -> tuple[Array, Array]:
        return rotation(positions, head_dim=self.config.head_dim, theta=self.config.rope_theta, scaling=None)

    def logits(self, hidden) -> Array:
        table = self.embed.embedding[...]
        logits = jnp.einsum("...h,vh->...v", hidden, table, preferred_element_type=jnp.float32)
        return logits / self.config.logits_divisor


TINY_GRANITE = GraniteConfig(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_context=256,
    embedding_multiplier=12.0,
    residual_multiplier=0.22,
    attention_multiplier=0.015625,
    logits_divisor=8.0,
)
