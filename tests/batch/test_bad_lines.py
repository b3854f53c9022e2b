"""Whatever a line does to the tokenizer, the template or the answer's text is that line's error record."""

import json
from dataclasses import dataclass

import pytest
import tiny
import tokenizers
from tokenizers import Regex, decoders, pre_tokenizers

from jaxkv import LLM, SamplingParams
from jaxkv.batch.job import BatchJob
from models import Tokenizer, TokenizerError

TEMPLATE = """{% for m in messages %}
{% if "loop" in m.content %}{{ 1 / 0 }}{% endif %}{% if "no" in m.content %}{{ raise_exception("no") }}{% endif %}
{{ m.content }}{% endfor %}"""


def letters(kind=Tokenizer):
    """ASCII's letters, without a token for others."""
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({chr(32 + i): i for i in range(95)} | {"\n": 95}))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?m:.)"), "isolated")
    core.decoder = decoders.Fuse()
    return kind(core=core, chat_template=TEMPLATE)


@dataclass(frozen=True, kw_only=True)
class Mute(Tokenizer):
    """Can't make a text of what begins an answer."""

    def decode(self, ids, *, skip_special=True):
        raise TokenizerError("can't make a text of ids")


def run(tmp_path, tokenizer, *lines):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with BatchJob(source, output, SamplingParams(max_tokens=2, ignore_eos=True)) as job:
        status = job.run(LLM(tiny.MODEL, tokenizer=tokenizer), max_context=256)
    records = sorted(map(json.loads, output.read_text().splitlines()), key=lambda record: record["line"])
    return status, records


def test_a_line_whose_text_fails_is_its_own_error(tmp_path):
    status, records = run(
        tmp_path,
        letters(),
        {"prompt": "fine"},
        {"prompt": "an odd l\u00e9tter"},
        {"messages": [{"role": "user", "content": "fine"}]},
        {"messages": [{"role": "user", "content": "an odd l\u00e9tter"}]},
        {"messages": [{"role": "user", "content": "loop"}]},
        {"messages": [{"role": "user", "content": "no"}]},
        {"prompt": "fine again"},
    )
    assert status == 1
    expected = [None, "can't take this text", None, "can't take this text", "division by zero", "no", None]
    assert len(records) == len(expected)
    for record, error in zip(records, expected, strict=True):
        assert ("error" in record) == (error is not None)
        assert error is None or error in record["error"]


def test_an_answer_that_has_no_text_is_its_lines_error(tmp_path):
    status, records = run(tmp_path, letters(Mute), {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    assert status == 1
    assert [record["error"] for record in records] == ["can't make a text of ids"] * 3


def test_outside_a_job_it_is_a_value_error():
    with pytest.raises(ValueError, match=r"prompt 1: .*can't take this text"):
        LLM(tiny.MODEL, tokenizer=letters()).generate(["a", "\u00e9"])
    with pytest.raises(ValueError, match="can't make a text of ids"):
        LLM(tiny.MODEL, tokenizer=letters(Mute)).generate("a", SamplingParams(max_tokens=2, ignore_eos=True))
