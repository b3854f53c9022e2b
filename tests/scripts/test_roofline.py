"""scripts/roofline.py: what bounds a step, on a TPU by the cycles that its compiler scheduled, and on several chips."""

from dataclasses import replace

import pytest
import roofline
from roofline import CYCLES, Heads, Step, Work, decode_work, largest_batch, rows, table
from roofline_chips import ALONE, Collectives, share, step_collectives, why_not_shared
from targets import DEVICES, TPUS

from models import LlamaConfig
from models.shapes import LARGE_SHAPES, SHAPES

pytestmark = pytest.mark.once

V5E, V6E, H200, L4 = (DEVICES[name] for name in ("v5e", "v6e", "h200", "l4"))
LARGE = LARGE_SHAPES["llama-3.1-70b"]
SMALL = LlamaConfig(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=128,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    max_context=4096,
)


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


def test_what_a_chip_of_four_sends_in_a_step():
    sent = step_collectives(SMALL, 5, 4)
    sums = 2 * 3 + 1  # two a layer, and the embeddings'
    assert sent.hops == 2 * 3 * (sums + 4) + 3  # four of single numbers; the logits go round once
    assert sent.sent == pytest.approx(2 * 3 / 4 * (sums * 5 * 64 * 2 + 4 * 4) + 3 / 4 * 5 * 1000 * 4)


def test_a_vocabulary_that_does_not_divide_is_whole_and_not_sent():
    odd = replace(SMALL, vocab_size=1001)
    assert share(odd, 4).vocab_size == 1001
    assert step_collectives(odd, 5, 4).hops == 2 * 3 * (2 * 3 + 4)
    assert step_collectives(odd, 5, 4).sent == pytest.approx(2 * 3 / 4 * (2 * 3 * 5 * 64 * 2 + 4 * 4))


def test_hops_and_bytes_are_both_spent():
    sent = Collectives(chips=4, hops=3, sent=1e6)
    assert sent.seconds(V5E) == pytest.approx(3 * 1e-6 + 1e6 / (2 * 50e9))
    assert replace(sent, chips=2).seconds(V5E) == pytest.approx(3 * 1e-6 + 1e6 / 50e9)  # with one link between them
    assert sent.seconds(H200) == pytest.approx(3 * 1e-6 + 1e6 / 450e9)
    with pytest.raises(ValueError, match="links"):
        sent.seconds(L4)


def test_collectives_are_a_part_of_the_step():
    attention, sent = Work(bytes=1e6, flops=0), Collectives(chips=8, hops=14, sent=1e6)
    step = Step(weights=attention, attention=attention, collectives=sent)
    assert step.seconds(V5E) == pytest.approx(2e6 / V5E.bandwidth + 14e-6 + 1e6 / 100e9)
    assert step.bound(V5E) == "collectives, hops"
    assert step._replace(collectives=replace(sent, hops=1)).bound(V5E) == "collectives, links"


def test_one_chip_sends_nothing():
    assert step_collectives(SMALL, 5, 1) == ALONE
    assert ALONE.seconds(L4) == 0
    assert share(LARGE, 1) == LARGE
    alone = rows(["llama-3.1-8b"], ["v6e"], 16_384, [8])
    assert "chips" not in table(alone)
    assert "collectives" not in table(alone)
    assert alone[0]["collectives"] == 0


def test_shares_make_the_whole():
    for weights in ("bfloat16", "4-bit"):
        whole = roofline.weight_bytes(LARGE, weights)
        assert 8 * roofline.weight_bytes(share(LARGE, 8), weights) == pytest.approx(whole)
    scales = 8 * roofline.weight_bytes(share(LARGE, 8), "int8") - roofline.weight_bytes(LARGE, "int8")
    assert scales == 7 * 4 * LARGE.num_layers * 2 * LARGE.hidden_size  # what is split by inputs has them on each chip
    whole, part = decode_work(LARGE, 4, 16_384, 8), decode_work(LARGE, 4, 16_384, 8, chips=8)
    assert 8 * part.attention.bytes == whole.attention.bytes
    assert 8 * part.weights.flops == whole.weights.flops


def test_the_collectives_share_grows_with_the_chips():
    two, four, eight = rows(["llama-3.1-8b"], ["v5p"], 16_384, [8], chips=[2, 4, 8])
    assert 0 < two["collectives"] < four["collectives"] < eight["collectives"] < 1
    assert eight["tokens_a_second"] < 2 * four["tokens_a_second"]


def test_what_cannot_be_shared_is_said():
    assert why_not_shared(V5E, SHAPES["qwen2.5-7b"], "bfloat16", 4) is None
    assert why_not_shared(V5E, SHAPES["qwen2.5-7b"], "bfloat16", 8) == "does not divide"  # 4 KV heads
    assert why_not_shared(V5E, SHAPES["smollm2-135m"], "bfloat16", 3) is None
    assert why_not_shared(V5E, SHAPES["smollm2-135m"], "4-bit", 3) == "does not divide"  # 192 inputs in groups of 128
    assert why_not_shared(L4, SHAPES["llama-3.1-8b"], "bfloat16", 4) == "no links between chips"
    refused = rows(["llama-3.1-8b"], ["l4", "v5e"], 16_384, [8], chips=[1, 3, 4])
    assert [row.get("why_not") for row in refused] == [
        *(None, "does not divide", "no links between chips"),
        *("does not fit", "does not divide", None),
    ]
    said = table(refused).splitlines()
    assert len({line.count("|") for line in said}) == 1
    assert "| does not divide |" in said[3]
    assert "| llama-3.1-8b | v5e | 4 |" in said[7]


def test_weights_shared_leave_more_room_than_chips_bring():
    one, eight = (largest_batch(H200, LARGE, 16_384, 1, "fp8", chips=chips) for chips in (1, 8))
    assert 0 < 8 * one < eight


@pytest.mark.parametrize("chips", [1, 2, 4, 8])
@pytest.mark.parametrize("ratio", [1, 8, 64])
def test_chips_hold_no_more_than_their_memory(chips, ratio):
    """All of it together, counted from the whole model."""
    batch = largest_batch(V6E, LARGE, 16_384, ratio, "4-bit", chips=chips)
    held = batch * roofline.sequence_bytes(LARGE, 16_384, ratio) + roofline.weight_bytes(LARGE, "4-bit")
    assert held <= chips * roofline.USABLE * V6E.memory or batch == 0
    assert 4 * batch * LARGE.vocab_size <= (1 - roofline.USABLE) * V6E.memory
    assert batch > 0 or chips < 2


def test_logits_bound_the_batch_of_many_chips():
    model = SHAPES["llama-3.1-8b"]
    most = (1 - roofline.USABLE) * V6E.memory // (4 * model.vocab_size)
    assert most == largest_batch(V6E, model, 256, 1, chips=8)
    assert most < largest_batch(V6E, replace(model, vocab_size=model.vocab_size // 4), 256, 1, chips=8)
