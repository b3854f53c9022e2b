"""The seam between the model and whatever holds its keys and values."""

from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp

State = TypeVar("State")


class Attend(Protocol[State]):
    """Attention as the caller supplies it to `Llama`: it stores the new keys and values where it likes, and attends."""

    def __call__(
        self, state: State, layer: int | jax.Array, query: jax.Array, key: jax.Array, value: jax.Array
    ) -> tuple[State, jax.Array]:
        """Attend in one layer.

        Args:
            state: whatever the caller threads through the layers: a cache, or None.
            layer: 0 for the first; a traced i32[] where the layers are stacked (`models.stack_layers`), which indexes
                arrays but no lists or dicts; and then `state` must keep its structure, shapes and dtypes.
            query: [batch, length, heads, head_dim], after RoPE and any qk-norm. Not yet scaled.
            key: [batch, length, kv_heads, head_dim], after RoPE and any qk-norm.
            value: [batch, length, kv_heads, head_dim]

        Returns:
            The new state, and the output, of the query's shape and dtype.
        """
        ...


def causal_attention(
    state: State, layer: int | jax.Array, query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[State, jax.Array]:
    """Dense causal attention among the tokens of this call, for training and as a baseline. Returns `state` as it came.

    Takes and returns what `Attend` says. The softmax is in float32, and its scores take
    batch * heads * length**2 * 4 bytes.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=jnp.float32) * head_dim**-0.5
    visible = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgqs,bskd->bqkgd", weights.astype(value.dtype), value)
    return state, out.reshape(query.shape).astype(query.dtype)
