"""What is held: pools of blocks, each head's table of them, and each KV's score and position.

Knows no model and no policy.
"""

from jaxkv.cache.config import CacheConfig as CacheConfig
from jaxkv.cache.config import TierConfig as TierConfig
from jaxkv.cache.config import init_cache as init_cache
from jaxkv.cache.contents import Contents as Contents
from jaxkv.cache.contents import contents as contents
from jaxkv.cache.home import Home as Home
from jaxkv.cache.moves import Goal as Goal
from jaxkv.cache.moves import move as move
from jaxkv.cache.shards import ShardedHeads as ShardedHeads
from jaxkv.cache.shards import partition_specs as partition_specs
from jaxkv.cache.sharing import fork as fork
from jaxkv.cache.sharing import own as own
from jaxkv.cache.sharing import reorder as reorder
from jaxkv.cache.state import PagedCache as PagedCache
from jaxkv.cache.state import release as release
from jaxkv.cache.stats import CacheStats as CacheStats
from jaxkv.cache.stats import stats as stats
