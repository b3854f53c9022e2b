"""What decides which KVs stay: one policy a file, over one mechanism (``jaxkv.eviction``)."""

from jaxkv.policies.base import Policy as Policy
from jaxkv.policies.budget import Budget as Budget
from jaxkv.policies.budget import KeepFraction as KeepFraction
from jaxkv.policies.budget import MaxBytes as MaxBytes
from jaxkv.policies.budget import MaxTokens as MaxTokens
from jaxkv.policies.budget import Ratio as Ratio
from jaxkv.policies.budget import Unlimited as Unlimited
from jaxkv.policies.expected_attention import ExpectedAttention as ExpectedAttention
from jaxkv.policies.h2o import H2O as H2O
from jaxkv.policies.keydiff import KeyDiff as KeyDiff
from jaxkv.policies.knorm import KNorm as KNorm
from jaxkv.policies.kv_compress import KVCompress as KVCompress
from jaxkv.policies.kvzip import KVzip as KVzip
from jaxkv.policies.lean_kv import LeanKV as LeanKV
from jaxkv.policies.mixed import Mixed as Mixed
from jaxkv.policies.registry import POLICIES as POLICIES
from jaxkv.policies.registry import make_policy as make_policy
from jaxkv.policies.registry import policy_from as policy_from
from jaxkv.policies.snapkv import AdaKV as AdaKV
from jaxkv.policies.snapkv import PyramidKV as PyramidKV
from jaxkv.policies.snapkv import SnapKV as SnapKV
from jaxkv.policies.streaming_llm import StreamingLLM as StreamingLLM
from jaxkv.policies.tiered import TierPolicy as TierPolicy
from jaxkv.policies.tova import TOVA as TOVA
