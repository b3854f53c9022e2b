"""Conversion to a checkpoint of our own: the same model, tokenizer and choices, whatever interrupts it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import write_hf

from jaxkv.cli.main import main
from models import CheckpointError, load_model, load_tokenizer
from models.checkpoints import orbax
from models.checkpoints.assemble import parameters_of
from models.convert import convert, stored_dtype
from models.generation_config import sampling_defaults

pytestmark = pytest.mark.once
ROOT = Path(__file__).parents[2]
SAYS = {"do_sample": True, "temperature": 0.6, "top_k": 5, "eos_token_id": [2, 9]}
MESSAGES = [{"role": "user", "content": "w3 w4"}]


@pytest.fixture
def source(tmp_path, tiny_model):
    made = write_hf(tmp_path / "source", tiny_model(), shards=2, tokenizer=True)
    (made / "generation_config.json").write_text(json.dumps(SAYS))
    return made


def test_a_converted_checkpoint_is_what_it_was_made_of(source, tmp_path, tokens, forward, capsys):
    target = tmp_path / "new" / "converted"
    assert main(["convert", "--model", str(source), "--output", str(target)]) == 0
    assert "converted holds 0.00 GB of weights (float32)" in capsys.readouterr().err
    old, new = load_model(source), load_model(target)
    assert new.config == old.config
    np.testing.assert_array_equal(forward(new, tokens), forward(old, tokens))
    assert sampling_defaults(target) == sampling_defaults(source)
    before, after = load_tokenizer(source), load_tokenizer(target)
    assert after.eos_ids == before.eos_ids == (2, 9)
    assert after.encode_chat(after.chat(MESSAGES)) == before.encode_chat(before.chat(MESSAGES))
    assert not list(tmp_path.rglob("*.safetensors.part"))


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [(["bfloat16"], "bfloat16"), (["float16"], "float32"), (["bfloat16", "float32"], "float32")],
)
def test_weights_are_written_as_wide_as_they_are_stored(kinds, expected, tmp_path, tiny_model, monkeypatch):
    source, target = write_hf(tmp_path / "source", tiny_model(), tokenizer=True), tmp_path / "target"
    tensors = load_file(source / "model.safetensors")
    changed = {name: value.astype(jnp.dtype(kinds[i % len(kinds)])) for i, (name, value) in enumerate(tensors.items())}
    save_file(changed, source / "model.safetensors")
    assert stored_dtype(source).name == expected
    assert main(["convert", "--model", str(source), "--output", str(target)]) == 0
    assert orbax.stored_dtypes(target) == {jnp.dtype(expected)}
    assert stored_dtype(target).name == expected
    for path, leaf in parameters_of(load_model(target)).items():
        np.testing.assert_array_equal(leaf[...], parameters_of(load_model(source))[path][...])
    assert main(["convert", "--model", str(source), "--output", str(tmp_path / "b"), "--weights", "bfloat16"]) == 0
    assert orbax.stored_dtypes(tmp_path / "b") == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("when", ["weights", "tokenizer", "config"])
def test_an_interrupted_conversion_is_noticed_and_done_again(when, source, tmp_path, monkeypatch, capsys):
    target = tmp_path / "target"

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        match when:
            case "weights":  # what Orbax leaves where it is killed
                (target / "weights.orbax-checkpoint-tmp-3").mkdir(parents=True)
                patch.setattr(orbax, "save", killed)
            case "tokenizer":
                patch.setattr(orbax.shutil, "copyfile", killed)
            case "config":
                patch.setattr(Path, "replace", killed)
        assert main(["convert", "--model", str(source), "--output", str(target)]) == 130
    with pytest.raises(CheckpointError, match="save that was broken off"):
        load_model(target)
    assert main(["convert", "--model", str(source), "--output", str(target)]) == 0
    assert load_model(target).config == load_model(source).config
    assert sorted(path.name for path in target.iterdir()) == [
        *("chat_template.jinja", "generation_config.json", "llama.json", "tokenizer.json"),
        *("tokenizer_config.json", "weights"),
    ]


def test_a_killed_process_leaves_what_is_done_again(source, tmp_path):
    """In earnest: SIGKILL as soon as the first of the output is there."""
    target = tmp_path / "target"
    command = [sys.executable, "-m", "jaxkv", "convert", "--model", str(source), "--output", str(target)]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        while process.poll() is None and not target.exists():
            time.sleep(0.002)
        process.kill()
    left = sorted(path.name for path in target.iterdir())
    assert "llama.json" not in left or process.returncode == 0
    if "llama.json" not in left:
        with pytest.raises(CheckpointError):
            load_model(target)
        assert main(["convert", "--model", str(source), "--output", str(target)]) == 0
    assert load_model(target).config == load_model(source).config


def test_what_is_in_the_way_is_named_and_left(source, tmp_path, capsys):
    mine = tmp_path / "mine" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")

    def says(output, model=source):
        assert main(["convert", "--model", str(model), "--output", str(output)]) == 2
        return capsys.readouterr().err

    assert "mine already holds 'notes.txt', expected an empty directory" in says(mine.parent)
    assert "notes.txt is a file, expected a directory" in says(mine)
    assert "source already holds 'chat_template.jinja'" in says(source)
    assert main(["convert", "--model", str(source), "--output", str(tmp_path / "done")]) == 0
    capsys.readouterr()
    assert "done already holds a checkpoint" in says(tmp_path / "done")
    assert "unknown model" in says(tmp_path / "new", "nothing")
    (source / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in says(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_it_is_restored_on_another_number_of_devices(source, tmp_path, tokens, forward):
    """Written where there are four, read where there is one."""
    target = tmp_path / "target"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jaxkv", "convert", "--model", str(source), "--output", str(target)]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(forward(load_model(target), tokens), forward(load_model(source), tokens))


def test_conversion_asks_its_loader_for_the_weights(source, tmp_path):
    asked = []

    def load(path):
        asked.append(path)
        return load_model(path, dtype=jnp.bfloat16)

    model = convert(source, tmp_path / "target", load)
    assert asked == [source]
    assert model.config == load_model(tmp_path / "target").config


@pytest.mark.parametrize(("weights", "codes"), [("int8", jnp.int8), ("fp8", jnp.float8_e4m3fn)])
def test_weights_are_quantised_where_that_is_asked_for(weights, codes, source, tmp_path, tokens, forward):
    target = tmp_path / "target"
    assert main(["convert", "--model", str(source), "--output", str(target), "--weights", weights]) == 0
    model = load_model(target, weights="stored")
    assert jnp.dtype(codes) in {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))}
    np.testing.assert_array_equal(forward(model, tokens), forward(load_model(source, weights=weights), tokens))
