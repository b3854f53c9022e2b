"""What ``paged_attention`` is given."""

from collections.abc import Callable

from jax import Array

Observe = Callable[[Array], Array]
"""Turns probabilities ``[..., group, kvs]`` into one value a KV, ``[..., kvs]``; runs inside the kernel."""
