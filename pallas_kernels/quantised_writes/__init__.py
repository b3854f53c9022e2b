"""Single KVs quantised into their slots of both tiers' blocks."""

from pallas_kernels.quantised_writes.api import lower_kvs as lower_kvs
from pallas_kernels.quantised_writes.api import write_kvs as write_kvs
