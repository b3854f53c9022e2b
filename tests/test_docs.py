"""The worked examples in docs/ and README.md run as they stand."""

import re
from pathlib import Path

import pytest

import jaxkv.llm

ROOT = Path(__file__).parents[1]


def examples(name):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "name", ["docs/functional.md", "docs/policies.md", "docs/kernels.md", "docs/tiers.md", "README.md"]
)
def test_examples_run(name, monkeypatch):
    monkeypatch.setattr(jaxkv.llm, "_compiles_stacked_layers_well", lambda: True)  # 30 unrolled ones take a minute
    found = examples(name)
    assert found
    names: dict = {"__name__": "example"}
    for code in found:
        exec(compile(code, name, "exec"), names)


@pytest.mark.parametrize(("place", "name"), [(0, "last_queries"), (-1, "all_k8v4")])
def test_the_examples_of_the_docs_are_those_that_tests_import(place, name):
    code = (ROOT / "tests" / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert examples("docs/policies.md")[place] == code
    assert len(code.splitlines()) <= 40
