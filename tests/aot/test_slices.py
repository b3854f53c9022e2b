"""The engine's programs for TPU slices, their KV heads split over the chips, by the real compiler."""

import compile_slices
import pytest
from targets import why_not

pytestmark = pytest.mark.once

QUICK = ("llama-3.1-8b", "bfloat16", "v5e-4")


@pytest.mark.parametrize(
    ("of", "program"),
    [
        pytest.param(of, program, marks=() if (of, program) == (QUICK, "decode") else pytest.mark.slow)
        for of in compile_slices.USUAL
        for program in compile_slices.PROGRAMS
    ],
)
def test_two_sums_a_layer_and_nothing_large_beside_weights_and_cache(of, program):
    if reason := why_not(compile_slices.SLICES[of[2]][0]):
        pytest.skip(reason)
    [row] = compile_slices.compile_all(*of, [program])
    assert compile_slices.faults(row) == [], row


def test_faults_are_seen():
    row = {"program": "decode", "sums": 4, "copies": ["copy bf16[1]"], "pool": 10, "aliased": 5, "peak": 9, "memory": 8}
    assert len(compile_slices.faults(row | {"temporary": 2**30})) == 5
    row |= {"sums": 3, "copies": [], "aliased": 10, "memory": 9, "temporary": 10}
    assert compile_slices.faults(row) == []
    assert compile_slices.faults(row | {"program": "compress_rows"}) == ["3 sums of hidden states, not 0"]
