"""What is held: one pool of blocks, each head's table of them, and each KV's score and position.

Knows no model and no policy.
"""

from jaxkv.cache.state import CacheConfig as CacheConfig
from jaxkv.cache.state import PagedCache as PagedCache
from jaxkv.cache.state import init_cache as init_cache
from jaxkv.cache.state import put_sequences as put_sequences
from jaxkv.cache.state import take_sequences as take_sequences
from jaxkv.cache.stats import CacheStats as CacheStats
from jaxkv.cache.stats import stats as stats
