"""How large a cache is that nobody has said the size of."""

from __future__ import annotations

from collections.abc import Callable

from jax.typing import DTypeLike

from jaxkv.cache import CacheConfig
from jaxkv.compression.placement import Placement
from jaxkv.engine.devices import Devices
from models import ModelSizes

AMPLE = 0.75
"""Share of the memory beside which a cache leaves enough for any program."""
SAFE = 0.95
"""Share that cache and programs together may fill where nobody says: allocators leave holes."""


def rounded_up(tokens: int) -> int:
    """To 256, 384, 512, 768, 1024, …: few different sizes, none more than half too large."""
    size = 256
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def power_of_two(count: int) -> int:
    """At least so many."""
    return 1 << (max(count, 1) - 1).bit_length()


def cache_for(
    sizes: ModelSizes,
    placement: Placement | None,
    *,
    rows: int,
    max_context: int,
    memory: int | None,
    block_size: int,
    dtype: DTypeLike,
    devices: Devices,
    temporaries: Callable[[CacheConfig], int],
) -> CacheConfig:
    """Sizes of the memory that was asked for; else for whole contexts, but of no more than is usual here.

    Args:
      temporaries: bytes of the programs for such a cache; asked only where little would be left for them, since they
        must be compiled to be known.

    Raises:
      ValueError: more memory than there is, or too little for anything.
    """

    def within(memory: int | None) -> CacheConfig:
        return CacheConfig.for_model(
            sizes,
            batch=rows,
            max_context=max_context,
            memory=memory,
            block_size=block_size,
            dtype=dtype,  # pyright: ignore[reportArgumentType]
            layout=placement and placement.layout(sizes.head_dim),
            shards=devices.shards,
            prompts=1 if placement is None or placement.quantises_decoding else 2,
        )

    most, usual = devices.memory()
    config = within(memory)
    if memory is None and config.nbytes > usual:
        config = within(usual)
    check_memory(config, most)
    if config.nbytes > AMPLE * most:
        needed = temporaries(config)
        if memory is None and config.nbytes + needed > SAFE * most:
            config = within(int(SAFE * most) - needed)
        check_memory(config, most, needed)
    return config


def check_memory(config: CacheConfig, most: int, programs: int = 0) -> None:
    """Raises ValueError for a cache of more bytes than there are beside those that programs take."""
    left = max(most - programs, 0)
    if config.nbytes > left:
        beside = f" beside the {programs} that programs take" if programs else ""
        raise ValueError(
            f"a cache of {config.nbytes} bytes for {config.batch} sequences of {config.max_context} tokens is more "
            f"than the {left} that this machine can give it{beside}; give less cache_memory, a smaller "
            "max_context or max_batch"
        )
