"""Set-up of the scripts: which Pythons they take, and what failed to install is not recorded as there."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "basename", "cat", "cp", "dirname", "mkdir", "rm", "uname")
PYTHON = """#!/bin/sh
# Stands for an interpreter: tells its version, makes environments of itself, and pip does as a file says.
case "$*" in
    *ensurepip*) ;;
    *sys.version*) echo "$(basename "$0") {version}" ;;
    "-m venv"*)
        mkdir -p "$4/bin" && rm -f "$4/.installed" "$4/.compilers"
        for tool in python ruff pyright; do cp "$0" "$4/bin/$tool"; done ;;
    *"pip install"* | "-m pytest"*) echo "{version} $*" >>{log}; exit "$(cat {status})" ;;
esac
"""


@pytest.fixture
def shell(tmp_path):
    """Runs a script where only these Pythons are at hand, in a project of only scripts, with pip's exit status to set;
    gives its own, and the installs and tests so far."""
    log, status, tools = tmp_path / "log", tmp_path / "status", tmp_path / "tools"
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("*.py"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    log.touch()
    tools.mkdir()
    for tool in TOOLS:
        (tools / tool).symlink_to(shutil.which(tool))

    def run(script, *, pip=0, pythons=("3.11", "3.12")):
        status.write_text(str(pip))
        for version in pythons:
            python = tools / f"python{version}"
            python.write_text(PYTHON.format(version=version, log=log, status=status))
            python.chmod(0o755)
        setup = f'uname() {{ echo Linux x86_64; }}; export -f uname; source scripts/lib.sh; cd "{tmp_path}"; {script}'
        environment = {"PATH": str(tools), "PYENV_ROOT": str(tmp_path)}
        done = subprocess.run(["bash", "-c", setup], capture_output=True, text=True, cwd=tmp_path, env=environment)
        return done.returncode, log.read_text().splitlines()

    return run


@pytest.fixture
def counted(shell):
    """As ``shell``, with the number of installs."""

    def run(script, *, pip=0):
        code, done = shell(script, pip=pip)
        return code, len(done)

    return run


def test_a_failed_install_is_tried_again(counted):
    venv = 'ensure_venv venv "$(find_python 3.11)" test "jax==1"'
    assert counted(venv, pip=1) == (1, 1)
    assert counted(f"{venv} || echo failed", pip=1) == (0, 2)
    assert counted(f"set -e; {venv}; echo never", pip=1) == (1, 3)
    assert counted(venv) == (0, 4)
    assert counted(venv) == (0, 4)


def test_what_is_asked_for_differently_is_installed_anew(counted):
    for count, script in enumerate(
        (
            'ensure_venv venv "$(find_python 3.11)" test "jax==1"',
            'ensure_venv venv "$(find_python 3.12)" test "jax==1"',
            'ensure_venv venv "$(find_python 3.12)" test "jax==2"',
            'ensure_venv venv "$(find_python 3.12)" lint "jax==2"',
        ),
        1,
    ):
        assert counted(script) == (0, count)
        assert counted(script) == (0, count)


def test_an_interpreter_that_fails_is_said(counted):
    code, installs = counted('ensure_venv venv "$PWD/no-such-python" test')
    assert code != 0
    assert installs == 0


def test_failed_compilers_are_tried_again_and_are_one_pythons(counted):
    compilers = "ensure_compilers venv 1 2"
    assert counted('ensure_venv venv "$(find_python 3.11)" test') == (0, 1)
    assert counted(compilers, pip=1) == (1, 2)
    assert counted(compilers) == (0, 4)
    assert counted(compilers) == (0, 4)
    assert counted(f'ensure_venv venv "$(find_python 3.12)" test && {compilers}') == (0, 7)


@pytest.mark.parametrize("pythons", [("3.11", "3.12"), ("3.13",), ("3.11", "3.13", "3.14")])
def test_the_newest_python_is_taken(shell, pythons):
    code, [install] = shell('ensure_venv venv "$(find_any_python)" test', pythons=pythons)
    assert code == 0
    assert install.startswith(pythons[-1])


def test_without_a_python_there_is_no_environment(shell):
    assert shell('set -e; python="$(find_any_python)"; ensure_venv venv "$python" test', pythons=("3.10",)) == (1, [])


OLDEST, BETWEEN, NEWEST = "jax==0.10.2", "jax==0.11.2", "jax==0.12.0.1"


@pytest.mark.parametrize(
    ("pythons", "arguments", "whole", "parts"),
    [
        (("3.11", "3.12", "3.13"), "", ("3.11", OLDEST), [("3.13", NEWEST)]),
        (("3.11", "3.12", "3.14"), "--all", ("3.11", OLDEST), [("3.14", NEWEST), ("3.12", BETWEEN)]),
        (("3.13",), "", ("3.13", NEWEST), []),
        (("3.12",), "--all", ("3.12", NEWEST), [("3.12", BETWEEN)]),
        (("3.11",), "--all", ("3.11", OLDEST), []),
    ],
)
def test_tests_run_whole_once_and_in_part_on_other_versions(shell, pythons, arguments, whole, parts):
    code, done = shell(f"bash scripts/test.sh {arguments} -x", pythons=pythons)
    assert code == 0
    jax = [
        (line.split()[0], next(w for w in line.split() if w.startswith("jax=="))) for line in done if "jaxlib" in line
    ]
    assert jax == [whole, *parts]
    runs = [line.split(" ", 1) for line in done if "pytest" in line and "install" not in line]
    assert [version for version, _ in runs] == [version for version, _ in jax]
    assert all(run.endswith(" -x") and "not slow" in run for _, run in runs)
    assert ["tests/kernels" in run and "not once" in run for _, run in runs] == [False] + [True] * len(parts)


def test_without_a_python_tests_fail(shell):
    assert shell("bash scripts/test.sh", pythons=("3.10",)) == (1, [])
