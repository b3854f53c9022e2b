"""The public names, which ``jaxkv`` gives out once one of them is asked for."""

# Verbs: pure functions over a cache, for a jit of your own
from jaxkv.generation import compress as compress
from jaxkv.generation import decode as decode
from jaxkv.generation import decode_step as decode_step
from jaxkv.generation import generate as generate
from jaxkv.generation import look_ahead as look_ahead
from jaxkv.generation import prefill as prefill
from jaxkv.generation import room_to_step as room_to_step

# State: what they take and give
from jaxkv.cache import CacheConfig as CacheConfig
from jaxkv.cache import CacheStats as CacheStats
from jaxkv.cache import PagedCache as PagedCache
from jaxkv.cache import init_cache as init_cache
from jaxkv.cache import fork as fork
from jaxkv.cache import release as release
from jaxkv.cache import reorder as reorder
from jaxkv.cache import ShardedHeads as ShardedHeads
from jaxkv.cache import partition_specs as partition_specs
from jaxkv.cache import stats as stats
from jaxkv.generation import Decoded as Decoded
from jaxkv.generation.sampling import Greedy as Greedy
from jaxkv.generation.sampling import Random as Random
from jaxkv.generation.sampling import Sampler as Sampler

# Policies: what decides which KVs stay; their parts are in jaxkv.compression
from jaxkv.compression import Evict as Evict
from jaxkv.compression import LastQueries as LastQueries
from jaxkv.compression import Placement as Placement
from jaxkv.compression import Scorer as Scorer
from jaxkv.compression import Significance as Significance
from jaxkv.compression import TwoPrecisions as TwoPrecisions
from jaxkv.policies import TOVA as TOVA
from jaxkv.policies import AdaKV as AdaKV
from jaxkv.policies import Auto as Auto
from jaxkv.policies import Budget as Budget
from jaxkv.policies import ExpectedAttention as ExpectedAttention
from jaxkv.policies import Gate as Gate
from jaxkv.policies import GateWeights as GateWeights
from jaxkv.policies import H2O as H2O
from jaxkv.policies import KeepFraction as KeepFraction
from jaxkv.policies import KeyDiff as KeyDiff
from jaxkv.policies import KNorm as KNorm
from jaxkv.policies import KVCompress as KVCompress
from jaxkv.policies import KVzip as KVzip
from jaxkv.policies import LeanKV as LeanKV
from jaxkv.policies import LearnedGate as LearnedGate
from jaxkv.policies import MaxBytes as MaxBytes
from jaxkv.policies import MaxTokens as MaxTokens
from jaxkv.policies import Mixed as Mixed
from jaxkv.policies import POLICIES as POLICIES
from jaxkv.policies import Policy as Policy
from jaxkv.policies import PyramidKV as PyramidKV
from jaxkv.policies import Ratio as Ratio
from jaxkv.policies import SnapKV as SnapKV
from jaxkv.policies import StreamingLLM as StreamingLLM
from jaxkv.policies import Unlimited as Unlimited
from jaxkv.policies import register_policy as register_policy

# Host: prompts in, answers out
from jaxkv.cli.plot import head_map as head_map
from jaxkv.context import Context as Context
from jaxkv.engine.schedule import Latency as Latency
from jaxkv.engine.schedule import Schedule as Schedule
from jaxkv.engine.schedule import Throughput as Throughput
from jaxkv.llm import LLM as LLM
from jaxkv.requests import Completion as Completion
from jaxkv.requests import SamplingParams as SamplingParams
