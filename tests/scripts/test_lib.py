"""Set-up of the scripts: what failed to install is not recorded as there, for callers with and without ``set -e``."""

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

LIB = Path(__file__).parents[2] / "scripts" / "lib.sh"
PYTHON = """#!/bin/sh
# Stands for an interpreter: tells its version, makes environments of itself, and pip does as a file says.
case "$*" in
    *sys.version*) echo "$(basename "$0") {version}" ;;
    "-m venv"*) mkdir -p "$4/bin" && rm -f "$4/.installed" "$4/.compilers" && cp "$0" "$4/bin/python" ;;
    *"pip install"*) echo "$*" >>{log}; exit "$(cat {status})" ;;
esac
"""


@pytest.fixture
def shell(tmp_path):
    """Runs a script with two Pythons at hand and pip's exit status to set; gives its own and the installs so far."""
    log, status = tmp_path / "log", tmp_path / "status"
    log.touch()
    for version in ("3.11", "3.12"):
        python = tmp_path / f"python{version}"
        python.write_text(PYTHON.format(version=version, log=log, status=status))
        python.chmod(0o755)

    def run(script, *, pip=0):
        status.write_text(str(pip))
        setup = f'uname() {{ echo Linux x86_64; }}; source "{LIB}"; cd "{tmp_path}"; {script}'
        done = subprocess.run(["bash", "-c", setup], capture_output=True, text=True)
        return done.returncode, len(log.read_text().splitlines())

    return run


def test_a_failed_install_is_tried_again(shell):
    venv = 'ensure_venv venv "$PWD/python3.11" test "jax==1"'
    assert shell(venv, pip=1) == (1, 1)
    assert shell(f"{venv} || echo failed", pip=1) == (0, 2)
    assert shell(f"set -e; {venv}; echo never", pip=1) == (1, 3)
    assert shell(venv) == (0, 4)
    assert shell(venv) == (0, 4)


def test_what_is_asked_for_differently_is_installed_anew(shell):
    for count, script in enumerate(
        (
            'ensure_venv venv "$PWD/python3.11" test "jax==1"',
            'ensure_venv venv "$PWD/python3.12" test "jax==1"',
            'ensure_venv venv "$PWD/python3.12" test "jax==2"',
            'ensure_venv venv "$PWD/python3.12" lint "jax==2"',
        ),
        1,
    ):
        assert shell(script) == (0, count)
        assert shell(script) == (0, count)


def test_an_interpreter_that_fails_is_said(shell):
    code, installs = shell('ensure_venv venv "$PWD/no-such-python" test')
    assert code != 0
    assert installs == 0


def test_failed_compilers_are_tried_again_and_are_one_pythons(shell):
    compilers = "ensure_compilers venv 1 2"
    assert shell('ensure_venv venv "$PWD/python3.11" test') == (0, 1)
    assert shell(compilers, pip=1) == (1, 2)
    assert shell(compilers) == (0, 4)
    assert shell(compilers) == (0, 4)
    assert shell(f'ensure_venv venv "$PWD/python3.12" test && {compilers}') == (0, 7)
