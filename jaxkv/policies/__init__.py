"""What decides which KVs stay: one policy a file, over one mechanism (``jaxkv.eviction``)."""

from jaxkv.policies.base import Policy as Policy
from jaxkv.policies.budget import Budget as Budget
from jaxkv.policies.budget import KeepFraction as KeepFraction
from jaxkv.policies.budget import MaxBytes as MaxBytes
from jaxkv.policies.budget import MaxTokens as MaxTokens
from jaxkv.policies.budget import Ratio as Ratio
from jaxkv.policies.kv_compress import KVCompress as KVCompress
