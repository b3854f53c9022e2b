"""The command line as a process of its own: how soon it is there, and what it makes of its surroundings."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxkv.words import BUDGETS, POLICIES

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
SPEAKS = """
import sys, time
from cli.speaker import Speaker
from jaxkv.cli import commands
from jaxkv.cli.main import main
commands.LLM = lambda *_, **__: Speaker()
sys.exit(main(sys.argv[1:]))
"""
"""A command line with a model that says at once what it is told to."""
GENERATE = ("generate", "--model", "any", "--prompt")


def start(*arguments, program=("-m", "jaxkv"), redirect="", **settings):
    """A process; ``redirect`` is what a shell does with its streams."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"} | settings
    command = ["sh", "-c", f'exec "$0" "$@" {redirect}', sys.executable, *program, *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_interrupts
    )


def heed_interrupts():
    """Also where the tests themselves run behind a shell that has them ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(*arguments, **settings):
    process = start(*arguments, **settings)
    out, errors = process.communicate(timeout=120)
    return process.returncode, out.decode("utf-8", "replace"), errors.decode("utf-8", "replace")


def speak(text, *more, **settings):
    return run(*GENERATE, text, *more, program=("-c", SPEAKS), **settings)


@pytest.mark.parametrize("arguments", [("--help",), ("generate", "--help"), ("batch", "--help"), ("--version",)])
def test_help_imports_nothing_heavy(arguments):
    heavy = "import sys; from jaxkv.cli.main import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    heavy += "sys.exit(' '.join({'jax', 'numpy', 'flax', 'tokenizers'} & sys.modules.keys()))"
    code, out, errors = run(*arguments, program=("-c", heavy))
    assert (code, errors) == (1, "\n")
    assert "jaxkv" in out


def test_help_is_there_at_once():
    def seconds():
        began = time.perf_counter()
        assert run("--help")[0] == 0
        return time.perf_counter() - began

    assert min(seconds() for _ in range(3)) < 0.5


def test_a_wrong_option_is_refused_at_once():
    code, _, errors = run(*GENERATE, "x", "--ratio", "much")
    assert code == 2
    assert "invalid float value: 'much'" in errors


def test_the_words_are_the_policies_own():
    from jaxkv.policies import names

    assert tuple(names.POLICIES) == POLICIES
    assert tuple(names.BUDGETS) == BUDGETS


def test_the_version_is_one():
    from importlib.metadata import version

    import jaxkv

    assert run("--version")[1] == f"jaxkv {jaxkv.__version__}\n"
    assert version("jaxkv") == jaxkv.__version__


def test_public_names_are_those_of_the_type_checker():
    import jaxkv
    from jaxkv import public

    names = {name for name in vars(public) if not name.startswith("_")}
    assert {"LLM", "KVCompress", "compress", "generate", "SamplingParams", "stats"} <= names <= set(dir(jaxkv))
    assert all(getattr(jaxkv, name) is getattr(public, name) for name in names)
    assert not hasattr(jaxkv, "no_such_name")
    everything = {}
    exec("from jaxkv import *", everything)
    assert names <= everything.keys()
    for package in ("jaxkv", "models", "pallas_kernels"):
        assert (ROOT / package / "py.typed").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"JAX_PLATFORMS": "abacus"}, "JAX can't run with JAX_PLATFORMS='abacus'"),
        ({"JAX_ENABLE_X64": "perhaps"}, "perhaps"),
    ],
)
def test_surroundings_that_jax_refuses_are_named(settings, message):
    code, _, errors = run(*GENERATE, "x", **settings)
    assert code == 2
    assert errors.startswith("jaxkv: ")
    assert message in errors
    assert "Traceback" not in errors


def test_letters_that_standard_output_lacks_are_replaced_and_that_is_said():
    code, out, errors = speak("a café for 2 €", PYTHONIOENCODING="ascii")
    assert (code, out) == (0, "a caf? for 2 ?")
    assert "standard output is ascii, which lacks letters of the answer" in errors
    code, out, errors = speak("a café", PYTHONIOENCODING="utf-8")
    assert (code, out, "lacks" in errors) == (0, "a café", False)
    code, out, errors = speak("a café", "--json", PYTHONIOENCODING="ascii")
    assert (code, json.loads(out)["text"], "lacks" in errors) == (0, "a café", False)
    assert run("batch", "--help", PYTHONIOENCODING="ascii")[0] == 0


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full", "2>&- <&-", "2>/dev/full <&-"])
def test_an_answer_needs_no_standard_error(redirect):
    code, out, _ = speak("fine", redirect=redirect)
    assert (code, out) == (0, "fine")
    code, out, _ = run(*GENERATE, "x", "--ratio", "0.5", redirect=redirect)
    assert (code, out) == (2, "")


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full", "2>&- <&- >&-"])
def test_a_job_needs_no_standard_error(tmp_path, redirect):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    arguments = ("batch", "--model", "any", "--input", str(source), "--output", str(output))
    assert run(*arguments, program=("-c", SPEAKS), redirect=redirect)[0] == 0
    assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == ["one", "two"]


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_an_answer_that_can_not_be_written_is_no_success(more):
    code, _, errors = speak("lost", *more, redirect=">&-")
    assert code == 2
    assert "standard output is closed" in errors
    code, _, errors = speak("lost", *more, redirect=">/dev/full")
    assert code == 2
    assert "No space left on device" in errors
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors


LONG = ("generate", "--model", "smollm2-135m", "--prompt", "x", "--max-tokens", "4000")


@pytest.mark.parametrize("after", [0.3, 1.2, 6.0])
def test_a_command_is_stopped_wherever_it_is(after):
    """While it imports, reads the model, compiles, decodes."""
    process = start(*LONG)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=120)[1].decode()
    assert (process.returncode, errors.splitlines()[-1:]) == (130, ["jaxkv: stopped"])
    assert "Traceback" not in errors


def test_the_second_interrupt_ends_it_at_once():
    process = start(*LONG)
    for pause in (0.3, 0.5):
        time.sleep(pause)
        process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=10)[1].decode()
    assert process.returncode == -signal.SIGINT  # 130 to a shell
    assert "Traceback" not in errors


def test_the_second_interrupt_ends_it_while_python_has_no_say():
    process = start(*GENERATE, "compile", program=("-c", SPEAKS))
    assert process.stderr.readline() == b"compiling\n"
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10) == (b"", b"")
    assert process.returncode == 130


def test_an_interrupt_within_a_callback_is_heard():
    code, _, errors = speak("interrupt")
    assert (code, errors.splitlines()[-1:]) == (130, ["jaxkv: stopped"])
    assert "Traceback" not in errors


def test_who_ignores_interrupts_goes_on_ignoring_them():
    ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + SPEAKS
    code, out, _ = run(*GENERATE, "interrupt", program=("-c", ignoring))
    assert (code, out) == (0, "interrupt")
