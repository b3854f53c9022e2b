"""The published shapes of some models, by name: for programs that compile or count and need no weights."""

from typing import Any

from models.llama_config import LlamaConfig
from models.rope import RopeScaling


def _llama3(*, head_dim: int, factor: float, **sizes: Any) -> LlamaConfig:
    theta = 500_000.0
    scaling = RopeScaling.llama3(
        head_dim=head_dim,
        theta=theta,
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_context=8192,
    )
    return LlamaConfig(
        vocab_size=128_256,
        head_dim=head_dim,
        max_context=131_072,
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=head_dim == 64,
        **sizes,
    )


SHAPES = {
    "llama-3.1-8b": _llama3(
        head_dim=128,
        factor=8.0,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
    ),
    "llama-3.2-1b": _llama3(
        head_dim=64,
        factor=32.0,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
    ),
    "mistral-7b": LlamaConfig(
        vocab_size=32_768,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_context=32_768,
        rope_theta=1e6,
    ),
    "qwen2.5-7b": LlamaConfig(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        max_context=32_768,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        attention_bias=True,
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_context=8192,
        rope_theta=100_000.0,
        tie_embeddings=True,
    ),
}
"""Llama 3.1 8B, Llama 3.2 1B, Mistral 7B v0.3, Qwen2.5 7B, SmolLM2 135M."""

LARGE_SHAPES = {
    "llama-3.1-70b": _llama3(
        head_dim=128,
        factor=8.0,
        hidden_size=8192,
        intermediate_size=28_672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
    ),
}
"""Llama 3.1 70B, which fits on one accelerator with weights of 8 bits at most."""
