"""Paged KV-cache compression per attention head, for Llama-family models in JAX."""

from jaxkv.cache import CacheConfig, PagedCache, init_cache
from jaxkv.cache_stats import CacheStats, stats
from jaxkv.generation import Decoded, compress, decode, decode_step, generate
from jaxkv.llm import LLM
from jaxkv.policies import Budget, KeepFraction, KVCompress, LeanKV, MaxBytes, MaxTokens, Mixed, Policy, Ratio
from jaxkv.prompt import prefill
from jaxkv.requests import Completion, SamplingParams
from jaxkv.sampling import Greedy, Random, Sampler

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
