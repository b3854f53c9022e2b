"""The verbs, as pure functions: a model reads a prompt into a cache, a policy compresses it, and tokens are decoded."""

from jaxkv.generation.compress import compress as compress
from jaxkv.generation.decode import Decoded as Decoded
from jaxkv.generation.decode import decode as decode
from jaxkv.generation.decode import decode_step as decode_step
from jaxkv.generation.decode import generate as generate
from jaxkv.generation.decode import room_to_step as room_to_step
from jaxkv.generation.prefill import look_ahead as look_ahead
from jaxkv.generation.prefill import prefill as prefill
