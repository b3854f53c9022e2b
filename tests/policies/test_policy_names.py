"""Policies of one's own by name: in Python, on the command line, in lines of a job and in the evaluation."""

import json
import re

import pytest
import tiny
from evaluate import parse_policies

from jaxkv import LLM, SamplingParams, register_policy
from jaxkv.batch.lines import Broken, Job, read_line
from jaxkv.cli.options import answer_settings, parser
from jaxkv.policies import POLICIES, make_policy, policy_from
from tests.policies.own_policies import Own

pytestmark = pytest.mark.once
NAME = "tests.policies.own_policies:Own"


@pytest.fixture
def registered():
    register_policy("own", Own)
    yield "own"
    del POLICIES["own"]


def line(**fields):
    return read_line(json.dumps({"prompt": "x", **fields}).encode(), 1, SamplingParams())


def test_a_class_is_named_by_its_module():
    assert make_policy(NAME, ratio=4, mix=0.2) == Own(ratio=4, mix=0.2)
    assert LLM(tiny.MODEL, compression=NAME, ratio=4).compression == Own(ratio=4)


def test_a_registered_name_is_one_like_the_others(registered):
    assert make_policy(registered, ratio=4) == Own(ratio=4)
    with pytest.raises(ValueError, match="'own' can't be a policy's name: it is taken"):
        register_policy("own", Own)


def test_an_entry_point_names_one(monkeypatch):
    class Entry:
        def load(self):
            return Own

    def found(group, name):
        return [Entry()] if (group, name) == ("jaxkv.policies", "theirs") else []

    monkeypatch.setattr("jaxkv.policies.names.entry_points", found)
    assert make_policy("theirs", ratio=4, mix=0.1) == Own(ratio=4, mix=0.1)


def test_the_command_line_takes_it():
    said = ["generate", "--model", "m", "--prompt", "x", "--compression", NAME, "--ratio", "4", "--set", "mix=0.2"]
    options = parser().parse_args(said)
    assert policy_from(vars(options)) == Own(ratio=4, mix=0.2)
    batch = parser().parse_args(["batch", "--input", "i", "--output", "o", "--model", "m", *said[5:]])
    assert answer_settings(batch)["settings"] == {"mix": 0.2}


def test_a_line_takes_it_with_its_settings(registered):
    for name in (NAME, registered):
        job = line(compression=name, ratio=4, mix=0.2)
        assert isinstance(job, Job)
        assert job.params.compression == Own(ratio=4, mix=0.2)
    assert line(compression="snapkv", ratio=4, pool=3).params.compression.pool == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compression": NAME, "ratio": 4, "mix": "x"}, "mix must be a number, got 'x'"),
        ({"compression": NAME, "ratio": 4, "max": 1}, 'unknown field "max"'),
        ({"compression": NAME}, "Own needs a budget: write ratio=8"),
        ({"compression": "no.such:Own", "ratio": 4}, "no policy is at 'no.such:Own': No module named 'no'"),
        ({"compression": "json:dumps", "ratio": 4}, "json:dumps can't be made of budget"),
        ({"compression": "own", "ratio": 4}, "no policy is named 'own'; there are none, kv-compress, .* module:Class"),
    ],
)
def test_what_is_no_policy_is_the_lines_error(fields, message):
    broken = line(**fields)
    assert isinstance(broken, Broken)
    assert re.search(message, broken.error)


def test_the_evaluation_takes_it():
    found = parse_policies(f"none,{NAME}:mix=0.2,snapkv:window=8")
    assert [found[f"{NAME}:mix=0.2"].mix, found["snapkv:window=8"].window] == [0.2, 8]
