"""What should stay: a score, a budget, a placement. Knows a cache's contents, and no model.

A policy of one's own is a ``Scorer`` in a ``Policy``; a new way to keep KVs is a ``Placement``.
"""

from jaxkv.compression.evict import Evict as Evict
from jaxkv.compression.observation import AllQueries as AllQueries
from jaxkv.compression.observation import ExpectedQueries as ExpectedQueries
from jaxkv.compression.observation import LastQueries as LastQueries
from jaxkv.compression.observation import Nothing as Nothing
from jaxkv.compression.observation import Observation as Observation
from jaxkv.compression.observation import Reread as Reread
from jaxkv.compression.placement import Placement as Placement
from jaxkv.compression.policy import Method as Method
from jaxkv.compression.policy import Policy as Policy
from jaxkv.compression.scorer import Scorer as Scorer
from jaxkv.compression.shares import Global as Global
from jaxkv.compression.shares import PerHead as PerHead
from jaxkv.compression.shares import PerLayer as PerLayer
from jaxkv.compression.shares import Pyramid as Pyramid
from jaxkv.compression.shares import Shares as Shares
from jaxkv.compression.significance import Significance as Significance
from jaxkv.compression.tiered import Tiered as Tiered
from jaxkv.compression.two_precisions import TwoPrecisions as TwoPrecisions
