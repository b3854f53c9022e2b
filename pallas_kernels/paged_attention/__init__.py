"""Decode attention over per-head block tables."""

from pallas_kernels.paged_attention.api import paged_attention as paged_attention
