"""Imports run downward only: each folder may import what stands below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [
    {"pallas_kernels", "models"},
    {"jaxkv.version", "jaxkv.words"},
    {"jaxkv.checks"},
    {"jaxkv.dtypes"},
    {"jaxkv.cache"},
    {"jaxkv.compression"},
    {"jaxkv.policies"},
    {"jaxkv.generation"},
    {"jaxkv.requests"},
    {"jaxkv.report"},
    {"jaxkv.engine"},
    {"jaxkv.arguments"},
    {"jaxkv.serving"},
    {"jaxkv.context"},
    {"jaxkv.llm"},
    {"jaxkv.batch"},
    {"jaxkv.cli"},
    {"jaxkv.public"},
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
    folders = {
        "jaxkv." + path.stem for path in (ROOT / "jaxkv").iterdir() if path.stem[:2] != "__" and path.suffix != ".typed"
    }
    assert folders == {name for name in FLOOR if name.startswith("jaxkv.")}


PACKAGES = [path for path in FILES if "scripts" not in path.parts]


def ours(name):
    """The module that an import names, where it is one of our packages'."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        if path.with_suffix(".py").exists() or (path / "__init__.py").exists():
            return ".".join(parts[:length]) if parts[0] in ("pallas_kernels", "models", "jaxkv") else None
    return None


def test_no_imports_go_in_circles():
    """Those for the type checker count; a package's ``__init__`` stands for what it re-exports, and is left out."""
    graph = {
        module_of(path): {ours(name) for name in imports(path)} - {None, module_of(path)}
        for path in PACKAGES
        if path.stem != "__init__"
    }
    done, open_ones = set(), []

    def visit(module):
        assert module not in open_ones, " -> ".join([*open_ones[open_ones.index(module) :], module])
        if module in graph and module not in done:
            open_ones.append(module)
            for other in graph[module]:
                visit(other)
            done.add(open_ones.pop())

    for module in graph:
        visit(module)


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)]


HEAVY = {
    "jaxkv.cli.plot": "matplotlib",
    "jaxkv.cli.main": "jaxkv",
    "jaxkv.cli.commands": "jaxkv",
    "jaxkv.batch.over_ray": "ray",
    "jaxkv.batch.parquet": "pyarrow",
}
"""What a file imports only once it is needed."""


@pytest.mark.parametrize("path", PACKAGES, ids=module_of)
def test_imports_stand_at_the_top(path):
    late = {
        name.split(".")[0]
        for function in functions(path)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert late <= {HEAVY.get(module_of(path))}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_and_functions_are_short(path):
    """But for kernels and what builds them, of which a file has at most 300 lines."""
    lines = len(path.read_text(encoding="utf-8").splitlines())
    is_kernel = path.parent.parent.name == "pallas_kernels" and path.stem.startswith(("tpu", "gpu"))
    assert lines <= (300 if is_kernel else 400)
    if not is_kernel:
        assert {f.name: f.end_lineno - f.lineno + 1 for f in functions(path) if f.end_lineno - f.lineno >= 60} == {}


@pytest.mark.parametrize("name", ["decode_step", "compress"])
def test_there_is_one_of_each_verb(name):
    found = [f for path in PACKAGES if "jaxkv" in path.parts for f in functions(path) if f.name == name]
    assert len(found) == 1
