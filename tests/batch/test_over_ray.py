"""A job over a Ray cluster of this machine: each line once, whichever process dies.

Needs the extra ``ray``, and minutes: ``pytest -m slow tests/batch/test_over_ray.py``.
"""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import tiny
from batch_fake import FakeLLM, completion, run_job
from test_batch import by_line, many, put, start
from test_workers import checkpoint

from jaxkv import SamplingParams
from jaxkv.batch.over_ray import OverRay, needs, places
from jaxkv.cli.main import main
from jaxkv.requests import Finished, Refused


def test_actors_take_the_devices_that_a_cluster_has():
    assert needs({"CPU": 4.0}, 2) == {"num_cpus": 1}
    assert needs({"CPU": 4.0, "GPU": 8.0}, 2) == {"num_cpus": 1, "num_gpus": 2}
    assert needs({"CPU": 4.0, "TPU": 8.0}, 4) == {"num_cpus": 1, "resources": {"TPU": 4}}
    for there, devices, count in (
        ({"CPU": 4.0}, 1, 1),
        ({"GPU": 8.0}, 2, 4),
        ({"TPU": 8.0}, 3, 2),
        ({"TPU": 2.0}, 4, 1),
    ):
        assert places(there, needs(there, devices)) == count


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # actors import these files
        yield ray
        ray.shutdown()


def ends(over: OverRay, prompts) -> dict[int, str]:
    jobs = [(prompt, SamplingParams(seed=i)) for i, prompt in enumerate(prompts)]
    made = [event for event in over.run(jobs) if isinstance(event, Finished | Refused)]
    assert len({end.request for end in made}) == len(made)
    return {end.request: end.error if isinstance(end, Refused) else end.completion.text for end in made}


@pytest.mark.slow
def test_a_request_that_kills_whoever_has_it_is_refused_and_the_others_are_answered(ray):
    prompts = [f"question {i}" for i in range(60)]
    prompts[5], prompts[40] = "deadly", "too long"
    wanted = {i: completion(prompt, SamplingParams(seed=i)).text for i, prompt in enumerate(prompts)}
    wanted |= {5: "2 workers died with it and others, and 2 with it alone", 40: "prompt is too long"}
    assert ends(OverRay(FakeLLM, 2, together=16), prompts) == wanted


def never_made():
    raise ValueError("there is no such model")


@pytest.mark.slow
def test_a_model_that_can_not_be_made_is_said(ray):
    with pytest.raises(ValueError, match="there is no such model"):
        ends(OverRay(never_made, 2), ["a"])


def actors() -> list[int]:
    listed = subprocess.run(["ps", "-Aww", "-o", "pid=,args="], check=True, capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "ray::MapWorker" in line]


@pytest.mark.slow
def test_a_job_whose_actors_and_driver_are_killed_equals_one_left_alone(tmp_path):
    pytest.importorskip("ray")
    source, output, alone = many(tmp_path, 120), tmp_path / "out.jsonl", tmp_path / "alone.jsonl"
    lines = source.read_bytes().splitlines()
    lines[20::40] = [b'{"prompt": 5}'] * 3
    put(source, *lines)
    assert run_job(source, alone) == 1
    output.touch()
    for kills in (("an actor", "the driver"), ("an actor",)):
        driver = start("ray", source, output, 0.05, 0)
        try:
            for killed in kills:
                whole, deadline = output.read_bytes().count(b"\n"), time.monotonic() + 120
                while output.read_bytes().count(b"\n") < whole + 12:
                    assert time.monotonic() < deadline
                    assert driver.poll() is None, driver.communicate()
                    time.sleep(0.01)
                os.kill(driver.pid if killed == "the driver" else actors()[0], signal.SIGKILL)
            said = driver.communicate(timeout=300)[1]
        finally:
            driver.kill()
        assert driver.returncode == (-signal.SIGKILL if "the driver" in kills else 1), said
    assert by_line(output) == by_line(alone)


@pytest.mark.slow
def test_the_command_line_writes_what_one_engine_would(ray, tmp_path, capsys):
    lines = ({"prompt": tiny.prompt(20 + i, i).tolist(), "max_tokens": 5, "seed": i} for i in range(12))
    source = put(tmp_path / "in.jsonl", *lines, {"prompt": [500]})
    options = ["--model", checkpoint(tmp_path / "model"), "--max-context", "64", "--ratio", "2", "--max-batch", "2"]
    made = []
    for more in ([], ["--ray", "--workers", "2"]):
        output = tmp_path / f"by {len(made)}.jsonl"
        assert main(["batch", *options, "--input", str(source), "--output", str(output), *more]) == 1
        made.append(by_line(output))
    assert made[0] == made[1]
    assert "12 answered, 1 failed" in capsys.readouterr().err


@pytest.mark.slow
def test_ten_thousand_lines_take_no_more_memory_than_they_are_long(ray):
    """And cost at most 3 ms each, beside their answers."""
    over, held = OverRay(partial(FakeLLM, 0.0, 64), 2, together=256), []
    list(over.run([("warm", SamplingParams())]))
    done = threading.Event()

    def look():
        pages = Path("/proc/self/statm")
        while not done.wait(0.2):
            held.append(int(pages.read_text().split()[1]) * resource.getpagesize())

    watching = threading.Thread(target=look)
    watching.start()
    began = time.perf_counter()
    made = ends(over, [f"question {i}" for i in range(10_000)])
    seconds = time.perf_counter() - began
    done.set()
    watching.join()
    print(
        f"{seconds / 10:.2f} ms a line in {seconds:.1f} s, {(max(held) - held[0]) / 1e6:.0f} MB more", file=sys.stderr
    )
    assert len(made) == 10_000
    assert max(held) - held[0] < 100e6
    assert seconds < 30
