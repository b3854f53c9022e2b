"""A job is the same again: in one process, whose cache has served before, and in another."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from jaxkv import LLM, KVCompress, Ratio, SamplingParams
from jaxkv.requests import Finished

pytestmark = pytest.mark.once

TESTS = Path(__file__).parents[1]


def twice():
    """Token ids and bytes of three answers, two together, drawn and compressed again as they grow."""
    policy = KVCompress(budget=Ratio(ratio=3), window=8, protected_window=8, compress_every=8)
    llm = LLM(tiny.MODEL, compression=policy, max_batch=2)

    def job():
        params = (SamplingParams(max_tokens=20, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(3))
        jobs = [(tiny.prompt(150 + 20 * i, i), each) for i, each in enumerate(params)]
        done = [e for e in llm.run(jobs, max_context=256) if isinstance(e, Finished)]
        return [[e.request, e.completion.token_ids, e.completion.cache_at_end.bytes_held] for e in done]

    return [job(), job()]


def test_a_job_twice_in_one_process_is_twice_in_two():
    first, second = twice()
    assert first == second
    assert len({tuple(tokens) for _, tokens, _ in first}) == 3
    program = "import json; from engine.test_repeats import twice; print(json.dumps(twice()))"
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True, text=True)
    assert json.loads(other.stdout) == [first, second]
