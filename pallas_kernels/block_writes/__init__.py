"""New KVs into their slots."""

from pallas_kernels.block_writes.api import write_blocks as write_blocks
