"""Models by their names on the Hub, of which a server on the loopback address is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import TOKEN, Hub
from huggingface_hub import constants
from tiny_checkpoint import write_hf

from models import CheckpointError, load_model, load_tokenizer, resolve
from models.checkpoints.orbax import save
from models.huggingface import is_name

pytestmark = pytest.mark.once
ROOT = Path(__file__).parents[2]
CLUTTER = (
    "README.md",
    "pytorch_model.bin",
    "consolidated.safetensors",
    "original/model.safetensors",
    "onnx/model.onnx",
)


@pytest.fixture(scope="module")
def repos(tmp_path_factory, tiny_model):
    """A sharded directory with much beside it, one of our own, and two with GGUF files."""
    root = tmp_path_factory.mktemp("repos")
    big = write_hf(root / "big", tiny_model(), shards=3, tokenizer=True)
    for name in CLUTTER:
        (big / name).parent.mkdir(exist_ok=True)
        (big / name).write_text("not needed")
    save(tiny_model(), root / "ours", tokenizer_from=big)
    for folder, names in (
        ("one", ["a.gguf"]),
        ("many", ["q4.gguf", "q8-00001-of-00002.gguf", "q8-00002-of-00002.gguf"]),
    ):
        (root / folder).mkdir()
        for name in names:
            (root / folder / name).write_bytes(b"GGUF" + name.encode())
    return {f"acme__{name}": root / name for name in ("big", "ours", "one", "many")}


def at(url, monkeypatch):
    """As HF_ENDPOINT does, which is read at import."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(repos, tmp_path, monkeypatch):
    """The server, and a cache and an environment without anything of the user's."""
    with Hub(**repos) as server:
        monkeypatch.chdir(tmp_path)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        at(server.url, monkeypatch)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


def test_only_the_files_that_are_needed_are_fetched_and_only_once(hub, repos, tokens, forward, tiny_model):
    directory = resolve("acme/big")
    names = {
        path.relative_to(repos["acme__big"]).as_posix() for path in repos["acme__big"].rglob("*") if path.is_file()
    }
    assert set(hub.sent) == names - set(CLUTTER)
    np.testing.assert_array_equal(forward(load_model(directory), tokens), forward(tiny_model(), tokens))
    assert load_tokenizer(directory).chat_template is not None
    hub.sent.clear()
    assert resolve("acme/big") == resolve("acme/big@v1") == resolve(f"acme/big@{hub.commit('acme/big')}") == directory
    assert hub.sent == []


def test_our_own_checkpoints_are_fetched_whole(hub, tokens, forward, tiny_model):
    directory = resolve("acme/ours")
    np.testing.assert_array_equal(forward(load_model(directory), tokens), forward(tiny_model(), tokens))
    assert load_tokenizer(directory).eos_ids == (2,)


def test_a_gguf_file_is_fetched_by_its_name_or_where_it_is_the_only_one(hub):
    assert resolve("acme/one").name == "a.gguf"
    assert resolve("acme/many/q4.gguf@v1").read_bytes() == b"GGUFq4.gguf"
    hub.sent.clear()
    first = resolve("acme/many/q8-00001-of-00002.gguf")
    assert first.with_name("q8-00002-of-00002.gguf").exists()
    assert sorted(hub.sent) == ["q8-00001-of-00002.gguf", "q8-00002-of-00002.gguf"]
    with pytest.raises(
        CheckpointError, match=r"acme/many has no model\*\.safetensors and 2 GGUF files.*q4\.gguf, q8-00001"
    ):
        resolve("acme/many")
    with pytest.raises(CheckpointError, match=r"no file 'q5\.gguf'; its GGUF files are q4\.gguf"):
        resolve("acme/many/q5.gguf")


def test_a_path_that_exists_and_built_in_names_come_first(hub, tmp_path):
    (tmp_path / "acme" / "big").mkdir(parents=True)
    assert resolve("acme/big").resolve() == tmp_path / "acme" / "big"
    assert resolve("smollm2-135m").suffix == ".gguf"
    assert hub.sent == []


def test_private_and_gated_models_need_a_token(hub, monkeypatch):
    hub.private.add("acme/ours")
    hub.gated.add("acme/one")
    with pytest.raises(CheckpointError, match=r"no path 'acme/ours'.*or it is private.*HF_TOKEN"):
        resolve("acme/ours")
    with pytest.raises(CheckpointError, match=rf"acme/one is gated: accept its terms at {hub.url}/acme/one.*HF_TOKEN"):
        resolve("acme/one")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert resolve("acme/ours").is_dir()
    assert resolve("acme/one").name == "a.gguf"


def test_what_is_not_there_is_named(hub):
    with pytest.raises(CheckpointError, match=rf"no path 'acme/none', and no model of this name at {hub.url}"):
        resolve("acme/none")
    with pytest.raises(CheckpointError, match=r"acme/big has no revision 'v2'"):
        resolve("acme/big@v2")
    for name in (
        "acme",
        "acme/big/more",
        "acme/big@",
        "/acme/big",
        "./acme/big",
        "acme//big",
        "acme/..",
        "acme/big@a b",
    ):
        assert not is_name(name)
        with pytest.raises(CheckpointError, match="unknown model"):
            resolve(name)


def test_offline_what_was_fetched_is_there_and_nothing_else(hub, monkeypatch):
    directory, file = resolve("acme/big@v1"), resolve("acme/one")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.sent.clear()
    assert resolve("acme/big@v1") == directory
    assert resolve("acme/one") == file
    with pytest.raises(
        CheckpointError, match=r"no path 'acme/ours', HF_HUB_OFFLINE is set, and the cache .* doesn't have"
    ):
        resolve("acme/ours")
    assert hub.sent == []


def test_what_was_half_fetched_is_said_and_fetched_to_its_end(hub, monkeypatch):
    shard = "model-00002-of-00003.safetensors"
    hub.cut.add(shard)
    with pytest.raises(CheckpointError, match=r"can't fetch acme/big from .*Try again: what is there already is kept"):
        resolve("acme/big")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="doesn't have all of the model's files"):
        resolve("acme/big")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.cut.clear()
    hub.sent.clear()
    assert load_model(resolve("acme/big")).config.num_layers == 2
    assert set(hub.sent) <= {
        shard,
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
    } | {f"model-0000{i}-of-00003.safetensors" for i in (2, 3)}


def test_a_server_that_fails_or_is_not_there_is_said(hub, monkeypatch):
    hub.status = 500
    with pytest.raises(CheckpointError, match=r"no path 'acme/big', the Hub can't be reached at"):
        resolve("acme/big")
    at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(CheckpointError, match=r"no path 'acme/big', the Hub can't be reached at http://127\.0\.0\.1:9"):
        resolve("acme/big")


def test_the_command_line_takes_a_name_and_the_environment_that_the_library_reads(hub, tmp_path):
    arguments = ["generate", "--model", "acme/big@v1", "--prompt", "w3 w4 w5", "--chat", "--max-tokens", "3", "--json"]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jaxkv", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt_tokens"] == 8  # of the template: <s> user : w3 w4 w5 assistant :
    assert list((tmp_path / "home" / "hub").glob("models--acme--big/snapshots/*/config.json"))
