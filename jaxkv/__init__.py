"""Paged KV-cache compression per attention head, for Llama-family models in JAX."""

from jaxkv.cache import CacheConfig, CacheStats, PagedCache, init_cache, stats
from jaxkv.generation import Decoded, compress, decode, decode_step, generate, look_ahead, prefill, room_to_step
from jaxkv.generation.sampling import Greedy, Random, Sampler
from jaxkv.llm import LLM
from jaxkv.policies import Auto, Budget, KeepFraction, KVCompress, LeanKV, MaxBytes, MaxTokens, Mixed, Policy, Ratio
from jaxkv.requests import Completion, SamplingParams

__all__ = [
    "LLM",
    "Auto",
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
    "look_ahead",
    "prefill",
    "room_to_step",
    "stats",
]
