"""What attention adds to the scores lands on what the heads hold, wherever its block is, and on nothing else."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.cache.raw import add_to_slots


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("is_limited", [False, True])
def test_gains_land_on_the_slots_of_what_is_held(size, is_limited):
    rng = np.random.default_rng(size)
    lengths = np.array([[3 * size, 0, 1], [size + 5, 2 * size, 7]])
    max_blocks, blocks = 5, 40
    table = rng.permutation(np.arange(1, blocks))[:30].reshape(2, 3, max_blocks).astype(np.int32)
    scores = rng.standard_normal((blocks * size // 128, 128)).astype(np.float32)
    positions = rng.integers(0, 100, scores.shape).astype(np.int32)
    gains = rng.standard_normal((2, 3, max_blocks * size)).astype(np.float32)
    last = np.array([30, 60], np.int32)

    wanted, where = scores.reshape(-1).copy(), positions.reshape(-1)
    for row in np.ndindex(lengths.shape):
        for i in range(lengths[row]):
            slot = table[row][i // size] * size + i % size
            if not is_limited or where[slot] <= last[row[0]]:
                wanted[slot] += gains[row][i]
    gains[np.arange(gains.shape[-1]) >= lengths[..., None]] = np.nan
    up_to = (jnp.asarray(positions), jnp.asarray(last)) if is_limited else None
    got = add_to_slots(*map(jnp.asarray, (scores, table, lengths, gains)), up_to)
    np.testing.assert_array_equal(np.asarray(got).reshape(-1), wanted)
