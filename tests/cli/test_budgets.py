"""A budget holds the same through every way in, after the prompt and while the answer grows."""

import json

import jax
import jax.numpy as jnp
import pytest
import tiny
from cli.test_cli import Letters

from jaxkv import LLM, KVCompress, MaxTokens, SamplingParams, compress, prefill, stats
from jaxkv.cli import commands as cli
from jaxkv.cli.main import main
from jaxkv.requests import Finished

pytestmark = pytest.mark.once

PROMPT = "".join(chr(32 + i) for i in tiny.prompt(200))
POLICY = KVCompress(budget=MaxTokens(tokens=64), compress_every=8)
BUDGET = ["--max-cache-tokens", "64", "--compress-every", "8"]
PARAMS = SamplingParams(max_tokens=40, ignore_eos=True)
HEADS, AFTER = 4, 64 // 16 * 4
"""Heads of all layers, and blocks that they hold together after the prompt."""


@pytest.fixture(scope="module")
def llm():
    return LLM(tiny.MODEL, tokenizer=Letters(), max_batch=1)


@pytest.fixture
def command(llm, monkeypatch, capsys):
    """The command line over one model, so that its programs are compiled once."""

    def load(_, *, compression, **settings):
        llm.compression = compression
        return llm

    monkeypatch.setattr(cli, "LLM", load)

    def run(*arguments):
        assert main([*arguments, "--max-tokens", "40"]) == 0
        llm.compression = None
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def held(llm):
    """Bytes of blocks and tables by the functional verbs: full, and within the budget."""

    def read(policy):
        cache = tiny.empty_cache()
        cache, _ = prefill(tiny.MODEL, cache, tiny.prompt(200)[None], jnp.array([200]), policy)
        return cache if policy is None else compress(cache, policy)

    full, small = (stats(jax.jit(read, static_argnums=0)(policy)) for policy in (None, POLICY))
    assert (full.blocks_held, small.blocks_held) == (13 * HEADS, AFTER)
    return full.bytes_held, small.bytes_held


def test_python(llm, held):
    full, small = (
        llm.generate(PROMPT, SamplingParams(max_tokens=40, ignore_eos=True, compression=policy))[0]
        for policy in (None, POLICY)
    )
    assert (full.cache.bytes_held, small.cache.bytes_held) == held
    assert full.cache_at_end.blocks_held == 15 * HEADS  # of 239 tokens
    assert AFTER < small.cache_at_end.blocks_held <= AFTER + HEADS
    llm.compression = POLICY
    [ran] = (e.completion for e in llm.run([(PROMPT, PARAMS)], max_context=256) if isinstance(e, Finished))
    llm.compression = None
    assert ran.token_ids == small.token_ids
    assert (ran.cache.bytes_held, ran.cache_at_end.bytes_held) == (held[1], small.cache_at_end.bytes_held)


def test_the_command_line(command, held):
    for budget, size, most in ([], held[0], 15 * HEADS), (BUDGET, held[1], AFTER + HEADS):
        said = json.loads(command("generate", "--model", "any", "--prompt", PROMPT, "--json", *budget))
        assert said["cache"]["bytes_held"] == size
        assert said["cache_at_end"]["blocks_held"] <= most


def test_a_job_and_its_lines(command, held, tmp_path):
    """A budget for all lines, and a line's own."""
    lines = [{"prompt": PROMPT}, {"prompt": PROMPT, "compression": "none"}]
    lines.append({"prompt": PROMPT, "compression": "kv-compress", "max_cache_tokens": 64, "compress_every": 8})
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    files = ["--input", str(source), "--output", str(output)]
    command("batch", "--model", "any", *files, "--max-batch", "1", "--max-context", "256", *BUDGET)
    made = {record["line"]: record for record in map(json.loads, output.read_text().splitlines())}
    assert [made[i]["cache_bytes_held"] for i in (1, 2, 3)] == [held[1], held[0], held[1]]
    assert made[1]["token_ids"] == made[3]["token_ids"] != made[2]["token_ids"]
