"""Paged KV-cache compression per attention head, for Llama-family models in JAX."""

from jaxkv.cache.state import CacheConfig, PagedCache, init_cache
from jaxkv.cache.stats import CacheStats, stats
from jaxkv.generation.decode import Decoded, compress, decode, decode_step, generate
from jaxkv.generation.prefill import prefill
from jaxkv.generation.sampling import Greedy, Random, Sampler
from jaxkv.llm import LLM
from jaxkv.policies import Budget, KeepFraction, KVCompress, LeanKV, MaxBytes, MaxTokens, Mixed, Policy, Ratio
from jaxkv.requests import Completion, SamplingParams

__all__ = [
    "LLM",
    "Budget",
    "CacheConfig",
    "CacheStats",
    "Completion",
    "Decoded",
    "Greedy",
    "KVCompress",
    "KeepFraction",
    "LeanKV",
    "MaxBytes",
    "MaxTokens",
    "Mixed",
    "PagedCache",
    "Policy",
    "Random",
    "Ratio",
    "Sampler",
    "SamplingParams",
    "compress",
    "decode",
    "decode_step",
    "generate",
    "init_cache",
    "prefill",
    "stats",
]
