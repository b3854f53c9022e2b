"""Paged KV-cache compression per attention head, for Llama-family models in JAX."""

from jaxkv.cache import CacheConfig, CacheStats, PagedCache, init_cache, stats
from jaxkv.generation import Decoded, compress, decode, decode_step, generate
from jaxkv.llm import LLM
from jaxkv.policies import Budget, KeepFraction, KVCompress, MaxBytes, MaxTokens, Policy, Ratio
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
    "MaxBytes",
    "MaxTokens",
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
