"""The scheduler on devices that aren't here: what its clock says, and that nothing it says looks measured."""

import sys

import pytest
import simulate
from targets import DEVICES

from jaxkv import Latency, Throughput
from models.shapes import SHAPES

pytestmark = pytest.mark.once

L4 = simulate.Machine.that_holds(SHAPES["llama-3.1-8b"], DEVICES["l4"], 16)


def set_up(ratio, **settings):
    kinds = {"prompt": 6000, "answer": 500, "requests": 1, "rows": 512, "compress_every": 64}
    return simulate.SetUp(ratio=ratio, **(kinds | settings))


def ran(machine, it, schedule):
    return simulate.Simulation(machine=machine, set_up=it, schedule=schedule).run()


def test_the_papers_set_up_gains_what_the_paper_says():
    """KV-Compress's own: 8B on an L4, prompts of 6,000 and answers of 500 tokens."""
    speed = {}
    for ratio in (1, 64):
        _, batch = simulate.best_static(L4, set_up(ratio))
        speed[ratio] = ran(L4, set_up(ratio, requests=2 * batch), Throughput()).tokens_a_second
    assert speed[64] >= 5.18 * speed[1]


@pytest.mark.parametrize("ratio", [1, 8])
def test_little_is_left_against_the_best_static_schedule(ratio):
    best, batch = simulate.best_static(L4, set_up(ratio))
    result = ran(L4, set_up(ratio, requests=4 * batch), Throughput())
    assert 0.9 * best <= result.tokens_a_second
    assert result.tokens == 4 * batch * 500
    assert 0 < result.reading < result.seconds


def test_latency_costs_throughput():
    it = set_up(8, requests=60)
    assert ran(L4, it, Latency()).tokens_a_second < ran(L4, it, Throughput()).tokens_a_second


def test_what_does_not_fit_is_said():
    refused = ran(L4, set_up(1, prompt=100_000, requests=1), Throughput()).refused
    assert "needs" in refused


def test_everything_printed_is_marked_as_simulated(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["simulate.py", "--ratios", "1", "64", "--requests", "8", "--answer", "50"])
    simulate.main()
    said = capsys.readouterr().out
    assert said.startswith("SIMULATED")
    assert said.count("\n| llama-3.1-8b | l4 |") == 2
