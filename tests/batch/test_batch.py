"""Batch jobs: what a line may say, and that nothing is lost, torn or done twice."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from batch_fake import FakeLLM, completion, run_job

from jaxkv import KVCompress, MaxBytes, MaxTokens, Ratio, SamplingParams
from jaxkv.batch.job import BatchJob
from jaxkv.batch.lines import Broken, Job, digest, read_line
from jaxkv.batch.progress import Progress
from jaxkv.cli import commands as cli
from jaxkv.cli.main import main
from jaxkv.policies import SnapKV
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
    environment = os.environ | {"PYTHONPATH": str(FAKE.parents[2])}
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


def test_openai_files_are_read(tmp_path):
    body = {"model": "gpt", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "top_p": 0.5}
    line = {"custom_id": "r-1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    data = json.dumps(line | {"body": body | {"max_completion_tokens": 9}}).encode()
    job = read_line(data, 4, SamplingParams())
    assert job == Job(
        line=4,
        id="r-1",
        prompt=None,
        messages=[{"role": "user", "content": "Hi"}],
        params=SamplingParams(max_tokens=9, top_p=0.5),
        digest=digest(data),
    )
    old = read_line(b'{"custom_id": "a", "body": {"prompt": "x", "max_tokens": 3, "stop": null}}', 1, SamplingParams())
    assert isinstance(old, Job)
    assert old.params.max_tokens == 3


@pytest.mark.parametrize(
    "more",
    [
        {"n": 1, "stream": False, "frequency_penalty": 0, "presence_penalty": 0.0, "response_format": {"type": "text"}},
        {"user": "somebody", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "logit_bias": {}},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "top_logprobs": 0, "stream_options": None},
    ],
)
def test_fields_that_change_nothing_are_taken(more):
    plain = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]}
    [usual, same] = (
        read_line(json.dumps({"custom_id": "a", "body": body}).encode(), 1, SamplingParams())
        for body in (plain, plain | more)
    )
    assert isinstance(same, Job)
    assert (same.messages, same.params) == (usual.messages, usual.params)


def test_messages_of_other_apis_are_taken_where_they_mean_the_same():
    messages = [
        {"role": "developer", "content": "S"},
        {"role": "user", "content": "U", "name": "somebody"},
        {"role": "assistant", "content": "A", "refusal": None, "tool_calls": [], "annotations": [], "audio": None},
    ]
    job = read_line(json.dumps({"custom_id": "a", "body": {"messages": messages}}).encode(), 1, SamplingParams())
    assert job.messages == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U", "name": "somebody"},
        {"role": "assistant", "content": "A"},
    ]


@pytest.mark.parametrize(
    ("given", "read"), [([1, 2, 3], [1, 2, 3]), ([[1, 2]], [1, 2]), (["a text"], "a text"), ([0], [0])]
)
def test_a_prompt_may_be_token_ids(given, read):
    job = read_line(json.dumps({"prompt": given}).encode(), 1, SamplingParams())
    assert (job.prompt, job.messages) == (read, None)


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({"prompt": "x", "logprobs": True}, True),
        ({"prompt": "x", "logprobs": 0}, True),
        ({"prompt": "x", "logprobs": False}, False),
        ({"prompt": "x", "logprobs": None}, False),
        ({"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 0}, True),
    ],
)
def test_a_line_may_ask_for_log_probabilities(fields, asked):
    job = read_line(json.dumps({"custom_id": "a", "body": fields}).encode(), 1, SamplingParams())
    assert job.params.logprobs is asked


def test_a_line_of_many_fields_is_read_in_no_time():
    names = [f"field {i}" for i in range(30_000)]
    line = "{" + ", ".join(f'"{name}": 1' for name in [*names, names[-1]]) + "}"
    began = time.perf_counter()
    broken = read_line(line.encode(), 1, SamplingParams())
    assert time.perf_counter() - began < 1
    assert broken.error == "the field 'field 29999' is there twice; give it once"


BROKEN = [
    (b'{"prompt": "x"', None, "not JSON: Expecting ',' delimiter at column 15"),
    (b'{"id": 1, "prompt": "\xff"}', None, "not UTF-8: byte 0xff at offset 21"),
    (b"[" * 100_000, None, "nested too deeply"),
    (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", None, "not JSON that can be read: Exceeds the limit"),
    (b'{"prompt": "x", "temperature": NaN}', None, "NaN is no number"),
    (b'{"prompt": "x", "prompt": "y"}', None, "'prompt' is there twice"),
    (b'["x"]', None, 'expected a JSON object with prompt or messages, got ["x"]'),
    ({"id": [1], "prompt": "x"}, None, "id must be a text or a number, got [1]"),
    ({"id": True, "prompt": "x"}, None, "id must be a text or a number, got true"),
    ({"id": "a"}, "a", "no prompt: give prompt (a text) or messages (a list)"),
    ({"prompt": 5}, 7, "prompt must be a text, got 5"),
    ({"prompt": " \n"}, 7, "prompt must not be empty"),
    ({"prompt": "\ud800"}, 7, "half a surrogate pair '\\ud800'"),
    ({"prompt": "x", "messages": []}, 7, "prompt or messages, not both"),
    ({"messages": []}, 7, "at least one message, got []"),
    ({"messages": "x"}, 7, 'at least one message, got "x"'),
    ({"messages": ["x"]}, 7, 'messages[0] must be an object with role and content, got "x"'),
    (
        {"messages": [{"role": "robot", "content": "x"}]},
        7,
        "role must be one of system, developer, user, assistant, got",
    ),
    ({"messages": [{"role": "user"}]}, 7, "messages[0].content must be a text, got null"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 7, "content may only hold"),
    ({"messages": [{"role": "user", "content": "x", "naem": "n"}]}, 7, 'unknown field "messages[0].naem"'),
    ({"messages": [{"role": "user", "content": "x", "name": 5}]}, 7, "messages[0].name must be a text, got 5"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, 7, "role must be one of system, developer, user, assistant"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, 7, "messages[0].tool_calls isn't supported"),
    (
        {"prompt": "x", "max_token": 5, "temprature": 1},
        7,
        'unknown field "max_token", "temprature"; known are compress_every, compression, high, ',
    ),
    ({"prompt": "x", "max_tokens": "5"}, 7, 'max_tokens must be a whole number, got "5"'),
    ({"prompt": "x", "unquantised_window": 1}, 7, "unquantised_window must be true or false, got 1"),
    ({"prompt": "x", "max_tokens": 0}, 7, "max_tokens must be at least 1, got 0"),
    ({"prompt": "x", "seed": True}, 7, "seed must be a whole number, got true"),
    ({"prompt": "x", "temperature": True}, 7, "temperature must be a number, got true"),
    ({"prompt": "x", "temperature": -1}, 7, "temperature must be 0 (greedy) or a positive number up to 1e6, got -1"),
    ({"prompt": "x", "temperature": 10**400}, 7, "temperature must be 0 (greedy)"),
    ({"prompt": "x", "top_k": 3 * 10**9}, 7, "top_k must be 0 (all) or positive, below 2**31, got 3000000000"),
    ({"prompt": "x", "ratio": 2, "sinks": 2**31}, 7, "sinks must be below 2**31, got 2147483648"),
    ({"prompt": "x", "top_p": 2}, 7, "top_p must be in (0, 1], got 2"),
    ({"prompt": "x", "stop": 5}, 7, "stop must be a text or a list of texts, got 5"),
    ({"prompt": "x", "stop": ["a", 5]}, 7, "stop must be a text, got 5"),
    ({"prompt": "x", "stop": [""]}, 7, "none of them empty"),
    ({"custom_id": "c", "body": "x"}, "c", 'body must be an object, got "x"'),
    ({"custom_id": "c", "id": 1, "body": {"prompt": "x"}}, "c", 'unknown field "id"'),
    ({"custom_id": "c", "body": {"prompt": "x", "n": 2}}, "c", "body.n must be 1, got 2; leave it out"),
    ({"custom_id": "c", "body": {"prompt": "x", "n": True}}, "c", "body.n must be 1, got true"),
    ({"custom_id": "c", "body": {"prompt": "x", "stream": True}}, "c", "body.stream must be false, got true"),
    ({"custom_id": "c", "body": {"prompt": "x", "presence_penalty": 0.5}}, "c", "body.presence_penalty must be 0"),
    (
        {"custom_id": "c", "body": {"prompt": "x", "response_format": {"type": "json_object"}}},
        "c",
        'be {"type": "text"}',
    ),
    ({"custom_id": "c", "body": {"prompt": "x", "tools": [{"type": "f"}]}}, "c", "body.tools must be [], got"),
    ({"custom_id": "c", "body": {"prompt": "x", "logit_bias": {"5": -100}}}, "c", "body.logit_bias must be {}, got"),
    ({"custom_id": "c", "body": {"prompt": "x", "top_logprobs": 3}}, "c", "body.top_logprobs must be 0, got 3"),
    ({"custom_id": "c", "body": {"prompt": "x", "logprobs": 5}}, "c", "logprobs must be true or false"),
    ({"custom_id": "c", "body": {"messages": [{"role": "user", "content": "x"}], "logprobs": 0}}, "c", "logprobs must"),
    (
        {"custom_id": "c", "body": {"prompt": "x", "frequency_penlaty": 0}},
        "c",
        'unknown field "body.frequency_penlaty"',
    ),
    ({"prompt": "x", "n": 1}, 7, 'unknown field "n"'),
    ({"prompt": []}, 7, "prompt must be one text or one list of token ids, got []"),
    ({"prompt": ["a", "b"]}, 7, 'prompt must be one text or one list of token ids, got ["a", "b"]'),
    ({"prompt": [1, -2]}, 7, "prompt must be one text or one list of token ids, got [1, -2]"),
    ({"prompt": [1, True]}, 7, "prompt must be one text or one list of token ids, got [1, true]"),
    ({"prompt": [1, 2**31]}, 7, "prompt must be one text or one list of token ids"),
    ({"prompt": "x", "logprobs": "yes"}, 7, 'logprobs must be true or false, or with a prompt 0, got "yes"'),
    ({"prompt": "x", "compression": "z" * 10**6, "ratio": 2}, 7, "no policy is named 'zzz"),
    ({"prompt": "x", "compression": "leankv", "high": "z" * 10**6}, 7, "a format is like K8V4"),
    ({"prompt": "x", "ratio": 10**4000}, 7, "ratio must be at least 1"),
    ({"prompt": "x", "seed": 10**4000}, 7, "seed must be in [0, 2**32), got a number of 13288 bits"),
    ({"prompt": "x", "sinks": 10**4000, "ratio": 2}, 7, "sinks must be below 2**31, got a number of"),
    ({"id": ["z"] * 10**5, "prompt": "x"}, None, 'id must be a text or a number, got ["z", '),
    ({f"field {i}": i for i in range(9999)}, 7, 'unknown field "field 0", "field 1", "field 2" and 9996 more; known'),
    ({"prompt": "x", "z" * 10**6: 1}, 7, 'unknown field "zzz'),
    ({"custom_id": "c", "body": {"prompt": "x", "max_tokens": 1, "max_completion_tokens": 2}}, "c", "not both"),
]


@pytest.mark.parametrize(
    ("fields", "policy"),
    [
        ({}, "default"),
        ({"ratio": 8}, KVCompress(budget=Ratio(ratio=8))),
        ({"compression": "none"}, None),
        ({"compression": "snapkv", "max_cache_tokens": 64, "sinks": 2}, SnapKV(budget=MaxTokens(tokens=64), sinks=2)),
        ({"max_cache_bytes": 10**6, "window": 0}, KVCompress(budget=MaxBytes(size=10**6), window=None)),
        ({"ratio": None}, "default"),
    ],
)
def test_a_line_may_say_what_compresses_its_cache(fields, policy):
    plain = json.dumps({"prompt": "x"} | fields).encode()
    job = read_line(plain, 1, SamplingParams())
    assert isinstance(job, Job)
    assert job.params.compression == policy


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"compression": "zip", "ratio": 8}, "no policy is named 'zip'; there are none, kv-compress"),
        ({"compression": 8}, "compression must be a text, got 8"),
        ({"compression": "snapkv"}, "policy snapkv needs a budget"),
        ({"ratio": 8, "max_cache_tokens": 64}, "give one of ratio, max_cache_tokens, max_cache_bytes, got 2"),
        ({"sinks": 2}, "nothing is compressed, so there is no sinks"),
        ({"compression": "none", "ratio": 2}, "policy none keeps everything"),
        ({"ratio": 0.5}, "ratio must be at least 1"),
        ({"compression": "streaming-llm", "ratio": 2, "window": 3}, "policy streaming-llm"),
    ],
)
def test_a_line_whose_compression_is_wrong_is_broken(fields, error):
    job = read_line(json.dumps({"prompt": "x"} | fields).encode(), 1, SamplingParams())
    assert isinstance(job, Broken)
    assert error in job.error


@pytest.mark.parametrize(("line", "name", "error"), BROKEN, ids=[error[:30] for _, _, error in BROKEN])
def test_a_broken_line_says_what_is_wrong(line, name, error):
    data = line if isinstance(line, bytes) else json.dumps(line).encode()
    broken = read_line(data, 7, SamplingParams())
    assert isinstance(broken, Broken)
    assert (broken.line, broken.id) == (7, name)
    assert error in broken.error
    assert len(broken.error) < 400


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
    monkeypatch.setattr(cli, "keep_compiled_programs", lambda: None)
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
        (["--input", str(tmp_path), "--output", str(output)], "can't read", "must be a regular file"),
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
