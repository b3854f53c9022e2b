"""Batch jobs: that no line is lost, torn or done twice, however a job ends."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from batch_fake import FakeLLM, completion, run_job

from jaxkv import SamplingParams
from jaxkv.batch.job import BatchJob
from jaxkv.batch.lines import digest
from jaxkv.batch.progress import Progress
from jaxkv.cli import commands as cli
from jaxkv.cli.main import main
from jaxkv.requests import PromptRead

pytestmark = pytest.mark.once

FAKE = Path(__file__).with_name("batch_fake.py")


def put(path, *lines):
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def records(path):
    data = path.read_bytes()
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def by_line(path):
    result = {r["line"]: r for r in records(path)}
    assert len(result) == len(records(path)), "a line was answered twice"
    return result


def many(tmp_path, count=200):
    return put(tmp_path / "in.jsonl", *({"id": f"q{i}", "prompt": f"question {i}", "seed": i} for i in range(count)))


def start(what, source, output, pause, number):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(FAKE.parents[2]), str(FAKE.parent)])}
    return subprocess.Popen(
        [sys.executable, str(FAKE), what, str(source), str(output), str(pause), str(number)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_every_line_is_answered_with_its_own_settings(tmp_path, capsys):
    source = put(
        tmp_path / "in.jsonl",
        {"prompt": "one"},
        b"  \r",
        {"id": "chat", "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]},
        {"id": 2.5, "prompt": "three", "max_tokens": 4, "temperature": 0.5, "seed": 7, "stop": "x", "top_k": 3},
    )
    assert run_job(source, tmp_path / "out.jsonl") == 0
    made = by_line(tmp_path / "out.jsonl")
    assert {line: r["id"] for line, r in made.items()} == {1: 1, 3: "chat", 4: 2.5}
    want = completion("three", SamplingParams(max_tokens=4, seed=7, temperature=0.5, stop=("x",)))
    assert made[4] == {
        "id": 2.5,
        "line": 4,
        "digest": digest(source.read_bytes().splitlines()[3]),
        "settings": {},
        "text": want.text,
        "token_ids": want.token_ids,
        "finish_reason": "length",
        "prompt_tokens": 5,
        "completion_tokens": 4,
        "cache_bytes_held": 1000,
        "cache_bytes_full": 4000,
    }
    assert made[3]["text"].startswith("U>resu<S>metsys<")
    assert "3 answered, 0 failed, 0 skipped as already done" in capsys.readouterr().err


def test_the_job_goes_on_after_broken_and_refused_lines(tmp_path, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    put(
        source,
        {"id": "a", "prompt": "fine"},
        b"{broken",
        {"id": "a", "prompt": "the same id"},
        {"id": "b", "prompt": "far too long"},
        {"id": "c", "messages": [{"role": "assistant", "content": "x"}]},
        {"id": 6.0, "prompt": "fine too"},
        {"id": 6, "prompt": "the same number"},
        {"prompt": "fine as well"},
    )
    assert run_job(source, output) == 1
    made = by_line(output)
    assert sorted(made) == list(range(1, 9))
    assert {n for n, r in made.items() if "error" in r} == {2, 3, 4, 5, 7}
    assert made[2]["id"] is None
    assert made[3] == {"id": "a", "line": 3, "error": 'the id "a" is already that of line 1; give each line its own'}
    assert made[4] == {"id": "b", "line": 4, "error": "prompt is too long"}
    assert made[5]["error"] == "messages: the conversation must begin with the user"
    assert "3 answered, 5 failed" in capsys.readouterr().err

    before = output.read_bytes()
    assert run_job(source, output) == 1
    assert output.read_bytes() == before
    assert "0 answered, 0 failed, 8 skipped as already done (5 of them failed" in capsys.readouterr().err

    lines = source.read_bytes().splitlines()
    lines[1], lines[3] = b'{"prompt": "mended"}', b'{"id": "b", "prompt": "shorter"}'
    put(source, *lines)
    assert run_job(source, output) == 1, "mended lines are tried again only where that is asked for"
    assert output.read_bytes() == before
    assert run_job(source, output, retry_failed=True) == 1
    made = by_line(output)
    assert {n for n, r in made.items() if "error" in r} == {3, 5, 7}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_lines_are_drawn_only_as_the_model_has_room(tmp_path):
    source, llm = many(tmp_path), FakeLLM(held=4)
    with BatchJob(source, tmp_path / "out.jsonl", SamplingParams()) as job:
        requests = job._requests(llm, job._progress())
        events = llm.run(requests)
        next(events)
        assert len(llm.drawn) == 4


def test_a_job_killed_ten_times_equals_one_left_alone(tmp_path):
    source, output, alone = many(tmp_path), tmp_path / "out.jsonl", tmp_path / "alone.jsonl"
    lines = source.read_bytes().splitlines()
    lines[20::40] = [b'{"prompt": 5}'] * 5
    lines[30::40] = [b'{"prompt": "too long"}'] * 5
    lines[-1] = lines[0]
    put(source, *lines)
    assert run_job(source, alone) == 1
    done = start("kills", source, output, pause=0.004, number=1)
    out, errors = done.communicate(timeout=60)
    ends = [tuple(map(int, line.split())) for line in out.splitlines()]
    assert [status for status, _ in ends] == [-9] * 10 + [1], errors
    counts = [count for _, count in ends]
    assert counts == sorted(counts)
    assert len({count for count in counts if 0 < count < 200}) >= 5, f"killed too early or too late: {counts}"
    assert by_line(output) == by_line(alone)
    assert sorted(by_line(output)) == list(range(1, 201))


@pytest.mark.parametrize("keep", [1, 5, 8, 60, -1], ids=lambda n: f"{n} bytes")
def test_a_torn_last_line_is_cut_off_and_done_again(tmp_path, keep, capsys):
    source, output = many(tmp_path, 6), tmp_path / "out.jsonl"
    assert run_job(source, output) == 0
    whole = output.read_bytes()
    *lines, last = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines) + last[:keep])
    assert run_job(source, output) == 0
    assert output.read_bytes() == whole
    assert f"cut off the {len(last[:keep])} bytes" in capsys.readouterr().err


def test_zeros_that_a_lost_record_left_are_cut_off(tmp_path):
    source, output = many(tmp_path, 3), tmp_path / "out.jsonl"
    assert run_job(source, output) == 0
    whole = output.read_bytes()
    output.write_bytes(whole + bytes(500))
    assert run_job(source, output) == 0
    assert output.read_bytes() == whole


@pytest.mark.parametrize("between", [b"\r", b"\r\r", b"", b" ", b"\x85", "\u2028".encode()])
def test_records_whose_line_ends_became_others_are_refused_and_left(tmp_path, between):
    """Rather than cut off as one torn record."""
    source, output = many(tmp_path, 4), tmp_path / "out.jsonl"
    assert run_job(source, output) == 0
    whole = output.read_bytes()
    for changed in (whole.replace(b"\n", between), whole[:-1].replace(b"\n", between)):
        output.write_bytes(changed)
        with pytest.raises(ValueError, match="line 1 is no record of a batch job") as error:
            run_job(source, output)
        assert output.read_bytes() == changed
        assert ("its lines end in CR alone: convert them to LF" in str(error.value)) == between.startswith(b"\r")
    output.write_bytes(whole.replace(b"\n", b"\r\n"))  # as an editor on Windows leaves it
    assert run_job(source, output) == 0
    assert sorted(by_line(output)) == [1, 2, 3, 4]


def test_the_output_of_another_job_is_refused_and_left_as_it_is(tmp_path):
    source, output = many(tmp_path, 4), tmp_path / "out.jsonl"
    run_job(put(tmp_path / "other.jsonl", *({"id": f"z{i}", "prompt": "x"} for i in range(3))), output)
    cases = [
        (output.read_bytes(), 'belongs to another input: line 1 has id "z0" there, but "q0" in'),
        (output.read_bytes() + b'{"id": "q', "belongs to another input"),
        (b'{"id": "q9", "line": 9, "text": ""}\n', "it has a record of line 9, but .* has no such line"),
        (b'{"id": "q0", "prompt": "x"}\n', "line 1 is no record of a batch job"),
        (b"My diary", "line 1 is no record of a batch job: 'My diary'"),
        (b'{"id": "q0", "line": 1, "text": ""}\n' * 2, "two records of the input's line 1"),
    ]
    for content, message in cases:
        output.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            run_job(source, output)
        assert output.read_bytes() == content
    with pytest.raises(ValueError, match="are the same file"):
        run_job(source, source)


def test_a_line_that_was_changed_after_its_answer_is_seen_without_an_id(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": "one"}, {"prompt": "two"}, {"prompt": "three"}]
    put(source, *lines[:2])
    assert run_job(source, output) == 0
    before = output.read_bytes()
    put(source, lines[1], lines[0], lines[2])
    with pytest.raises(ValueError, match=r"line 1 of .*in\.jsonl is not what .*out\.jsonl has the answer to"):
        run_job(source, output)
    assert output.read_bytes() == before
    put(source, *lines)
    assert run_job(source, output) == 0
    assert sorted(by_line(output)) == [1, 2, 3]
    old = [{k: v for k, v in r.items() if k != "digest"} for r in records(output)]
    put(output, *old)  # as versions wrote them that knew no digest
    assert run_job(source, output) == 0


def test_a_full_disk_is_said_and_loses_nothing(tmp_path, monkeypatch):
    source, output = many(tmp_path, 50), tmp_path / "out.jsonl"
    real, room = os.write, 2000

    def write(fd, data):
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = real(fd, bytes(data)[:room])
        room -= count
        return count

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(OSError, match="No space left on device; all records in it are whole: free some space"):
            run_job(source, output)
    assert 5 < len(records(output)) < 50
    assert run_job(source, output) == 0
    assert sorted(by_line(output)) == list(range(1, 51))


def test_a_limit_that_the_system_sets_is_met_with_whole_records(tmp_path):
    source, output = many(tmp_path, 50), tmp_path / "out.jsonl"
    process = start("small disk", source, output, 0, 3000)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "File too large; all records in it are whole: free some space" in errors
    assert 5 < len(records(output)) < 50


def test_two_processes_do_not_write_one_output(tmp_path):
    source, output = many(tmp_path), tmp_path / "out.jsonl"
    process = start("run", source, output, 0.02, 0)
    try:
        deadline = time.monotonic() + 30
        while not (output.exists() and output.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(ValueError, match="another process is writing"):
            run_job(source, output)
        with pytest.raises(ValueError, match="another process is writing"):
            run_job(source, output, retry_failed=True)
    finally:
        process.kill()
        process.communicate()
    assert run_job(source, output) == 0
    assert sorted(by_line(output)) == list(range(1, 201))


def test_the_disk_is_waited_for_at_most_once_a_second_and_at_the_end(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(output.stat().st_size), real(fd)))
    source, output = many(tmp_path), tmp_path / "out.jsonl"
    run_job(source, output)
    assert len(synced) <= 4
    assert synced[-1] == output.stat().st_size


def test_a_record_is_given_to_the_system_in_one_piece(tmp_path, monkeypatch):
    pieces, real = [], os.write
    monkeypatch.setattr(os, "write", lambda fd, data: (pieces.append(bytes(data)), real(fd, data))[1])
    output = tmp_path / "out.jsonl"
    run_job(many(tmp_path, 9), output)
    assert pieces == output.read_bytes().splitlines(keepends=True)


def test_a_disk_that_fails_late_is_said_too(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device; all records in it are whole"):
        run_job(many(tmp_path, 3), tmp_path / "out.jsonl")


def test_the_command_line(tmp_path, capsys, monkeypatch):
    given = {}
    monkeypatch.setattr(cli, "LLM", lambda model, **settings: given.update(settings, model=model) or FakeLLM())
    source, output = many(tmp_path, 3), tmp_path / "out.jsonl"
    arguments = ["batch", "--model", "m", "--input", str(source), "--output", str(output)]
    options = ["--max-batch", "3", "--cache-memory", "2M", "--ratio", "4", "--max-tokens", "5", "--logprobs"]
    assert main([*arguments, *options]) == 0
    assert (given["max_batch"], given["cache_memory"], given["compression"].budget.ratio) == (3, 2_000_000, 4)
    assert [r["logprobs"] for r in records(output)] == [[-0.5] * 5] * 3
    assert records(output)[0]["settings"] == {"model": "m", "ratio": 4.0, "max_tokens": 5, "logprobs": True}
    given.clear()
    capsys.readouterr()
    assert main([*arguments, *options, "--cache-memory", "3M"]) == 0
    assert main([*arguments, *options, "--ratio", "2"]) == 2
    said = capsys.readouterr().err
    assert "was written with other settings: line" in said
    assert 'with {"ratio": 4.0}, not {"ratio": 2.0}; go on with those, or give another --output' in said
    assert not given, "no model is loaded where nothing is left to do"

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeLLM, "run", stop)
    output.unlink()
    assert main(arguments) == 130
    capsys.readouterr()
    cases = [
        (["--input", str(tmp_path / "none"), "--output", str(output)], "can't read", "No such file"),
        (["--input", "/dev/null", "--output", str(output)], "can't read", "must be a regular file"),
        (["--input", str(tmp_path), "--output", str(tmp_path / "o")], "o would be among the input"),
        (["--input", str(source), "--output", str(tmp_path)], "can't write", "Is a directory"),
        (["--input", str(source), "--output", str(tmp_path / "no" / "o")], "can't write", "No such file"),
        (["--input", str(source), "--output", "/dev/full"], "can't write /dev/full", "must be a regular file"),
    ]
    for files, *messages in cases:
        assert main(["batch", "--model", "m", *files]) == 2
        error = capsys.readouterr().err
        assert error.startswith("jaxkv: ")
        assert all(m in error for m in messages), error


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(capsys, monkeypatch):
    def go(log_seconds):
        progress = Progress(total=4, skipped=1, log_seconds=log_seconds)
        for i, event in enumerate(FakeLLM().run([("abc", SamplingParams())] * 2)):
            time.sleep(0.05)
            if not isinstance(event, PromptRead) and i in (3, 7):
                progress.answered(event.completion)
            progress.see(event)
        time.sleep(0.25)
        progress.show()
        progress.close()
        return capsys.readouterr().err

    lines = go(0.0)
    assert "jaxkv: 3 of 4 requests, prefill" in lines
    assert "cache held 0.0 MB of 0.0 MB so far" in lines
    assert " left\n" in lines
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = go(10.0)
    assert "3/4 [" in bar
    assert "decode" in bar
    assert "tok/s" in bar
