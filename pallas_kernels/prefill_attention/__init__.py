"""Attention of a prompt chunk over the KVs already cached and over its own."""

from pallas_kernels.kvs import RawKVs as RawKVs
from pallas_kernels.prefill_attention.api import prefill_attention as prefill_attention
from pallas_kernels.prefill_attention.types import ObservedQueries as ObservedQueries
