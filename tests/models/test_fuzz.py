"""Damaged headers and metadata of every reader: an error of ours or a right load; no traceback, hang or gigabyte."""

import json
import resource
import signal
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tiny_checkpoint import TEMPLATE, hf_tensors, write_hf

from models import CheckpointError, TokenizerError, load_model, load_tokenizer
from models.checkpoints.assemble import parameters_of
from models.checkpoints.orbax import save
from models.errors import LONGEST
from models.generation_config import sampling_defaults
from models.llama import GGUF_NAMES, Llama

MOST_SECONDS, MOST_BYTES = 120, 1 << 29
"""Of one example; the seconds are many, for a machine that is busy with other things."""
VOCABULARY = ["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "abc", "▁a", "Ġa", *(f"t{i}" for i in range(22))]
KEYS = [
    *(b"context_length", b"embedding_length", b"block_count", b"feed_forward_length", b"head_count", b"head_count_kv"),
    *(b"key_length", b"value_length", b"freq_base", b"layer_norm_rms_epsilon", b"ggml.tokens", b"ggml.scores"),
    *(b"ggml.token_type", b"ggml.merges", b"eos_token_id", b"bos_token_id", b"sampling.temp", b"sampling.top_k"),
    *(
        b"general.architecture",
        b"tokenizer.ggml.model",
        b"tokenizer.chat_template",
        b"token_embd.weight",
        b"output.weight",
    ),
]
WORDS = [*"abc ", "ab", "é", "<s>"]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A file, what it is when it is whole, and what reads it."""

    file: Path
    load: Callable[[], object]
    damage: Callable[[st.DataObject, bytes], bytes]


# What is done to a file


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-2, 300)
    | st.sampled_from([-(2**63), 2**31, 2**32 - 1, 2**40, 2**63, 2**64, 10**30, 10**400])
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["llama", "BPE", "WordPiece", "Unigram", "F8_E4M3", "BF16", "Sequence", "\ud800", "\0", "../x"])
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def damaged_json(data, whole):
    """One to three values, anywhere, become others or go."""
    document = json.loads(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = document
        while isinstance(at, dict | list) and at:
            keys = list(at) if isinstance(at, dict) else range(len(at))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.integers(0, 2)) == 0:
                change(data, at, key)
                break
            at = at[key]
    return json.dumps(document).encode("utf-8", "surrogatepass")


def change(data, at, key):
    match data.draw(st.sampled_from(["other", "other", "gone", "near", "name"])):
        case "other":
            at[key] = data.draw(anything)
        case "gone":
            del at[key]
        case "near" if type(at[key]) is int:
            at[key] += data.draw(st.sampled_from([-1, 1, 7, -at[key], 2**32]))
        case "name" if isinstance(at, dict):
            at[data.draw(st.text(max_size=6))] = at.pop(key)


def damaged_bytes(data, whole, upto=None):
    """Some bytes in front become others, or the end is cut off."""
    upto = len(whole) if upto is None else upto
    if data.draw(st.integers(0, 5)) == 0:
        return whole[: data.draw(st.integers(0, upto))]
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, upto - 1))
        some = st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\x09\0\0\0", b"\x7f"])
        new = data.draw(some)
        damaged[place : place + len(new)] = new
    return bytes(damaged)


def damaged_text(data, whole):
    return damaged_json(data, whole) if data.draw(st.integers(0, 3)) else damaged_bytes(data, whole)


def damaged_safetensors(data, whole):
    """The header as JSON or as bytes; its length too."""
    size = struct.unpack("<Q", whole[:8])[0]
    if data.draw(st.integers(0, 2)) == 0:
        return damaged_bytes(data, whole, 8 + size)
    header = damaged_json(data, whole[8 : 8 + size])
    length = data.draw(st.just(len(header)) | st.integers(0, 2**64 - 1))
    return struct.pack("<Q", length) + header + whole[8 + size :]


def damaged_gguf(data, whole):
    """Any bytes before the tensors' data; or, of one to three keys, the value, its type, or the length of an array."""
    if data.draw(st.integers(0, 2)) == 0:
        return damaged_bytes(data, whole, whole.index(b"token_embd"))
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        place = whole.index(key := data.draw(st.sampled_from(KEYS))) + len(key)
        new = data.draw(st.integers(0, 300) | st.sampled_from([2**16, 2**31, 2**32 - 1, 0x7FC00000, 0xFF800000]))
        place += data.draw(st.sampled_from([0, 4, 4, 4, 8]))
        damaged[place : place + 4] = struct.pack("<I", new)
    return bytes(damaged)


# What is read


def model_of(path):
    """A model that loads is whole: of its config's sizes, and finite."""

    def load():
        model = load_model(path)
        assert all(np.isfinite(leaf[...]).all() for leaf in parameters_of(model).values())
        assert model.config.num_layers == len(model.layers)

    return load


def tokenizer_of(path):
    """One that loads takes texts and conversations, or says that it can't."""

    def load():
        tokenizer = load_tokenizer(path)
        try:
            ids = tokenizer.encode("".join(WORDS))
            assert all(0 <= i < 2**32 for i in ids)
            tokenizer.decode(ids[:20])
            stream = tokenizer.stream()
            assert isinstance("".join(map(stream.push, ids[:20])) + stream.flush(), str)
            tokenizer.encode_chat(tokenizer.chat([{"role": "user", "content": "a b"}]))
        except TokenizerError:
            pass

    return load


@pytest.fixture(scope="module")
def readers(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("fuzz")
    model = tiny_model(vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=32, num_layers=1)
    hf = write_hf(root / "hf", model, tokenizer=True)
    (hf / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.6, "top_k": 5, "eos_token_id": [2]}'
    )
    sharded = write_hf(root / "sharded", model, shards=2)
    save(model, root / "ours", tokenizer_from=hf)
    (root / "bpe").mkdir()
    write_bpe(root / "bpe")
    for kind in ("llama", "gpt2"):
        write_gguf(root / f"{kind}.gguf", model, kind)

    def both(path):
        def load():
            for each in (model_of(path), tokenizer_of(path), lambda: sampling_defaults(path)):
                each()

        return load

    return {
        "safetensors": Reader(file=hf / "model.safetensors", load=model_of(hf), damage=damaged_safetensors),
        "index": Reader(file=sharded / "model.safetensors.index.json", load=model_of(sharded), damage=damaged_text),
        "config.json": Reader(file=hf / "config.json", load=model_of(hf), damage=damaged_text),
        "generation_config.json": Reader(file=hf / "generation_config.json", load=both(hf), damage=damaged_text),
        "tokenizer.json": Reader(
            file=root / "bpe" / "tokenizer.json", load=tokenizer_of(root / "bpe"), damage=damaged_text
        ),
        "tokenizer_config.json": Reader(file=hf / "tokenizer_config.json", load=tokenizer_of(hf), damage=damaged_text),
        "llama.json": Reader(file=root / "ours" / "llama.json", load=model_of(root / "ours"), damage=damaged_text),
        "gguf": Reader(file=root / "llama.gguf", load=both(root / "llama.gguf"), damage=damaged_gguf),
        "gguf of gpt2": Reader(file=root / "gpt2.gguf", load=both(root / "gpt2.gguf"), damage=damaged_gguf),
    }


NAMES = (
    *("safetensors", "index", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("llama.json", "gguf", "gguf of gpt2"),
)


def write_bpe(directory):
    """A tokenizer.json with something of every kind in it."""
    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=[("a", "b"), ("ab", "c")], unk_token="<unk>")
    )
    core.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFC(), tokenizers.normalizers.Replace("x", "y")]
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\d{1,3}"), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    core.enable_truncation(64)
    core.enable_padding(length=8)
    core.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (directory / "chat_template.jinja").write_text(TEMPLATE)


