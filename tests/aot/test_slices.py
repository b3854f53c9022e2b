"""The engine's programs for TPU slices and GPUs, their KV heads split over the chips, by the real compiler."""

import compile_slices
import pytest

QUICK = ("llama-3.1-8b", "bfloat16", "v5e-4")


@pytest.mark.once
@pytest.mark.parametrize(
    ("of", "program"),
    [
        pytest.param(of, program, marks=() if (of, program) == (QUICK, "decode") else pytest.mark.slow)
        for of in compile_slices.USUAL
        if of[2] != "h200-4"
        for program in compile_slices.PROGRAMS
    ],
)
def test_two_sums_a_layer_and_nothing_large_beside_weights_and_cache(of, program):
    if reason := compile_slices.why_no_slice(of[2]):
        pytest.skip(reason)
    [row] = compile_slices.compile_all(*of, [program])
    assert compile_slices.faults(row) == [], row


@pytest.mark.parametrize("program", compile_slices.PROGRAMS)
def test_the_same_on_four_gpus(program):
    """Where layers aren't stacked: two of them."""
    if reason := compile_slices.why_no_slice("h200-4"):
        pytest.skip(reason)
    [row] = compile_slices.compile_all("llama-3.1-70b", "bfloat16", "h200-4", [program], layers=2)
    assert compile_slices.faults(row) == [], row


@pytest.mark.once
def test_faults_are_seen():
    row = {
        "program": "decode",
        "layers": 1,
        "sums": 4,
        "copies": ["copy bf16[1]"],
        "pool": 10,
        "aliased": 5,
        "peak": 9,
        "memory": 8,
    }
    assert len(compile_slices.faults(row | {"temporary": 2**30})) == 5
    row |= {"sums": 3, "copies": [], "aliased": 10, "memory": 9, "temporary": 10}
    assert compile_slices.faults(row) == []
    assert compile_slices.faults(row | {"program": "compress_rows"}) == ["3 sums of hidden states, not 0"]
