"""Files of tests that need several devices, each in a process that has eight virtual ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILES = [f"devices_{what}.py" for what in ("documented", "engine", "functional", "loading", "traces")]


def run_on_eight_devices(name: str, *options: str) -> None:
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(HERE)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(HERE / name)]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize("name", FILES)
def test_on_eight_devices(name):
    run_on_eight_devices(name, "-m", "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["devices_engine.py", "devices_functional.py"])
def test_the_slow_ones_on_eight_devices(name):
    run_on_eight_devices(name, "-m", "slow")
