"""Which implementation a call takes, on platforms that aren't here; and that no fallback is silent."""

import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import default_block_size, dispatch, padded_head_dim, use_implementation
from pallas_kernels.block_writes import write_blocks
from pallas_kernels.paged_attention import RawKVs, paged_attention


@pytest.fixture
def on(monkeypatch):
    """Makes the default device look like another."""
    dispatch.say_once.cache_clear()

    def pretend(platform, capability=None, kind=""):
        device = SimpleNamespace(device_kind=kind, **({"compute_capability": capability} if capability else {}))
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        monkeypatch.setattr(jax, "devices", lambda: [device])

    yield pretend
    dispatch.say_once.cache_clear()


@pytest.mark.parametrize(
    ("device", "implementation", "head_dim", "block_size"),
    [
        (("cpu",), "xla", 96, 16),
        (("tpu",), "mosaic_tpu", 128, 64),
        (("gpu", "9.0", "NVIDIA H200"), "mosaic_gpu", 128, 16),
        (("gpu", "9.0a", "NVIDIA GH200 480GB"), "mosaic_gpu", 128, 16),
    ],
)
def test_each_platform_has_its_own(on, device, implementation, head_dim, block_size):
    on(*device)
    assert dispatch.choose(None) == (implementation, False, True)
    assert padded_head_dim(96) == head_dim
    assert default_block_size() == block_size


def test_heads_wider_than_a_gpus_kernels_take_are_not_padded(on):
    on("gpu", "9.0")
    assert [padded_head_dim(n) for n in (16, 64, 80, 128, 192)] == [64, 64, 128, 128, 192]


@pytest.mark.parametrize(
    "device",
    [
        ("gpu", "8.0", "NVIDIA A100"),
        ("gpu", "10.0", "NVIDIA B200"),
        ("gpu", "12.0", "NVIDIA GeForce RTX 5090"),
        ("gpu", "gfx942", "AMD Instinct MI300X"),
        ("gpu", "gfx90a", "AMD Instinct MI250X"),
        ("gpu", None, "some other GPU"),
    ],
)
def test_other_gpus_run_the_reference_and_say_so_once(on, device):
    on(*device)
    with pytest.warns(UserWarning, match=f"{device[2]} is no NVIDIA Hopper GPU"):
        assert dispatch.choose(None).implementation == "xla"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose(None).implementation == "xla"
    assert dispatch.choose("mosaic_gpu") == ("mosaic_gpu", False, False)


def test_a_block_names_an_implementation_for_all_calls_but_those_that_name_another():
    with use_implementation("mosaic_tpu", interpret=True):
        assert dispatch.choose(None) == ("mosaic_tpu", True, False)
        assert dispatch.choose("mosaic_tpu") == ("mosaic_tpu", True, False)
        assert dispatch.choose("xla") == ("xla", False, False)
    assert dispatch.choose(None) == ("xla", False, True)


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
def test_what_a_gpus_kernel_refuses_is_an_error_where_it_was_named_and_said_where_it_was_not(on):
    on("gpu", "9.0")
    pool = jnp.zeros((3, 16, 32))
    new = jnp.ones((1, 1, 1, 16))
    arguments = pool, new, new, jnp.ones((1, 1, 2), int), jnp.zeros((1, 1), int), jnp.ones(1, int)
    with pytest.raises(ValueError, match=r"pool rows of \(128, 256\).*use implementation='xla'"):
        write_blocks(*arguments, implementation="mosaic_gpu")
    with pytest.warns(UserWarning, match="runs as plain XLA on this GPU: .*pool rows of"):
        written = write_blocks(*arguments)
    assert (written[1, 0] == 1).all()


@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])
@pytest.mark.filterwarnings("error")
def test_numbers_of_64_bits_and_ranks_that_may_not_be_promoted(implementation):
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        pool, query = jnp.ones((9, 16, 128), jnp.float32), jnp.ones((1, 4, 64), jnp.float32)
        table, lengths = jnp.arange(1, 9).reshape(1, 2, 4), jnp.array([[20, 64]])
        assert table.dtype == lengths.dtype == jnp.int64
        raw = RawKVs(pool.at[table[0, 0, 1], 4:].set(jnp.nan), table, lengths)
        with use_implementation(implementation, interpret=implementation != "xla"):
            out, masses = paged_attention(query, raw, observe=lambda p: p.sum(-2))
        assert out.dtype == masses.dtype == jnp.float32
    np.testing.assert_allclose(out, 1, rtol=1e-6)
    np.testing.assert_allclose(masses.sum(-1), 2, rtol=1e-6)


def test_an_unknown_name_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"'triton'.*'xla', 'mosaic_tpu', 'mosaic_gpu'"):
        dispatch.choose("triton")  # pyright: ignore[reportArgumentType]
