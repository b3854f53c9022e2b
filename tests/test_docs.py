"""The worked examples in docs/ and README.md run as they stand."""

import re
import shlex
from pathlib import Path

import pytest

import jaxkv.llm
from jaxkv.cli.main import main

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


@pytest.mark.parametrize(("place", "name"), [(0, "last_queries"), (1, "at_random"), (-1, "all_k8v4")])
def test_the_examples_of_the_docs_are_those_that_tests_import(place, name):
    code = (ROOT / "tests" / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert examples("docs/policies.md")[place] == code
    assert len(code.splitlines()) <= 40


@pytest.mark.once
def test_the_commands_of_a_conversion_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jaxkv.llm, "_compiles_stacked_layers_well", lambda: True)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    convert, generate = (shlex.split(line)[3:] for line in block.splitlines())
    assert main(convert) == main(generate) == 0
    assert len(capsys.readouterr().out) > 20
