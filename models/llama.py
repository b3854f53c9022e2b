"""The Llama family (Llama, Mistral, Qwen2, Qwen3, SmolLM) in Flax NNX, with attention left to the caller."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from models.family import Family, NameMap
from models.interface import Attend, Split
from models.layers import Embed, Linear, RMSNorm, SwiGLU, rotate, rotation, run_layers, split_heads
from models.llama_config import GGUF_ARCHITECTURES, MODEL_TYPES, LlamaConfig

State = TypeVar("State")


class Attention(nnx.Module):
    """Grouped-query attention's projections, norms and RoPE, around the caller's ``attend``."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        linear = partial(Linear, dtype=dtype, param_dtype=dtype, rngs=rngs)
        wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.query = linear(config.hidden_size, wide, use_bias=config.attention_bias)
        self.key = linear(config.hidden_size, narrow, use_bias=config.attention_bias)
        self.value = linear(config.hidden_size, narrow, use_bias=config.attention_bias)
        self.output = linear(wide, config.hidden_size, use_bias=config.output_bias)
        norm = partial(RMSNorm, config.head_dim, eps=config.rms_norm_eps, dtype=dtype)
        self.query_norm = norm() if config.qk_norm else None
        self.key_norm = norm() if config.qk_norm else None
        self.head_dim = config.head_dim

    def __call__(
        self, x: Array, rotated_by: tuple[Array, Array], layer: int | Array, attend: Attend[State], state: State
    ) -> tuple[State, Array]:
        """Attend in one layer.

        Args:
          x: ``[batch, length, hidden]``.
          rotated_by: cosine and sine, ``f32[batch, length, 1, head_dim / 2]``.
        """
        query, key, value = (split_heads(project(x), self.head_dim) for project in (self.query, self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        state, out = attend(state, layer, rotate(query, rotated_by), rotate(key, rotated_by), value)
        return state, self.output(out.reshape(*x.shape[:2], -1))


class Layer(nnx.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        norm = partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.attention_norm = norm()
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.feed_forward_norm = norm()
        self.feed_forward = SwiGLU(config.hidden_size, config.intermediate_size, rngs=rngs, dtype=dtype)

    def __call__(
        self, x: Array, rotated_by: tuple[Array, Array], layer: int | Array, attend: Attend[State], state: State
    ) -> tuple[State, Array]:
        state, attended = self.attention(self.attention_norm(x), rotated_by, layer, attend, state)
        x = x + attended
        return state, x + self.feed_forward(self.feed_forward_norm(x))


SPLITS = {
    "embed": Split.VOCABULARY,
    "head": Split.VOCABULARY,
    "layers.attention.query": Split.OUTPUTS,
    "layers.attention.key": Split.OUTPUTS,
    "layers.attention.value": Split.OUTPUTS,
    "layers.attention.output": Split.INPUTS,
    "layers.feed_forward.gate": Split.OUTPUTS,
    "layers.feed_forward.up": Split.OUTPUTS,
    "layers.feed_forward.down": Split.INPUTS,
}
"""How devices share the weights: by heads, and by the hidden units of the feed-forward; each layer sums twice."""


class Llama(nnx.Module):
    """A ``models.interface.Rotary`` decoder. Every layer's weights are leaves of their own, until ``stack_layers``;
    kernels are ``[in, out]``.

    ``Llama(config, rngs=...)`` initialises random weights; ``models.load_model`` builds one from a checkpoint. For a
    fast step, ``nnx.split`` the model once and pass the leaves, not the module, through ``jax.jit``.
    """

    splits = SPLITS

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config = config
        self.embed = Embed(config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs)
        layers = [Layer(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)]
        self.layers: nnx.List[Layer] | Layer = nnx.List(layers)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.head = (
            None
            if config.tie_embeddings
            else Linear(
                config.hidden_size, config.vocab_size, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs
            )
        )

    @property
    def sizes(self) -> LlamaConfig:
        return self.config

    def __call__(self, tokens: Array, positions: Array, attend: Attend[State], state: State) -> tuple[State, Array]:
        """What ``models.interface.Decoder`` says."""
        rotated_by = self.rotation(0, positions)

        def step(layer: Layer, index: int | Array, state: State, x: Array) -> tuple[State, Array]:
            return layer(x, rotated_by, index, attend, state)

        state, x = run_layers(self, step, state, self.embed(tokens))
        return state, self.norm(x)

    def rotation(self, layer: int | Array, positions: Array) -> tuple[Array, Array]:
        """The same in every layer."""
        config = self.config
        return rotation(positions, head_dim=config.head_dim, theta=config.rope_theta, scaling=config.rope_scaling)

    def logits(self, hidden: Array) -> Array:
        """``f32[..., vocab]`` from ``[..., hidden]`` after the final norm."""
        return (self.embed if self.head is None else self.head).logits(hidden)


HF_NAMES = NameMap(
    model={"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
    layer_prefix="model.layers",
    layer={
        "attention_norm": "input_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.gate": "mlp.gate_proj",
        "feed_forward.up": "mlp.up_proj",
        "feed_forward.down": "mlp.down_proj",
    },
)

GGUF_NAMES = NameMap(
    model={"embed": "token_embd", "norm": "output_norm", "head": "output"},
    layer_prefix="blk",
    layer={
        "attention_norm": "attn_norm",
        "attention.query": "attn_q",
        "attention.key": "attn_k",
        "attention.value": "attn_v",
        "attention.output": "attn_output",
        "attention.query_norm": "attn_q_norm",
        "attention.key_norm": "attn_k_norm",
        "feed_forward_norm": "ffn_norm",
        "feed_forward.gate": "ffn_gate",
        "feed_forward.up": "ffn_up",
        "feed_forward.down": "ffn_down",
    },
)

FAMILY = Family(
    config_file="llama.json",
    config=LlamaConfig,
    build=Llama,
    hf_types=MODEL_TYPES,
    gguf_architectures=GGUF_ARCHITECTURES,
    gguf_interleaved=("llama",),
    config_from_hf=LlamaConfig.from_hf,
    config_from_gguf=LlamaConfig.from_gguf,
    config_from_saved=LlamaConfig.from_saved,
    hf_names=HF_NAMES,
    gguf_names=GGUF_NAMES,
)
