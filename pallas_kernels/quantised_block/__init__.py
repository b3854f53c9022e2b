"""Blocks of a fixed number of bytes that hold KVs at one of two precisions (LeanKV, arXiv 2412.03131)."""

from pallas_kernels.quantised_block.layout import BlockLayout as BlockLayout
from pallas_kernels.quantised_block.layout import Format as Format
