"""Decode attention over quantised blocks of both tiers, and over unquantised ones, in one pass."""

from pallas_kernels.kvs import RawKVs as RawKVs
from pallas_kernels.tiered_attention.api import tiered_attention as tiered_attention
from pallas_kernels.tiered_attention.types import Significance as Significance
from pallas_kernels.tiered_attention.types import Tiered as Tiered
from pallas_kernels.tiered_attention.types import Weakest as Weakest
