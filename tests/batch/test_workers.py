"""Several processes that answer one job: each line once, whoever of them dies, and the parent too."""

import multiprocessing
import os
import random
import signal
import subprocess
import time
from functools import partial

import pytest
import tiny
import tokenizers
from batch_fake import FakeLLM, completion, run_job
from test_batch import by_line, many, put, start

from jaxkv import SamplingParams
from jaxkv.batch.workers import Workers, own_cores, own_devices
from jaxkv.cli.main import main
from jaxkv.requests import Finished, Refused
from models import save_model

pytestmark = pytest.mark.once


def jobs(prompts):
    return [(prompt, SamplingParams(seed=i)) for i, prompt in enumerate(prompts)]


def answered(workers: Workers, prompts) -> dict[int, str]:
    ends = [event for event in workers.run(jobs(prompts)) if isinstance(event, Finished | Refused)]
    made = {end.request: end.error if isinstance(end, Refused) else end.completion.text for end in ends}
    assert len(made) == len(ends), "a request ended twice"
    return made


def texts(prompts) -> dict[int, str]:
    return {i: completion(prompt, params).text for i, (prompt, params) in enumerate(jobs(prompts))}


def test_each_request_is_answered_once_and_refusals_are_passed_on():
    prompts = [f"question {i}" for i in range(60)]
    prompts[7] = "too long"
    workers = Workers(partial(FakeLLM, 0.002), 2)
    assert answered(workers, prompts) == texts(prompts) | {7: "prompt is too long"}
    assert workers.restarts == 0
    assert not multiprocessing.active_children()
    assert answered(workers, prompts[:3]) == texts(prompts[:3]), "they can be run again"


def test_a_request_that_kills_whoever_has_it_is_refused_and_the_others_are_answered():
    prompts = [f"question {i}" for i in range(20)]
    prompts[5] = "deadly"
    workers = Workers(FakeLLM, 2)
    made = answered(workers, prompts)
    deaths = workers.restarts  # the second may have had nothing else already
    assert made.pop(5) == f"{deaths} workers died with it, the last one by signal 9, which had nothing else"
    assert made == {i: text for i, text in texts(prompts).items() if i != 5}
    assert deaths in (2, 3)


def never_made():
    raise ValueError("there is no such model")


def dies():
    os._exit(3)


def test_workers_that_cannot_be_made_are_said_to_be(monkeypatch):
    with pytest.raises(ValueError, match="there is no such model"):
        answered(Workers(never_made, 2), ["a"])
    monkeypatch.setattr("jaxkv.batch.workers.MOST_DEATHS", 2)
    with pytest.raises(RuntimeError, match=r"3 workers died .* with exit status 3, and none answered"):
        answered(Workers(dies, 2), ["a"])
    assert not multiprocessing.active_children()


def test_who_stops_listening_leaves_no_process():
    events = Workers(partial(FakeLLM, 0.01), 2).run(jobs(f"question {i}" for i in range(50)))
    next(events)
    assert len(multiprocessing.active_children()) == 2
    events.close()
    assert not multiprocessing.active_children()


def workers_of(parent: int) -> list[int]:
    listed = subprocess.run(["ps", "-Aww", "-o", "pid=,ppid=,args="], check=True, capture_output=True, text=True).stdout
    each = (line.split(maxsplit=2) for line in listed.splitlines())
    return [int(pid) for pid, its_parent, how in each if int(its_parent) == parent and "spawn_main" in how]


def test_a_job_whose_workers_and_parent_are_killed_equals_one_left_alone(tmp_path):
    source, output, alone = many(tmp_path), tmp_path / "out.jsonl", tmp_path / "alone.jsonl"
    lines = source.read_bytes().splitlines()
    lines[20::40] = [b'{"prompt": 5}'] * 5
    lines[30::40] = [b'{"prompt": "too long"}'] * 5
    put(source, *lines)
    assert run_job(source, alone) == 1
    output.touch()
    moments, whole = random.Random(0), 0
    for kills, parent_too in ((2, True), (2, True), (1, False)):
        parent = start("workers", source, output, 0.02, 0)
        try:
            for _ in range(kills + parent_too):
                whole = output.read_bytes().count(b"\n")
                deadline = time.monotonic() + 60
                while output.read_bytes().count(b"\n") < whole + 12:
                    assert time.monotonic() < deadline
                    assert parent.poll() is None, parent.communicate()
                    time.sleep(0.005)
                orphans = workers_of(parent.pid)
                os.kill(moments.choice(orphans) if kills else parent.pid, signal.SIGKILL)
                kills -= 1
            said = parent.communicate(timeout=120)[1]
        finally:
            parent.kill()
        assert parent.returncode == (-signal.SIGKILL if parent_too else 1), said
    assert by_line(output) == by_line(alone)
    assert sorted(by_line(output)) == list(range(1, 201))
    time.sleep(1.0)
    assert not any(exists(pid) for pid in orphans), "workers outlive their parent"


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def tells_its_cores(path):
    (path / str(os.getpid())).write_text(str(sorted(os.sched_getaffinity(0))))
    return FakeLLM()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no such thing")
def test_each_has_its_own_cores(tmp_path, monkeypatch):
    answered(Workers(partial(tells_its_cores, tmp_path), 2), ["a", "b"])
    wanted = [sorted(own_cores(number, 2) or os.sched_getaffinity(0)) for number in range(2)]
    assert sorted(told.read_text() for told in tmp_path.iterdir()) == sorted(map(str, wanted))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 3, 5, 7})
    assert [own_cores(number, 2) for number in range(2)] == [{0, 2}, {3, 5, 7}]
    assert [own_cores(number, 5) for number in range(5)] == [{0}, {2}, {3}, {5}, {7}]
    assert own_cores(0, 6) is None


def test_each_worker_sees_devices_of_its_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7,9")
    seen = [own_devices(number, 2) for number in range(2)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in seen] == ["4,5", "7,9"]
    assert [each["TPU_VISIBLE_CHIPS"] for each in seen] == ["0,1", "2,3"]
    assert seen[0]["TPU_CHIPS_PER_PROCESS_BOUNDS"] == "1,2,1"
    assert seen[0]["TPU_PROCESS_PORT"] != seen[1]["TPU_PROCESS_PORT"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert own_devices(3, 1)["CUDA_VISIBLE_DEVICES"] == "3"


def checkpoint(directory) -> str:
    save_model(tiny.MODEL, directory)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(101)}, unk_token="w0"))
    words.save(str(directory / "tokenizer.json"))
    return str(directory)


def test_two_of_a_real_model_write_what_one_would(tmp_path, capsys):
    lines = ({"prompt": tiny.prompt(20 + i, i).tolist(), "max_tokens": 5, "seed": i} for i in range(12))
    source = put(tmp_path / "in.jsonl", *lines, {"prompt": [500]}, {"messages": [{"role": "user", "content": "w1"}]})
    options = ["--model", checkpoint(tmp_path / "model"), "--max-context", "64", "--ratio", "2", "--max-batch", "4"]
    made = []
    for count in (1, 2):
        output = tmp_path / f"by {count}.jsonl"
        command = ["batch", *options, "--input", str(source), "--output", str(output), "--workers", str(count)]
        assert main(command) == 1
        made.append(by_line(output))
    assert made[0] == made[1]
    assert [line for line, record in made[0].items() if "error" in record] == [13, 14]
    said = capsys.readouterr().err
    assert said.count("12 answered, 2 failed") == 2
    assert main(["batch", *options, "--input", str(source), "--output", str(output), "--workers", "0"]) == 2
    assert "--workers must be at least 1, got 0" in capsys.readouterr().err
