"""Imports run downward only: each folder may import what stands below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [
    {"pallas_kernels", "models"},
    {"jaxkv.cache"},
    {"jaxkv.compression"},
    {"jaxkv.policies"},
    {"jaxkv.generation"},
    {"jaxkv.requests"},
    {"jaxkv.report"},
    {"jaxkv.engine"},
    {"jaxkv.llm"},
    {"jaxkv.batch"},
    {"jaxkv.cli"},
    {"jaxkv"},
    {"scripts"},
]
FLOOR = {name: floor for floor, names in enumerate(ORDER) for name in names}
SCRIPTS = {path.stem for path in (ROOT / "scripts").iterdir()}


def home_of(module):
    """The entry of ``ORDER`` that a module belongs to; None: it isn't ours."""
    parts = module.split(".")
    for length in (2, 1):
        if ".".join(parts[:length]) in FLOOR:
            return ".".join(parts[:length])
    return "scripts" if parts[0] in SCRIPTS else None


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """Modules that a file imports, those for the type checker alone included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = sorted(
    path for package in ("pallas_kernels", "models", "jaxkv", "scripts") for path in (ROOT / package).rglob("*.py")
)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_imports_only_what_stands_below_it(path):
    home = home_of(module_of(path)) or "scripts"
    for name in imports(path):
        other = home_of(name)
        if other not in (None, home):
            assert FLOOR[other] < FLOOR[home], f"{path} imports {name}"


def test_every_folder_has_its_floor():
    folders = {"jaxkv." + path.stem for path in (ROOT / "jaxkv").iterdir() if path.stem[:2] != "__"}
    assert folders == {name for name in FLOOR if name.startswith("jaxkv.")}
