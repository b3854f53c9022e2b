"""The command line: its report, and what it says of bad input."""

import json

import pytest
import tiny

from jaxkv import LLM, Auto, Latency, Ratio, SamplingParams
from jaxkv.cli import commands as cli
from jaxkv.cli.main import main
from jaxkv.cli.options import answer_settings, parser
from jaxkv.words import byte_count

pytestmark = pytest.mark.once


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
    made = len(result["token_ids"]) - 1  # the first comes of the prompt
    speed = made / timings["decode"] if timings["decode"] else 0
    assert timings["decode_tokens_per_second"] == pytest.approx(speed)
    assert timings["prefill_tokens_per_second"] == pytest.approx(tokens / timings["prefill"])
    cache = result["cache"]
    full = 90 * -(-tokens // 16)
    assert cache["blocks_held"] == full // 4 == sum(map(sum, cache["blocks_per_head"]))
    assert (len(cache["blocks_per_head"]), len(cache["blocks_per_head"][0])) == (30, 3)
    assert cache["kvs_full"] == 90 * tokens
    assert cache["block_size"] == 16
    assert 0 < cache["kvs_held"] <= cache["blocks_held"] * 16
    assert 3.5 < cache["bytes_full"] / cache["bytes_held"] < 4.1
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")


class Letters:
    """One character a token."""

    eos_ids = ()

    def encode(self, text):
        return [ord(c) - 32 for c in text]

    def stream(self):
        return self

    def push(self, token):
        return chr(token + 32)

    def flush(self):
        return ""


def test_auto_says_which_it_is(capsys, monkeypatch):
    llm = LLM(tiny.MODEL, tokenizer=Letters(), compression=Auto(budget=Ratio(ratio=2)))
    monkeypatch.setattr(cli, "LLM", lambda *_, **__: llm)
    code, out = run(
        capsys, "--model", "any", "--prompt", "Hello", "--max-tokens", 3, "--compression", "auto", "--ratio", 2
    )
    assert code == 0
    assert out.err.count("jaxkv: auto scores by reading each prompt a second time\n") == 1


def test_the_text_goes_to_standard_output_and_the_figures_to_the_other(capsys, monkeypatch):
    llm = LLM(tiny.MODEL, tokenizer=Letters())
    monkeypatch.setattr(cli, "LLM", lambda *_, **__: llm)
    code, out = run(capsys, "--model", "any", "--prompt", "Hello", "--max-tokens", 3)
    assert code == 0
    made = llm.generate("Hello", SamplingParams(max_tokens=3))[0]
    assert out.out == made.text
    assert "prompt  5 tokens" in out.err
    assert f"answer  {len(made.token_ids)} tokens" in out.err
    assert f"{made.cache.blocks_held} of {made.cache.blocks_full} blocks of 16" in out.err


def test_an_unknown_byte_unit_is_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit) as end:
        run(capsys, "--model", "m", "--prompt", "x", "--max-cache-bytes", "5Q")
    assert end.value.code == 2
    assert "'5Q' is no number of bytes; write 500M, 2G or 1.5GiB" in capsys.readouterr().err


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
        ((*model, "--prompt", "x", "--compression", "kv-compress"), "needs a budget: a ratio, tokens or bytes"),
        ((*model, "--prompt", "x", "--compression", "none", "--ratio", 2), "keeps everything"),
        ((*model, "--prompt", "x", "--ratio", 2, "--window", -3), "window must be at least 1"),
        ((*model, "--prompt", "x", "--system", "y"), "--system needs --chat"),
        ((*model, "--prompt", "x", "--max-tokens", 0), "max_tokens must be at least 1"),
        ((*model, "--prompt", "x", "--plot", tmp_path / "no" / "p.png"), "is not a directory"),
        ((*model, "--prompt", "x", "--plot", tmp_path / "p.xyz"), "its name must end in one of "),
        ((*model, "--prompt", "x", "--ratio", "inf"), "ratio must be at least 1"),
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
    with pytest.raises(ValueError, match="no number of bytes"):
        byte_count(text)


def test_a_fault_of_ours_is_no_failed_line(monkeypatch, capsys):
    def broken(options, heed):
        raise RuntimeError("out of luck")

    monkeypatch.setitem(cli.COMMANDS, "generate", broken)
    assert main(["generate", "--model", "x", "--prompt", "y"]) == 70
    assert "RuntimeError: out of luck" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "schedule", "split"),
    [([], None, None), (["--schedule", "latency"], Latency(), None), (["--split-prompts"], None, True)],
    ids=str,
)
def test_a_jobs_schedule_is_the_models(said, schedule, split, monkeypatch, tmp_path):
    class LoadedError(Exception):
        pass

    def load(*_, **settings):
        assert settings["schedule"] == schedule
        assert settings["split_prompts"] is split
        raise LoadedError

    monkeypatch.setattr(cli, "LLM", load)
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"prompt": "x"}\n')
    files = ["--input", str(lines), "--output", str(tmp_path / "out.jsonl")]
    options = parser().parse_args(["batch", "--model", "m", *files, *said])
    assert ("split_prompts" in answer_settings(options)) == bool(split)
    with pytest.raises(LoadedError):
        cli.run_batch(options)