def write_gguf(path: Path, model: Llama, kind: str) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    numbers = {
        "context_length": config.max_context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_heads,
        "head_count_kv": config.num_kv_heads,
        "key_length": config.head_dim,
        "value_length": config.head_dim,
        "rope_freq_base": config.rope_theta,
        "layer_norm_rms_eps": config.rms_norm_eps,
    }
    for name, value in numbers.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(VOCABULARY)
    writer.add_token_scores([-float(i) for i in range(len(VOCABULARY))])
    writer.add_token_types([2, 3, 3, *[1] * (len(VOCABULARY) - 3)])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_chat_template(TEMPLATE)
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_sampling_temp(0.5)
    writer.add_sampling_top_k(4)
    stored = hf_tensors(model)
    names = {GGUF_NAMES(p, config).name: stored[n] for p, n in zip(parameters_of(model), stored, strict=True)}
    for name, value in {"token_embd.weight": names.pop("token_embd.weight"), **names}.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def try_damaged(reader: Reader, data: st.DataObject) -> None:
    whole = reader.file.read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reader.file.write_bytes(reader.damage(data, whole))
    signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(MOST_SECONDS)
    said = None
    try:
        reader.load()
    except CheckpointError as error:
        said = str(error)
    finally:
        signal.alarm(0)
        reader.file.write_bytes(whole)
    event("loaded" if said is None else "refused")
    assert said is None or 20 < len(said) <= LONGEST + 5
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES


def _hangs(*_):
    raise TimeoutError(f"reading took more than {MOST_SECONDS} s")


quiet = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_whole_loads(name, readers):
    readers[name].load()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=23, **quiet)
@given(data=st.data())
def test_a_damaged_file_gives_an_error_of_ours_or_a_right_load(name, readers, data):
    try_damaged(readers[name], data)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=225, **quiet)
@given(data=st.data())
def test_two_thousand_damaged_files(name, readers, data):
    try_damaged(readers[name], data)
