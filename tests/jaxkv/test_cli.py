"""The command line: its report, and what it says of bad input."""

import argparse
import json

import pytest

from jaxkv import cli
from jaxkv.cli import byte_count, main


@pytest.fixture(autouse=True)
def _no_program_cache(monkeypatch):
    monkeypatch.setattr(cli, "keep_compiled_programs", lambda: None)


def run(capsys, *arguments):
    code = main(["generate", *map(str, arguments)])
    return code, capsys.readouterr()


def test_a_whole_run_prints_one_object(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("It was a dark and stormy night; the rain fell in torrents. " * 20, encoding="utf-8")
    code, out = run(
        capsys,
        *("--model", "smollm2-135m", "--prompt-file", prompt, "--chat", "--system", "Be brief.", "--ratio", 4),
        *("--max-tokens", 8, "--json", "--logprobs", "--plot", tmp_path / "heads.png"),
    )
    assert code == 0
    result = json.loads(out.out)
    assert isinstance(result["text"], str)
    assert 1 <= len(result["token_ids"]) <= 8
    assert len(result["logprobs"]) == len(result["token_ids"])
    assert result["finish_reason"] in ("stop", "length")
    tokens = result["prompt_tokens"]
    assert tokens > 250
    timings = result["timings"]
    for phase in ("load", "compile", "prefill", "compress"):
        assert timings[phase] > 0
    assert timings["prefill_tokens_per_second"] == pytest.approx(tokens / timings["prefill"])
    cache = result["cache"]
    full = 90 * -(-tokens // 16)
    assert cache["blocks_held"] == full // 4 == sum(map(sum, cache["blocks_per_head"]))
    assert (len(cache["blocks_per_head"]), len(cache["blocks_per_head"][0])) == (30, 3)
    assert cache["kvs_full"] == 90 * tokens
    assert cache["kvs_held"] <= cache["blocks_held"] * cache["block_size"]
    assert 3.5 < cache["bytes_full"] / cache["bytes_held"] < 4.1
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_named(capsys, tmp_path):
    bad, empty = tmp_path / "bad.txt", tmp_path / "empty.txt"
    bad.write_bytes(b"fine \xff not")
    empty.write_text(" \n")
    model = ("--model", tmp_path / "absent")
    cases = [
        ((*model, "--prompt", "x"), "unknown model"),
        ((*model, "--prompt-file", bad), "is not UTF-8: byte 0xff at offset 5"),
        ((*model, "--prompt-file", empty), "holds no text"),
        ((*model, "--prompt-file", tmp_path), "can't read the prompt"),
        ((*model, "--prompt-file", tmp_path / "no.txt"), "No such file"),
        ((*model, "--prompt", "x", "--ratio", 0.5), "ratio must be at least 1"),
        ((*model, "--prompt", "x", "--compression", "kv-compress"), "needs --ratio, --max-cache-tokens"),
        ((*model, "--prompt", "x", "--compression", "none", "--ratio", 2), "keeps everything"),
        ((*model, "--prompt", "x", "--ratio", 2, "--window", -3), "window must be at least 1"),
        ((*model, "--prompt", "x", "--system", "y"), "--system needs --chat"),
        ((*model, "--prompt", "x", "--max-tokens", 0), "max_tokens must be at least 1"),
        ((*model, "--prompt", "x", "--plot", tmp_path / "no" / "p.png"), "is not a directory"),
    ]
    for arguments, message in cases:
        code, out = run(capsys, *arguments)
        assert code == 2, arguments
        assert out.err.startswith("jaxkv: ")
        assert message in out.err


def test_two_budgets_are_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit):
        run(capsys, "--model", "m", "--prompt", "x", "--ratio", 2, "--max-cache-tokens", 64)
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "count"),
    [("1500", 1500), ("500M", 5 * 10**8), ("2GB", 2 * 10**9), ("1.5GiB", 3 << 29), ("64k", 64_000), ("8 KiB", 8192)],
)
def test_byte_counts(text, count):
    assert byte_count(text) == count


@pytest.mark.parametrize("text", ["", "many", "5X", "1.2.3G", "-5M"])
def test_what_is_no_byte_count_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="no number of bytes"):
        byte_count(text)
