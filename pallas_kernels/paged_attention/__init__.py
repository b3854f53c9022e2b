"""Decode attention over per-head block tables: unquantised KVs, quantised ones of two tiers, or both in one softmax."""

from pallas_kernels.kvs import RawKVs as RawKVs
from pallas_kernels.paged_attention.api import paged_attention as paged_attention
from pallas_kernels.paged_attention.types import Observed as Observed
from pallas_kernels.paged_attention.types import Significance as Significance
from pallas_kernels.paged_attention.types import Significant as Significant
from pallas_kernels.paged_attention.types import TieredKVs as TieredKVs
from pallas_kernels.paged_attention.types import Weakest as Weakest
