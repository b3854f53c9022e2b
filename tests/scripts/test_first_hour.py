"""What a person types in a first hour works, on a tiny checkpoint; ``-m slow``: on the real one."""

import first_hour
import pytest
import tiny
from tiny_checkpoint import write_hf

pytestmark = pytest.mark.once


def check(said):
    for name in ("generate", "chat", "sampling", "several", "read_and_ask", "own_policy"):
        assert f"\n{name}: " in said
    assert "KVCompress(budget=8): budget must be one, got 8; write ratio=8, or budget=Ratio(8)\n" in said
    assert """chat_prompt("hi"): messages must be a list""" in said
    assert "logprobs=5: logprobs must be true or false, got 5; write top_logprobs=5" in said


def test_all_of_it_on_a_tiny_checkpoint(tmp_path, capsys):
    directory = write_hf(tmp_path / "model", tiny.MODEL, tokenizer=True)
    first_hour.main(["--model", str(directory)])
    check(capsys.readouterr().out)


@pytest.mark.slow
def test_all_of_it_on_the_real_model(capsys):
    first_hour.main([])
    check(capsys.readouterr().out)
