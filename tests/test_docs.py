"""The worked examples in docs/ and README.md run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def examples(name):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "name", ["docs/functional.md", "docs/policies.md", "docs/kernels.md", "docs/tiers.md", "README.md"]
)
def test_examples_run(name):
    found = examples(name)
    assert found
    names: dict = {"__name__": "example"}
    for code in found:
        exec(compile(code, name, "exec"), names)


def test_the_policy_of_the_docs_frees_blocks():
    import jax
    import numpy as np
    import tiny

    from jaxkv import compress, prefill, stats

    names: dict = {"__name__": "example"}
    exec(examples("docs/policies.md")[0], names)
    policy = names["policy"]
    tokens, lengths = tiny.padded([tiny.prompt(200)])
    cache, _ = jax.jit(lambda c: prefill(tiny.MODEL, c, tokens, lengths, policy))(tiny.empty_cache())
    after = jax.jit(lambda c: compress(c, policy))(cache)
    assert stats(after).blocks_held == stats(cache).blocks_held // 4
    for layer, head in np.ndindex(2, 2):
        assert set(range(4)) <= set(tiny.by_position(after, after.scores, layer, 0, head))
