"""Imports run downward only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"jaxkv", "models", "pallas_kernels", "scripts"}
ALLOWED = {
    "pallas_kernels": {"pallas_kernels"},
    "models": {"models"},
    "jaxkv": {"jaxkv", "models", "pallas_kernels"},
    "scripts": {"jaxkv", "models", "pallas_kernels"},
}
HOST = {
    "steps",
    "admission",
    "sharing",
    "engine",
    "reading",
    "room",
    "answers",
    "llm",
    "batch",
    "jobfile",
    "recordfile",
    "progress",
}
HOST |= {"cli", "requests", "report", "plot"}


def imports(path):
    """Modules that a file imports when it runs; those for the type checker alone don't count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_it_stands_on(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        ours = {name.split(".")[0] for name in imports(path)} & OURS
        assert ours <= ALLOWED[package], path


def test_the_functional_part_never_imports_the_host_side():
    functional = [p for p in (ROOT / "jaxkv").rglob("*.py") if p.stem not in HOST | {"__init__", "__main__"}]
    assert {p.stem for p in functional} >= {"cache", "allocator", "eviction", "prompt", "generation", "sampling"}
    for path in functional:
        upward = {name for name in imports(path) if name.split(".")[:1] == ["jaxkv"]} & {f"jaxkv.{m}" for m in HOST}
        assert not upward, path
