"""Loading models that are large beside the host's memory: one tensor at a time, files in parts, and a bar."""

import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import write_hf

from models import CheckpointError, LlamaConfig, load_model, load_tokenizer
from models.checkpoints import progress
from models.checkpoints.assemble import parameters_of
from models.checkpoints.gguf_file import GgufFile, ggufs_in
from models.llama import GGUF_NAMES, Llama

pytestmark = pytest.mark.once


def gguf_tensors(model):
    """Linear weights as [out, in]; the rows of queries and keys as Qwen has them, which is as ours."""
    return {
        GGUF_NAMES(path, model.config).name: np.asarray(leaf[...]).T if path[-1] == "kernel" else np.asarray(leaf[...])
        for path, leaf in parameters_of(model).items()
    }


def write_parts(directory, model, parts, *, architecture="qwen2", kind=None, says=None):
    """As llama-gguf-split writes them: the model's metadata is in the first part, its tensors are in all."""
    config, tensors = model.config, gguf_tensors(model)
    paths = [directory / f"model-{i + 1:05}-of-{parts:05}.gguf" for i in range(parts)]
    for i, path in enumerate(paths):
        writer = GGUFWriter(path, architecture)
        if parts > 1:
            said = {"no": i, "count": parts, "tensors": len(tensors)} | (says or {}).get(i, {})
            writer.add_uint16("split.no", said["no"])
            writer.add_uint16("split.count", said["count"])
            writer.add_int32("split.tensors.count", said["tensors"])
        if i == 0:
            for add, value in (
                (writer.add_context_length, config.max_context),
                (writer.add_embedding_length, config.hidden_size),
                (writer.add_block_count, config.num_layers),
                (writer.add_feed_forward_length, config.intermediate_size),
                (writer.add_head_count, config.num_heads),
                (writer.add_head_count_kv, config.num_kv_heads),
                (writer.add_key_length, config.head_dim),
                (writer.add_value_length, config.head_dim),
                (writer.add_rope_freq_base, config.rope_theta),
                (writer.add_layer_norm_rms_eps, config.rms_norm_eps),
                (writer.add_tokenizer_model, "gpt2"),
                (writer.add_eos_token_id, 2),
                (writer.add_bos_token_id, 1),
                (writer.add_token_list, [f"token {j}" for j in range(config.vocab_size)]),
            ):
                add(value)
        for name in sorted(tensors)[i::parts]:
            value = np.ascontiguousarray(tensors[name])
            if kind is not None and value.ndim == 2:
                writer.add_tensor(name, quantize(value, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


LARGE = LlamaConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=4096,
    num_layers=8,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    max_context=256,
    tie_embeddings=True,
)
LARGEST = 4096 * 256
"""Values of the largest tensor, of which the model has 25."""


@pytest.fixture(scope="module")
def large():
    return Llama(LARGE, rngs=nnx.Rngs(0))


@pytest.fixture
def device_copies(monkeypatch):
    """What is on the device is memory of its own, as on an accelerator: a CPU may keep NumPy's."""
    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda values: jax.block_until_ready(jnp.array(put(values), copy=True)))


def host_peak(path, dtype):
    """Bytes that were allocated on the host at once while the model was loaded, beside mapped files."""
    load_model(path, dtype)  # what is imported and compiled once
    tracemalloc.start()
    try:
        model = load_model(path, dtype)
        return tracemalloc.get_traced_memory()[1], model
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["safetensors", "safetensors in bfloat16", "gguf F32", "gguf Q8_0", "gguf Q4_0"])
def test_the_host_holds_no_more_than_three_of_the_largest_tensor(stored, dtype, large, tmp_path, device_copies):
    if stored.startswith("gguf"):
        kind = GGMLQuantizationType[stored.split()[1]]
        [path] = write_parts(tmp_path, large, 1, architecture="llama", kind=None if kind.name == "F32" else kind)
    else:
        path = write_hf(tmp_path / "large", large, shards=3)
        for file in path.glob("*.safetensors"):
            if "bfloat16" in stored:
                save_file({name: value.astype(jnp.bfloat16) for name, value in load_file(file).items()}, file)
    peak, model = host_peak(path, jnp.dtype(dtype))
    whole = sum(leaf[...].nbytes for leaf in parameters_of(model).values())
    most = 3 * LARGEST * jnp.dtype(dtype).itemsize + (3 << 20)  # and what Python itself needs
    assert peak <= most < whole / 2


def test_a_split_model_is_the_whole_one(tiny_model, tmp_path, tokens, forward):
    model = tiny_model(attention_bias=True)
    first, *others = write_parts(tmp_path, model, 3)
    assert ggufs_in(tmp_path) == [first]
    for path in (first, tmp_path):
        np.testing.assert_array_equal(forward(load_model(path), tokens), forward(model, tokens))
        assert load_tokenizer(path).eos_ids == (2,)
    assert len(GgufFile(first).tensors) == len(parameters_of(model))
    with pytest.raises(CheckpointError, match=r"is part 2 of a model\. Give the first, model-00001-of-00003\.gguf"):
        load_model(others[0])


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({0: {"count": 4}}, r"it is part 1 of 4, expected a name that ends in -00001-of-00004"),
        ({0: {"no": 5}}, "it says that it is part 5 of 3"),
        ({0: {"tensors": 7}}, r"all parts have \d+ tensors, expected 7"),
        ({1: {"no": 2}}, r"model-00002.* it says that it is part 2 of 3"),
        ({2: {"count": 2}}, r"model-00003.* it says that it is part 2 of 2"),
    ],
)
def test_parts_that_do_not_belong_together_are_named(says, message, tiny_model, tmp_path):
    first, *_ = write_parts(tmp_path, tiny_model(attention_bias=True), 3, says=says)
    with pytest.raises(CheckpointError, match=message):
        load_model(first)


def test_a_part_that_is_missing_damaged_or_renamed_is_named(tiny_model, tmp_path):
    first, second, third = write_parts(tmp_path, tiny_model(attention_bias=True), 3)
    data = third.read_bytes()
    third.write_bytes(data[:200])
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.gguf \(200 bytes\) is cut short"):
        load_model(first)
    third.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match=r"model-00003.* it says that it is part 1 of 3"):
        load_model(first)
    third.unlink()
    with pytest.raises(CheckpointError, match=r"needs model-00003-of-00003\.gguf, which isn't beside it"):
        load_model(first)
    first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match="expected a name that ends in -00001-of-00003"):
        load_model(tmp_path / "renamed.gguf")


class Terminal:
    """Standard error, as far as tqdm looks."""

    encoding = "utf-8"

    def __init__(self, terminal):
        self.terminal, self.text = terminal, ""

    def isatty(self):
        return self.terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize(("terminal", "seconds"), [(True, 0.0), (True, 100.0), (False, 0.0)])
def test_a_bar_is_drawn_where_a_terminal_waits_long(terminal, seconds, hf_directory, monkeypatch):
    monkeypatch.setattr(progress, "LONG", seconds)
    monkeypatch.setattr(sys, "stderr", shown := Terminal(terminal))
    load_model(hf_directory)
    assert ("loading" in shown.text and "B/s" in shown.text) == (terminal and not seconds)
