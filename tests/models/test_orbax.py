"""Our own checkpoints: what goes in comes out, and damage is named."""

import gc
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from models import CheckpointError, load_model
from models.checkpoints.assemble import parameters_of
from models.checkpoints.orbax import restore, save
from models.rope import RopeScaling


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embeddings": True, "rope_scaling": RopeScaling.linear(head_dim=16, factor=2.0), "bos_token_id": None},
        {"attention_bias": True, "output_bias": True, "qk_norm": True, "eos_token_ids": (2, 3)},
    ],
)
def test_a_saved_model_comes_back_bit_for_bit(changes, tiny_model, tmp_path, tokens, forward):
    model = tiny_model(**changes)
    save(model, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    assert loaded.config == model.config
    np.testing.assert_array_equal(forward(loaded, tokens), forward(model, tokens))


def test_dtype_converts(tiny_model, tmp_path):
    model = tiny_model()
    save(model, tmp_path / "saved")
    for path, leaf in parameters_of(restore(tmp_path / "saved", dtype=jnp.bfloat16)).items():
        np.testing.assert_array_equal(leaf[...], parameters_of(model)[path][...].astype(jnp.bfloat16))


def test_tokenizer_files_travel_along(tiny_model, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(CheckpointError, match="no tokenizer files"):
        save(tiny_model(), tmp_path / "saved", tokenizer_from=source)
    (source / "tokenizer.json").write_text("{}")
    (source / "model.safetensors").write_text("not copied")
    save(tiny_model(), tmp_path / "saved", tokenizer_from=source)
    assert (tmp_path / "saved" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "saved" / "model.safetensors").exists()


def test_a_checkpoint_is_never_overwritten(tiny_model, tmp_path):
    save(tiny_model(), tmp_path / "saved")
    with pytest.raises(CheckpointError, match="already holds a checkpoint"):
        save(tiny_model(), tmp_path / "saved")


@pytest.mark.parametrize("when", ["while the weights are written", "before the config", "while the config is written"])
def test_a_save_that_was_broken_off_is_said_and_replaced(when, tiny_model, tmp_path, monkeypatch):
    """Killed, or out of disk: the next save there succeeds, and until then loading says what is wrong."""
    directory = tmp_path / "saved"

    def broken(*_, **__):
        raise OSError("killed")

    model = tiny_model()
    with monkeypatch.context() as patch:
        if when == "while the config is written":
            patch.setattr(type(directory), "replace", broken)
        else:
            patch.setattr(type(directory), "write_text", broken)
        with pytest.raises(OSError, match="killed"):
            save(model, directory)
    if when == "while the weights are written":
        (directory / "weights").rename(directory / "weights.orbax-checkpoint-tmp")
    for load in (load_model, restore):
        with pytest.raises(CheckpointError, match=r"holds a save that was broken off\. Save the model there again"):
            load(directory)
    save(model, directory)
    assert sorted(path.name for path in directory.iterdir())[-1] == "weights"
    assert restore(directory).config == model.config


def test_weights_that_are_somebody_elses_are_left(tiny_model, tmp_path):
    mine = tmp_path / "weights" / "mine"
    mine.parent.mkdir()
    mine.write_text("not a checkpoint's")
    with pytest.raises(CheckpointError, match="already holds a checkpoint"):
        save(tiny_model(), tmp_path)
    assert mine.read_text() == "not a checkpoint's"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_is_named(tiny_model, tmp_path):
    directory = tmp_path / "saved"
    save(tiny_model(), directory)
    written = json.loads((directory / "llama.json").read_text())

    def fails(message, **changes):
        (directory / "llama.json").write_text(json.dumps({**written, **changes}))
        with pytest.raises(CheckpointError, match=message):
            restore(directory)

    fails(r"layers\.2\..*has shape None, expected", num_layers=3)
    fails(r"layers\.1\..*expected None", num_layers=1)
    fails(r"shape \(160, 64\), expected \(99, 64\)", vocab_size=99)
    fails(r"llama\.json isn't a config", colour="blue")
    fails(r"llama\.json isn't a config", num_heads=3)
    fails(r"llama\.json isn't a config", vocab_size="many")
    (directory / "llama.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"llama\.json isn't JSON"):
        load_model(directory)

    (directory / "llama.json").write_text(json.dumps(written))
    for file in (directory / "weights").rglob("*"):
        if file.is_file() and file.stat().st_size > 10_000:
            file.write_bytes(file.read_bytes()[:5_000])
    with pytest.raises(CheckpointError, match="weights is missing, incomplete or damaged"):
        load_model(directory)
    gc.collect()  # what the failed read left behind complains as it is collected: here, where that is ignored
    shutil.rmtree(directory / "weights")
    with pytest.raises(CheckpointError, match="weights is missing, incomplete or damaged"):
        load_model(directory)


def test_weights_that_are_not_finite_are_named(tiny_model, tmp_path):
    model = tiny_model()
    model.norm.scale.set_value(model.norm.scale[...].at[3].set(jnp.nan))
    save(model, tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"norm\.scale.*NaN"):
        load_model(tmp_path / "saved")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab_size", 160.0, r"vocab_size is 160\.0, expected an integer"),
        ("vocab_size", "160", "vocab_size is '160', expected an integer"),
        ("tie_embeddings", "no", "tie_embeddings is 'no', expected true or false"),
        ("rope_theta", True, "rope_theta is True, expected a finite number"),
        ("rms_norm_eps", 10**400, "rms_norm_eps is 1000.*expected a finite number"),
        ("head_dim", 2**33, "head_dim"),
        ("num_layers", 2**30, "too few for the 1073741824 layers"),
        ("num_layers", None, "num_layers"),
        ("bos_token_id", "<s>", "bos_token_id is '<s>', expected a token id"),
        ("specs", [{"window": 4}] * 2, "window=4"),
        ("unheard_of", 1, "'unheard_of', which isn't known"),
    ],
)
def test_our_own_config_is_checked_like_a_foreign_one(tiny_model, tmp_path, key, value, message):
    save(tiny_model(), tmp_path / "saved")
    path = tmp_path / "saved" / "llama.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "saved")


def test_a_config_nested_too_deeply_is_refused(tiny_model, tmp_path):
    save(tiny_model(), tmp_path / "saved")
    (tmp_path / "saved" / "llama.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"llama\.json isn't JSON that can be read"):
        load_model(tmp_path / "saved")
