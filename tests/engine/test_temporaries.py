"""A cache leaves room for what the programs take beside it, which the compiler says before there is a cache."""

from collections import Counter
from dataclasses import replace

import pytest
import tiny

from jaxkv import LLM, Auto, KVCompress, Ratio, SamplingParams
from jaxkv.engine.devices import OneDevice

pytestmark = pytest.mark.once

MODEL = tiny.random_model(replace(tiny.CONFIG, max_context=1024))
POLICIES = {
    "full cache": None,
    "last queries": KVCompress(budget=Ratio(ratio=3), window=8, protected_window=8, compress_every=16),
    "read again": Auto(budget=Ratio(ratio=3), reread=True),
}
CONTEXT = 768


def whole_cache(policy, rows: int) -> int:
    """Bytes of whole contexts."""
    return LLM(MODEL, compression=policy)._new_config(policy, CONTEXT, rows=rows).nbytes


def has(monkeypatch, memory: int) -> None:
    monkeypatch.setattr(OneDevice, "memory", lambda self: (memory, memory * 9 // 10))


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_compiled_to_know_is_what_runs(policy, monkeypatch):
    llm = LLM(MODEL, compression=POLICIES[policy], max_batch=2)
    compiled = Counter()
    llm.on_compile = lambda name: compiled.update([name])
    monkeypatch.setattr("jaxkv.engine.sizing.AMPLE", 0)  # so that it is always asked
    config = llm._cache_config(CONTEXT, rows=2)
    known = Counter(compiled)
    assert {"start", "chunk", "finish", "decode"} <= set(known)
    assert ("compress_rows" in known) == (llm.compression is not None)
    llm.generate([tiny.prompt(600, seed) for seed in range(2)], SamplingParams(max_tokens=40, ignore_eos=True))
    assert llm.engine.config == config
    assert compiled["decode"] == known["decode"] == 1
    assert compiled["chunk"] == known["chunk"] + 1  # what is left of both, read together


def test_a_cache_is_smaller_by_what_the_programs_take(monkeypatch):
    llm = LLM(MODEL, compression=POLICIES["last queries"], max_batch=64)
    whole = whole_cache(llm.compression, 64)
    has(monkeypatch, 2 * whole)
    assert llm._new_config(llm.compression, CONTEXT, rows=64).nbytes == whole
    assert llm._programs is None  # there is plenty, and nothing to know
    has(monkeypatch, whole)
    tight = llm._new_config(llm.compression, CONTEXT, rows=64)
    needed = llm._programs.temporary_bytes
    assert needed > 0.1 * whole
    assert 0.9 * whole < tight.nbytes + needed <= 0.95 * whole


def test_memory_that_leaves_the_programs_nothing_is_refused(monkeypatch):
    llm = LLM(MODEL, max_batch=64)
    has(monkeypatch, machine := whole_cache(None, 64))
    llm.cache_memory = machine - 1000
    with pytest.raises(ValueError, match=r"more than the \d+ that this machine can give it beside the \d+ that"):
        llm._new_config(None, CONTEXT, rows=64)
