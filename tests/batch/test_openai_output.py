"""Answers in OpenAI's form: the openai package's own types take them, and a job goes on by them."""

import json

import pytest
from batch_fake import STATS, FakeLLM

from jaxkv.batch.job import BatchJob
from jaxkv.batch.openai import response
from jaxkv.requests import Completion, SamplingParams, Timings

pytestmark = pytest.mark.once


def completion(**more):
    return Completion(
        text="ab",
        token_ids=[7, 8],
        prompt_tokens=3,
        finish_reason="stop",
        cache=STATS,
        cache_at_end=STATS,
        timings=Timings(),
        **{"logprobs": [-0.5, -1.0], "top_logprobs": [{7: -0.5, 9: -2.0}, {8: -1.0, 7: -1.5}], **more},
    )


def told(chat, **more):
    return response("c", completion(**more), chat=chat, model="m", token=lambda i: chr(i + 90))["response"]["body"]


def test_the_openai_packages_types_take_a_chat():
    types = pytest.importorskip("openai.types.chat")
    body = types.ChatCompletion.model_validate(told(True, others=[completion()]), strict=True)
    assert [choice.message.content for choice in body.choices] == ["ab", "ab"]
    assert body.choices[0].logprobs.content[0].top_logprobs[1].logprob == -2.0
    assert body.usage.total_tokens == 7
    types.ChatCompletion.model_validate(told(True, logprobs=None, top_logprobs=None), strict=True)


def test_the_openai_packages_types_take_a_completion():
    types = pytest.importorskip("openai.types")
    body = types.Completion.model_validate(told(False), strict=True)
    assert (body.choices[0].text, body.choices[0].finish_reason) == ("ab", "stop")
    assert body.choices[0].logprobs.top_logprobs[0] == {"a": -0.5, "c": -2.0}


def test_a_job_writes_them_and_goes_on_by_them(tmp_path, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"custom_id": f"r{i}", "body": {"prompt": f"text {i}"}} for i in range(3)]
    lines.append({"custom_id": "bad", "body": {"prompt": "x", "n": 0}})
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for run in range(2):
        with BatchJob(source, output, SamplingParams(), output_format="openai") as job:
            assert job.left == (4 if run == 0 else 0)
            assert (job.run(FakeLLM()) if job.left else job.finish()) == 1
    records = {record["custom_id"]: record for record in map(json.loads, output.read_text().splitlines())}
    assert records["r1"]["response"]["body"]["choices"][0]["text"].startswith("1 txet")
    assert records["r1"]["error"] is None
    assert records["bad"]["response"] is None
    assert records["bad"]["error"]["message"].startswith("n must be at least 1")
    said = capsys.readouterr().err
    assert "line 4: n must be at least 1" in said
    assert f"all reasons are in {output}" in said
