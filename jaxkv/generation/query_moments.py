"""What queries to expect after a prompt: like its own, of which mean and covariance are kept, at the next positions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import Array

from jaxkv.cache.shards import by_head
from models.interface import ModelSizes
from models.layers import rotate


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class QueryMoments:
    """Mean and scatter of each head's queries before RoPE, over those added so far."""

    count: Array
    """``f32[batch]``."""
    mean: Array = field(metadata=by_head(2))
    """``f32[layers, batch, heads, head_dim]``."""
    scatter: Array = field(metadata=by_head(2))
    """``f32[layers, batch, heads, head_dim, head_dim]``: the covariance times ``count``."""

    @classmethod
    def none(cls, sizes: ModelSizes, batch: int) -> QueryMoments:
        """Of no queries."""
        mean = jnp.zeros((sizes.num_layers, batch, sizes.num_heads, sizes.head_dim), jnp.float32)
        scatter = jnp.zeros((*mean.shape, sizes.head_dim), jnp.float32)
        return cls(count=jnp.zeros(batch, jnp.float32), mean=mean, scatter=scatter)

    def rows(self, which: Array) -> QueryMoments:
        """Of only these rows of the batch, ``i32[n]``."""
        return QueryMoments(count=self.count[which], mean=self.mean[:, which], scatter=self.scatter[:, which])

    def with_rows(self, part: QueryMoments, which: Array) -> QueryMoments:
        """Of all rows again: ``which`` of them from ``part``, the others from this one."""
        return QueryMoments(
            count=self.count.at[which].set(part.count),
            mean=self.mean.at[:, which].set(part.mean),
            scatter=self.scatter.at[:, which].set(part.scatter),
        )

    def with_layer(
        self, layer: int | Array, query: Array, rotated_by: tuple[Array, Array], real: Array
    ) -> QueryMoments:
        """With one layer's queries added, but for ``count``: ``plus`` follows when all layers are.

        Args:
          layer: index, may be traced.
          query: ``[batch, length, heads, head_dim]``, after RoPE, which is undone.
          rotated_by: cosine and sine of each position's angles, ``f32[batch, length, 1, head_dim / 2]``.
          real: ``bool[batch, length]``: which of them count.
        """
        cos, sin = rotated_by
        query = jnp.where(real[..., None, None], rotate(query.astype(jnp.float32), (cos, -sin)), 0.0)
        new = real.sum(-1, dtype=jnp.float32)[:, None, None]
        mean = query.sum(1) / jnp.maximum(new, 1.0)
        centred = jnp.where(real[..., None, None], query - mean[:, None], 0.0)
        # Two centred scatters joined: sums of squares would lose a small variance beside a large mean.
        old, step = self.count[:, None, None], mean - self.mean[layer]
        part = new / jnp.maximum(old + new, 1.0)
        scatter = jnp.einsum("bqhd,bqhe->bhde", centred, centred)
        scatter += jnp.einsum("bhd,bhe->bhde", step * old * part, step)
        return replace(self, mean=self.mean.at[layer].add(step * part), scatter=self.scatter.at[layer].add(scatter))

    def plus(self, real: Array) -> QueryMoments:
        """With ``count`` grown by ``bool[batch, length]``, those that were given to all layers."""
        return replace(self, count=self.count + real.sum(-1, dtype=jnp.float32))

    def attention(self, layer: int | Array, keys: Array, seen: Array, rotated_by: tuple[Array, Array]) -> Array:
        """What normal queries of these moments attend to, in one layer, at several positions.

        A query's logit is normal too, so its exponential is expected to be that of mean plus half the variance. The
        rotation is the mean of those positions', as in Expected Attention (arXiv 2510.00636).

        Args:
          layer: index, may be traced.
          keys: ``f32[batch, kv_heads, kvs, half]``, after RoPE; what is past ``head_dim`` doesn't count.
          seen: ``bool[batch, kv_heads, kvs]`` keys that are attended to.
          rotated_by: of those positions, ``f32[batch, positions, 1, head_dim / 2]``.

        Returns:
          ``f32[batch, kv_heads, group, kvs]``, probabilities; 0 where not seen.
        """
        head_dim = self.mean.shape[-1]
        cos, sin = (x.mean(1, keepdims=True) for x in rotated_by)
        keys = rotate(keys[..., :head_dim], (cos, -sin)) * head_dim**-0.5  # the transpose, on the other side
        heads = (*keys.shape[:2], -1, head_dim)
        covariance = self.scatter[layer] / jnp.maximum(self.count, 1.0)[:, None, None, None]
        mean = jnp.einsum("bhgd,bhkd->bhgk", self.mean[layer].reshape(heads), keys)
        spread = jnp.einsum("bhgde,bhke->bhgkd", covariance.reshape(*heads, head_dim), keys)
        variance = jnp.einsum("bhgkd,bhkd->bhgk", spread, keys)
        seen = seen[:, :, None]
        return jnp.where(seen, jax.nn.softmax(jnp.where(seen, mean + variance / 2, -jnp.inf), axis=-1), 0.0)
