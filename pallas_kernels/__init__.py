"""Operations on a per-head paged KV cache: array in, array out. They know no policy, no model and no cache class."""

from pallas_kernels.dispatch import default_block_size as default_block_size
from pallas_kernels.dispatch import padded_head_dim as padded_head_dim
from pallas_kernels.dispatch import use_implementation as use_implementation
