"""What a job says of the time that is left, and that it compiles."""

import pytest
from batch_fake import completion

from jaxkv.batch.progress import Progress
from jaxkv.requests import Finished, SamplingParams, TextMade

pytestmark = pytest.mark.once


@pytest.mark.parametrize("rows", [1, 8])
def test_after_a_fifth_the_time_left_is_right_whatever_was_compiled(rows, monkeypatch):
    """A hundred answers of 10 tokens, so many at a time, a token of each in a second; compiling took 500 seconds."""
    clock = [1000.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    compiled = [7.0]
    progress = Progress(total=100, skipped=0, log_seconds=1e9, compile_seconds=lambda: compiled[0])
    clock[0] += 500
    compiled[0] += 500
    ended = 0
    while ended < 20:
        for _ in range(10):
            clock[0] += 1
            for row in range(rows):
                progress.see(TextMade(request=ended + row, text="x", token_ids=[1]))
        for _ in range(rows):
            made = completion("0123456789", SamplingParams(max_tokens=10))
            progress.answered(made)
            progress.see(Finished(request=ended, completion=made))
            ended += 1
    truth = (100 - ended) / rows * 10
    assert truth / 1.5 < progress.seconds_left(clock[0]) < truth * 1.5


def test_it_says_when_it_compiles(capsys):
    Progress(total=3, skipped=1).compiling("decode")
    assert capsys.readouterr().err == "jaxkv: 1 of 3 requests, compiling decode\n"
