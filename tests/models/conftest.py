"""Tiny models of ours and of transformers', and how their logits are computed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_checkpoint import write_hf

from models.checkpoints.assemble import parameters_of
from models.interface import causal_attention
from models.llama import Llama
from models.llama_config import LlamaConfig

TINY = LlamaConfig(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_context=256,
    rope_theta=10_000.0,
    rope_scaling=None,
    rms_norm_eps=2**-17,  # exact in float32, as GGUF stores it
    tie_embeddings=False,
    attention_bias=False,
    output_bias=False,
    qk_norm=False,
    eos_token_ids=(2,),
    bos_token_id=1,
)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Llama]:
    """A random model of `TINY`'s shape with the given fields changed; no parameter is at its initial 0 or 1."""

    def build(**changes: object) -> Llama:
        model = Llama(replace(TINY, **changes), rngs=nnx.Rngs(0))
        generator = np.random.default_rng(1)
        for leaf in parameters_of(model).values():
            leaf.set_value(leaf[...] + jnp.asarray(generator.normal(0, 0.1, leaf.shape), jnp.float32))
        return model

    return build


@pytest.fixture(scope="session")
def forward() -> Callable[[Llama, np.ndarray], np.ndarray]:
    """f32[batch, length, vocab] from tokens i32[batch, length], by dense attention."""

    def run(model: Llama, tokens: np.ndarray) -> np.ndarray:
        graph, state = nnx.split(model)

        @jax.jit
        def logits(state: nnx.State, tokens: jax.Array) -> jax.Array:
            model = nnx.merge(graph, state)
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            return model.logits(model(tokens, positions, causal_attention, None)[1])

        return np.asarray(logits(state, jnp.asarray(tokens, jnp.int32)))

    return run


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    """Random prompts, i32[2, 32]."""
    return np.random.default_rng(2).integers(3, TINY.vocab_size, (2, 32)).astype(np.int32)


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """torch on one thread: on a busy machine, its threads spend a tiny model's time waiting for each other."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


@pytest.fixture
def hf_directory(tmp_path: Path, tiny_model: Callable[..., Llama]) -> Path:
    """A tiny Llama in Hugging Face's layout, written without transformers; tests damage it."""
    return write_hf(tmp_path / "llama", tiny_model())
