"""The Llama family (Llama, Mistral, Qwen2, Qwen3, SmolLM) in Flax NNX, with attention left to the caller."""

from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.attention import Attend
from models.config import LlamaConfig
from models.rope import rotate, rotation

State = TypeVar("State")


class RMSNorm(nnx.Module):
    """Scale the last axis to a root mean square of one, in float32."""

    def __init__(self, size: int, *, eps: float, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones(size, dtype))  # [size]
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention's projections, norms and RoPE, around the caller's `attend`."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        linear = partial(nnx.Linear, dtype=dtype, param_dtype=dtype, rngs=rngs)
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
        self,
        x: jax.Array,  # [batch, length, hidden]
        rotated_by: tuple[jax.Array, jax.Array],  # cos and sin, f32[batch, length, 1, head_dim / 2]
        layer: int | jax.Array,
        attend: Attend[State],
        state: State,
    ) -> tuple[State, jax.Array]:
        heads = (*x.shape[:2], -1, self.head_dim)
        query, key, value = (project(x).reshape(heads) for project in (self.query, self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        state, out = attend(state, layer, rotate(query, rotated_by), rotate(key, rotated_by), value)
        return state, self.output(out.reshape(*x.shape[:2], -1))


class FeedForward(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.gate = linear(config.hidden_size, config.intermediate_size)
        self.up = linear(config.hidden_size, config.intermediate_size)
        self.down = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        norm = partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.attention_norm = norm()
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.feed_forward_norm = norm()
        self.feed_forward = FeedForward(config, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x: jax.Array,
        rotated_by: tuple[jax.Array, jax.Array],
        layer: int | jax.Array,
        attend: Attend[State],
        state: State,
    ) -> tuple[State, jax.Array]:
        state, attended = self.attention(self.attention_norm(x), rotated_by, layer, attend, state)
        x = x + attended
        return state, x + self.feed_forward(self.feed_forward_norm(x))


class Llama(nnx.Module):
    """A decoder-only transformer. Every layer's weights are leaves of their own, until `stack_layers`; kernels are
    [in, out].

    `Llama(config, rngs=...)` initialises random weights; `models.load_model` builds one from a checkpoint. For a fast
    step, `nnx.split` the model once and pass the leaves, not the module, through `jax.jit`.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs)
        layers = [Layer(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)]
        self.layers: nnx.List[Layer] | Layer = nnx.List(layers)  # one Layer once stacked, each leaf [layers, ...]
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.head = (
            None
            if config.tie_embeddings
            else nnx.Linear(
                config.hidden_size, config.vocab_size, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs
            )
        )

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, attend: Attend[State], state: State
    ) -> tuple[State, jax.Array]:
        """Run every layer, in order.

        Args:
            tokens: i32[batch, length]
            positions: i32[batch, length], each token's place in its sequence, from 0.
            attend: called once a layer; traced once for all of them where they are stacked.
            state: handed to the first layer's `attend`, and from each layer to the next. Where the layers are stacked,
                a pytree of arrays whose shapes and dtypes stay as they are.

        Returns:
            The last layer's state, and [batch, length, hidden] after the final norm.
        """
        rotated_by = self.rotation(0, positions)
        x = self.embed(tokens)
        if isinstance(self.layers, Layer):
            graph, stacked = nnx.split(self.layers)

            def step(carry: tuple[State, jax.Array], xs: Any) -> tuple[tuple[State, jax.Array], None]:
                state, x = carry
                index, weights = xs
                return nnx.merge(graph, weights)(x, rotated_by, index, attend, state), None

            (state, x), _ = jax.lax.scan(step, (state, x), (jnp.arange(self.config.num_layers), stacked))
        else:
            for index, layer in enumerate(self.layers):
                state, x = layer(x, rotated_by, index, attend, state)
        return state, self.norm(x)

    def rotation(self, layer: int | jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cosine and sine of the angles by which a layer turns queries and keys at i32[batch, length] positions."""
        config = self.config
        return rotation(positions, head_dim=config.head_dim, theta=config.rope_theta, scaling=config.rope_scaling)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """f32[..., vocab] from hidden [..., hidden] after the final norm."""
        if self.head is None:
            table = self.embed.embedding[...]
            return jnp.einsum("...h,vh->...v", hidden, table, preferred_element_type=jnp.float32)
        return jnp.einsum("...h,hv->...v", hidden, self.head.kernel[...], preferred_element_type=jnp.float32)


def stack_layers(model: Llama) -> Llama:
    """The same model, changed to run its layers by one `jax.lax.scan`: much quicker to compile, slower on CPU.

    Each of a layer's weights becomes one leaf, [layers, ...]. The layers' own weights are given up one by one, so that
    only one leaf at a time is held twice; keep no other reference to them. Leaves may be shapes without memory.
    """
    if isinstance(model.layers, Layer):
        return model
    graph = nnx.graphdef(model.layers[0])
    tree = jax.tree.structure(nnx.state(model.layers[0]))
    leaves = [jax.tree.leaves(nnx.state(layer)) for layer in model.layers]
    del model.layers
    stacked = [_stacked([layer.pop() for layer in leaves]) for _ in range(tree.num_leaves)]
    model.layers = nnx.merge(graph, jax.tree.unflatten(tree, stacked[::-1]))
    return model


def _stacked(leaves: list[Any]) -> Any:
    """[...] leaves, arrays or shapes, as one [len(leaves), ...]."""
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.eval_shape(jnp.stack, leaves)
    return jax.block_until_ready(_stack(leaves))  # waits, lest the next leaf be stacked before these are freed


_stack = jax.jit(jnp.stack)  # compiled, since op by op it copies every leaf once more
