"""Two processes, each with a device, that answer together."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from devices_engine import PROMPTS
from devices_functional import policy_named
from eight_kv_heads import MODEL, answer_on_one

from jaxkv import LLM, SamplingParams

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def start(mode: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", HERE)))}
    return [
        subprocess.Popen(
            [sys.executable, str(HERE / "one_of_two.py"), port, str(rank), mode],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]


def answered_by_two(mode: str):
    first, second = processes = start(mode)
    try:
        said, other = first.communicate(timeout=900)[0], second.communicate(timeout=60)[0]
    finally:
        for process in processes:
            process.kill()
    assert (first.returncode, second.returncode) == (0, 0), said[-3000:] + other[-3000:]
    assert "answered" not in other
    return json.loads(said.splitlines()[-1])


def test_the_functional_layer_answers_the_same():
    one = answer_on_one(policy_named("kv-compress", 8))
    assert answered_by_two("functional") == jax.device_get(one.tokens).tolist()


def test_an_engine_answers_the_same():
    llm = LLM(MODEL, compression=policy_named("kv-compress", 8), max_batch=2)
    expected = [answer.token_ids for answer in llm.generate(PROMPTS[:4], SamplingParams(max_tokens=12))]
    assert answered_by_two("engine") == expected


@pytest.mark.parametrize("killed", [0, 1])
def test_where_one_is_killed_the_other_ends_with_an_error(killed):
    processes = start("forever")
    try:
        for line in processes[0].stdout:
            if line == "answered\n":
                break
        processes[killed].kill()
        began = time.monotonic()
        assert processes[1 - killed].wait(timeout=60) != 0
        assert time.monotonic() - began < 60
    finally:
        for process in processes:
            process.kill()
