"""The parts that decoders share, and how to run their layers one by one or stacked."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from models.interface import Shard
from models.quantised import Quantised
from models.rope import rotate, rotation

__all__ = [
    "Embed",
    "Layered",
    "Linear",
    "RMSNorm",
    "SwiGLU",
    "are_alike",
    "is_stacked",
    "rotate",
    "rotation",
    "run_layers",
    "split_heads",
    "stack_layers",
]

State = TypeVar("State")


class RMSNorm(nnx.Module):
    """Scale the last axis to a root mean square of one, in float32."""

    def __init__(self, size: int, *, eps: float, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Linear(nnx.Linear):
    """``nnx.Linear``, whose kernel may be ``Quantised`` and is then never widened whole, or split over devices."""

    shard: Shard | None = None

    def __call__(self, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        kernel: Any = self.kernel.get_value()
        dtype = self.dtype or inputs.dtype
        if isinstance(kernel, Quantised):
            out = kernel.product(inputs.astype(dtype), dtype)
        elif self.shard is not None:
            out = jnp.dot(inputs.astype(dtype), kernel.astype(dtype))
        else:
            return super().__call__(inputs, *args, **kwargs)
        out = out if self.shard is None else self.shard.sum(out)  # before the bias, which is added once
        return out if self.bias is None else out + self.bias[...].astype(dtype)

    def logits(self, hidden: Array) -> Array:
        """``f32[..., out]``, without a bias."""
        kernel: Any = self.kernel.get_value()
        if isinstance(kernel, Quantised):
            out = kernel.product(hidden, jnp.float32)
        else:
            out = jnp.einsum("...h,hv->...v", hidden, kernel, preferred_element_type=jnp.float32)
        return out if self.shard is None else self.shard.join(out)


class Embed(nnx.Embed):
    """``nnx.Embed``, whose table may be ``Quantised`` and is then never widened whole, or split over devices."""

    shard: Shard | None = None

    def __call__(self, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        if self.shard is None:
            return self._rows(inputs)
        size = self.embedding.get_value().shape[0]
        own = inputs - jax.lax.axis_index(self.shard.axis) * size
        is_own = (own >= 0) & (own < size)
        rows = jnp.where(is_own[..., None], self._rows(jnp.where(is_own, own, 0)), 0)
        return jax.lax.psum(rows, self.shard.axis)

    def _rows(self, ids: Array) -> Array:
        table: Any = self.embedding.get_value()
        if not isinstance(table, Quantised):
            return super().__call__(ids)
        return table.rows(ids).astype(self.dtype)

    def logits(self, hidden: Array) -> Array:
        """``f32[..., vocab]``: of a model whose head is its embeddings."""
        table: Any = self.embedding.get_value()
        if isinstance(table, Quantised):
            out = table.product(hidden, jnp.float32)
        else:
            out = jnp.einsum("...h,vh->...v", hidden, table, preferred_element_type=jnp.float32)
        return out if self.shard is None else self.shard.join(out)


def split_heads(projected: Array, head_dim: int) -> Array:
    """``[..., heads * head_dim]`` of a projection as ``[..., heads, head_dim]``.

    The barrier keeps what follows from saying how the projection's weights lie. Without it a TPU's compiler lays those
    of all stacked layers out anew before a loop of decode steps, beside the old ones: 1.5 GiB of Llama 3.1 8B.
    """
    return jax.lax.optimization_barrier(projected).reshape(*projected.shape[:-1], -1, head_dim)


class SwiGLU(nnx.Module):
    """The feed-forward ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        linear = partial(Linear, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.gate = linear(hidden_size, intermediate_size)
        self.up = linear(hidden_size, intermediate_size)
        self.down = linear(intermediate_size, hidden_size)

    def __call__(self, x: Array) -> Array:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Layered(Protocol):
    """A model whose layers have weights of the same names and shapes."""

    layers: Any
    """An ``nnx.List`` of modules, or one module once stacked, each leaf ``[layers, ...]``."""


Model = TypeVar("Model", bound=Layered)


def is_stacked(model: Layered) -> bool:
    """Whether ``stack_layers`` has been there."""
    return not isinstance(model.layers, nnx.List)


def are_alike(model: Layered) -> bool:
    """Whether every layer's weights are in the same format, without which ``stack_layers`` can't stack them."""

    def kinds(layer: Any) -> Any:
        leaves, tree = jax.tree.flatten(nnx.state(layer))
        return tree, [(leaf.shape, leaf.dtype) for leaf in leaves]

    return is_stacked(model) or all(kinds(layer) == kinds(model.layers[0]) for layer in model.layers)


def run_layers(
    model: Layered,
    step: Callable[[Any, int | Array, State, Array], tuple[State, Array]],
    state: State,
    x: Array,
) -> tuple[State, Array]:
    """Run every layer in order, by one scan where they are stacked.

    Args:
      step: ``step(layer, index, state, x) -> (state, x)``; traced once, with a traced index, where they are stacked.
      state: handed to the first layer, and from each layer to the next.
      x: like ``state``.
    """
    if not is_stacked(model):
        for index, layer in enumerate(model.layers):
            state, x = step(layer, index, state, x)
        return state, x
    graph, weights = nnx.split(model.layers)
    count = jax.tree.leaves(weights)[0].shape[0]

    def scanned(carry: tuple[State, Array], xs: Any) -> tuple[tuple[State, Array], None]:
        index, weights = xs
        return step(nnx.merge(graph, weights), index, *carry), None

    carry, _ = jax.lax.scan(scanned, (state, x), (jnp.arange(count), weights))
    return carry


def stack_layers(model: Model) -> Model:
    """The same model, changed to run its layers by one ``jax.lax.scan``: much quicker to compile, slower on CPU.

    Each of a layer's weights becomes one leaf, ``[layers, ...]``. The layers' own weights are given up one by one, so
    that only one leaf at a time is held twice; keep no other reference to them. Leaves may be shapes without memory.

    Raises:
      ValueError: the layers aren't alike: a file may hold some of them in another format.
    """
    if is_stacked(model):
        return model
    if not are_alike(model):
        raise ValueError(
            "the layers' weights have different formats or shapes, expected the same in all of them. Run them one by "
            "one, or load the model with weights='int8', 'fp8', 'bfloat16' or 'float32'."
        )
    graph = nnx.graphdef(model.layers[0])
    tree = jax.tree.structure(nnx.state(model.layers[0]))
    leaves = [jax.tree.leaves(nnx.state(layer)) for layer in model.layers]
    del model.layers
    stacked = [_stacked([layer.pop() for layer in leaves]) for _ in range(tree.num_leaves)]
    model.layers = nnx.merge(graph, jax.tree.unflatten(tree, stacked[::-1]))
    return model


def _stacked(leaves: list[Any]) -> Any:
    """``[...]`` leaves, arrays or shapes, as one ``[len(leaves), ...]``."""
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.eval_shape(jnp.stack, leaves)
    # Waits, lest the next leaf be stacked before these are freed.
    return jax.block_until_ready(_stack(getattr(leaves[0], "sharding", None))(leaves))


@cache
def _stack(place: jax.sharding.Sharding | None) -> Callable[[list[Array]], Array]:
    """Compiled, since op by op it copies every leaf once more; leaves that are split over devices stay so."""
    if not isinstance(place, NamedSharding):
        return jax.jit(jnp.stack)
    return jax.jit(jnp.stack, out_shardings=NamedSharding(place.mesh, PartitionSpec(None, *place.spec)))
