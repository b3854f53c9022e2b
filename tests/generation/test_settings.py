"""Settings of JAX that a program may have: 64 bits, strict promotion of dtypes, none of ranks, warnings as errors.
Answers are the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from generation.answers import POLICIES, answers

ROOT = Path(__file__).parents[2]
SETTINGS = {"JAX_ENABLE_X64": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}


@pytest.fixture(scope="module")
def under_settings():
    """What a process with all of them answers, by policy; warnings are errors there."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | SETTINGS
    command = [sys.executable, str(Path(__file__).with_name("answers.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", POLICIES)
def test_counts_and_indices_keep_their_dtypes(name, under_settings):
    assert not jax.config.jax_enable_x64
    assert under_settings[name] == answers(name)
