"""Tiny models as other people publish them, written without transformers."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file

from models.checkpoints.assemble import parameters_of
from models.llama import HF_NAMES, Llama

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }} : {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def hf_config(model: Llama) -> dict[str, object]:
    config = model.config
    return {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_context,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": 2,
        "bos_token_id": 1,
    }


def hf_tensors(model: Llama) -> dict[str, np.ndarray]:
    tensors = {}
    for path, leaf in parameters_of(model).items():
        value = np.asarray(leaf[...])
        tensors[HF_NAMES(path, model.config).name] = np.ascontiguousarray(value.T if path[-1] == "kernel" else value)
    return tensors


def write_hf(directory: Path, model: Llama, *, shards: int = 1, tokenizer: bool = False) -> Path:
    """A directory in Hugging Face's layout."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(hf_config(model)))
    tensors = hf_tensors(model)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
    else:
        names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        for i, name in enumerate(names):
            save_file({key: tensors[key] for key in sorted(tensors)[i::shards]}, directory / name)
        weight_map = {key: names[i % shards] for i, key in enumerate(sorted(tensors))}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if tokenizer:
        write_tokenizer(directory, model.config.vocab_size)
    return directory


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """One token a word: ``w3`` and so on, after ``<unk>``, ``<s>`` and ``</s>``."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, vocab_size))]
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<s>", "</s>"])
    core.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
