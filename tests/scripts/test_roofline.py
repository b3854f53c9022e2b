"""scripts/roofline.py: what bounds a step, on a TPU by the cycles that its compiler scheduled."""

import pytest
import roofline
from roofline import CYCLES, Heads, Step, Work, decode_work, rows
from targets import DEVICES, TPUS

from models.shapes import SHAPES

pytestmark = pytest.mark.once

V6E, H200 = DEVICES["v6e"], DEVICES["h200"]


@pytest.fixture
def cycles(monkeypatch):
    """Of a head of a made-up kernel."""
    monkeypatch.setattr(roofline, "CYCLES", {"v6e": {"some": {"100": 1000.0, "300": 2000.0, "500": 5000.0}}})


@pytest.mark.parametrize(("kvs", "expected"), [(100, 1000), (200, 1500), (400, 3500), (600, 6500), (10, 1000)])
def test_a_head_between_those_that_were_counted(cycles, kvs, expected):
    assert Heads("some", 3, kvs).cycles(V6E) == 3 * expected


def test_a_kernel_of_which_one_head_was_counted(monkeypatch):
    monkeypatch.setattr(roofline, "CYCLES", {"v6e": {"some": {"100": 1000.0}}})
    assert Heads("some", 2, 50).cycles(V6E) == 1000


def test_the_schedule_bounds_where_it_takes_longest(cycles):
    heads = Heads("some", 1000, 300)
    attention = Work(bytes=1e6, flops=1e6, heads=heads)
    step = Step(weights=Work(bytes=1e6, flops=0), attention=attention)
    assert attention.seconds(V6E) == pytest.approx(2e6 / V6E.clock)
    assert step.seconds(V6E) == pytest.approx(2e6 / V6E.clock + 1e6 / V6E.bandwidth)
    assert step.bound(V6E) == "attention, schedule"
    assert attention.seconds(H200) == pytest.approx(1e6 / H200.bandwidth)  # whose kernels have no such schedule
    assert Step(weights=Work(bytes=2e6, flops=0), attention=attention).bound(H200) == "weights, bandwidth"


def test_each_tpu_has_what_is_taken_of_it():
    for chip in TPUS:
        for name in ("llama-3.1-8b", "llama-3.2-1b"):
            attention = decode_work(SHAPES[name], 4, 16_384, 1).attention
            assert attention.heads
            assert attention.heads.cycles(DEVICES[chip]) > 0
        assert set(CYCLES[chip]) == {"decode, 64", "decode, 128", "moves, 128"}


def test_compression_gains_at_most_its_ratio():
    one, eight = rows(["llama-3.1-8b"], ["v6e"], 16_384, [1, 8])
    assert one["tokens_a_second"] < eight["tokens_a_second"] < 9 * one["tokens_a_second"]
    assert 0 < eight["compression"] < 1


def test_weights_of_eight_bits_are_half_and_make_room():
    model = SHAPES["llama-3.1-8b"]
    assert roofline.weight_bytes(model) == 2 * roofline.weight_count(model)
    assert roofline.weight_bytes(model, "int8") == pytest.approx(roofline.weight_count(model), rel=2e-3)
    floats, codes = rows(["llama-3.1-8b"], ["v5e"], 16_384, [8], ["bfloat16", "int8"])
    assert floats["batch"] == 0
    assert codes["batch"] > 0
    one, two = rows(["llama-3.1-70b"], ["h200"], 16_384, [8], ["fp8", "4-bit"])
    assert 0 < one["batch"] < two["batch"]
