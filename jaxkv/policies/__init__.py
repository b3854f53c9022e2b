"""What decides which KVs stay: one method a file, each a scorer and the policy of its name."""

from jaxkv.compression.budget import Budget as Budget
from jaxkv.compression.budget import KeepFraction as KeepFraction
from jaxkv.compression.budget import MaxBytes as MaxBytes
from jaxkv.compression.budget import MaxTokens as MaxTokens
from jaxkv.compression.budget import Ratio as Ratio
from jaxkv.compression.budget import Unlimited as Unlimited
from jaxkv.compression.policy import Policy as Policy
from jaxkv.policies.expected_attention import ExpectedAttention as ExpectedAttention
from jaxkv.policies.gate import GateWeights as GateWeights
from jaxkv.policies.gate import LearnedGate as LearnedGate
from jaxkv.policies.h2o import H2O as H2O
from jaxkv.policies.keydiff import KeyDiff as KeyDiff
from jaxkv.policies.knorm import KNorm as KNorm
from jaxkv.policies.kv_compress import KVCompress as KVCompress
from jaxkv.policies.kvzip import KVzip as KVzip
from jaxkv.policies.lean_kv import LeanKV as LeanKV
from jaxkv.policies.mixed import Auto as Auto
from jaxkv.policies.mixed import Mixed as Mixed
from jaxkv.policies.names import POLICIES as POLICIES
from jaxkv.policies.names import make_policy as make_policy
from jaxkv.policies.names import policy_from as policy_from
from jaxkv.policies.snapkv import AdaKV as AdaKV
from jaxkv.policies.snapkv import PyramidKV as PyramidKV
from jaxkv.policies.snapkv import SnapKV as SnapKV
from jaxkv.policies.streaming_llm import StreamingLLM as StreamingLLM
from jaxkv.policies.tova import TOVA as TOVA
