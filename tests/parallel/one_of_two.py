"""One of two processes that answer together: python one_of_two.py PORT RANK MODE. Each has one device; rank 0 prints.

MODE ``functional`` answers inside a ``shard_map`` of its own, ``engine`` by an ``LLM``, ``forever`` again and again.
"""

import json
import sys

import jax

port, rank, mode = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, rank, heartbeat_timeout_seconds=10)

import numpy as np  # noqa: E402  # what imports models makes arrays, which starts JAX
from devices_engine import PROMPTS  # noqa: E402
from devices_functional import policy_named  # noqa: E402
from eight_kv_heads import MODEL, answer_on  # noqa: E402

from jaxkv import LLM, SamplingParams  # noqa: E402

policy = policy_named("kv-compress", 8)
if mode == "functional":
    made = answer_on(2, policy)
    answered = np.asarray(made.tokens).tolist()
else:
    llm = LLM(MODEL, compression=policy, max_batch=2, devices=2)
    params, answered = SamplingParams(max_tokens=12), []
    for _ in range(1 if mode == "engine" else 1_000_000):
        answered = [answer.token_ids for answer in llm.generate(PROMPTS[:4], params)]
        if rank == 0:
            print("answered", flush=True)
if rank == 0:
    print(json.dumps(answered), flush=True)
