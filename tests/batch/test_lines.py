"""What a line of a batch job may say, and what a broken one is told."""

import json
import time

import pytest

from jaxkv import KVCompress, MaxBytes, MaxTokens, Ratio, SamplingParams
from jaxkv.batch.lines import Broken, Job, digest, read_line
from jaxkv.policies import SnapKV

pytestmark = pytest.mark.once


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
        'unknown field "max_token", "temprature"; known are compress_every, compression, frequency_penalty, ',
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
    ({"custom_id": "c", "body": {"prompt": "x", "n": 0}}, "c", "n must be at least 1"),
    ({"custom_id": "c", "body": {"prompt": "x", "n": True}}, "c", "n must be a whole number, got true"),
    ({"custom_id": "c", "body": {"prompt": "x", "stream": True}}, "c", "body.stream must be false, got true"),
    ({"custom_id": "c", "body": {"prompt": "x", "presence_penalty": "a"}}, "c", "presence_penalty must be a number"),
    (
        {"custom_id": "c", "body": {"prompt": "x", "response_format": {"type": "json_object"}}},
        "c",
        'be {"type": "text"}',
    ),
    ({"custom_id": "c", "body": {"prompt": "x", "tools": [{"type": "f"}]}}, "c", "body.tools must be [], got"),
    ({"custom_id": "c", "body": {"prompt": "x", "logit_bias": {"a": -100}}}, "c", "logit_bias must be a mapping of"),
    ({"custom_id": "c", "body": {"prompt": "x", "logit_bias": [5]}}, "c", "logit_bias must be an object, got [5]"),
    ({"custom_id": "c", "body": {"prompt": "x", "top_logprobs": 21}}, "c", "top_logprobs must be between 0 and 20"),
    ({"custom_id": "c", "body": {"prompt": "x", "logprobs": 50}}, "c", "top_logprobs must be between 0 and 20, got 50"),
    ({"custom_id": "c", "body": {"messages": [{"role": "user", "content": "x"}], "logprobs": 0}}, "c", "logprobs must"),
    (
        {"custom_id": "c", "body": {"prompt": "x", "frequency_penlaty": 0}},
        "c",
        'unknown field "body.frequency_penlaty"',
    ),
    ({"prompt": []}, 7, "prompt must be one text or one list of token ids, got []"),
    ({"prompt": ["a", "b"]}, 7, 'prompt must be one text or one list of token ids, got ["a", "b"]'),
    ({"prompt": [1, -2]}, 7, "prompt must be one text or one list of token ids, got [1, -2]"),
    ({"prompt": [1, True]}, 7, "prompt must be one text or one list of token ids, got [1, true]"),
    ({"prompt": [1, 2**31]}, 7, "prompt must be one text or one list of token ids"),
    ({"prompt": "x", "logprobs": "yes"}, 7, 'logprobs must be true or false, or with a prompt a number, got "yes"'),
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
    assert len(broken.error) < 520
