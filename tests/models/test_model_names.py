"""Models and tokenizers by whatever name people have for them, and saved with whatever tokenizer."""

import json

import jax
import numpy as np
import pytest
import tiny
from tiny_checkpoint import write_hf
from tokenizers import Tokenizer as Core
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from jaxkv import LLM
from models import CheckpointError, Tokenizer, TokenizerError, load_model, load_tokenizer, resolve, save_model

pytestmark = pytest.mark.once


def core():
    made = Core(WordLevel({f"w{i}": i for i in range(101)}, unk_token="w0"))
    made.pre_tokenizer = WhitespaceSplit()
    return made


def test_a_text_is_a_path_or_a_name(tmp_path, monkeypatch):
    made = write_hf(tmp_path / "model", tiny.MODEL, tokenizer=True)
    monkeypatch.setattr("models.hub.BUILT_IN", {"built-in": lambda: made})
    for name in (str(made), "built-in"):
        jax.tree.map(np.testing.assert_array_equal, *(jax.tree.leaves(load_model(x)) for x in (name, made)))
        assert load_tokenizer(name).eos_ids == load_tokenizer(made).eos_ids
    for load in (load_model, load_tokenizer):
        with pytest.raises(CheckpointError, match="unknown model 'nowhere': expected a built-in name"):
            load("nowhere")
    assert resolve("built-in") == made


def test_a_tokenizer_may_be_of_tokenizers():
    llm = LLM(tiny.MODEL, tokenizer=core())
    assert isinstance(llm.tokenizer, Tokenizer)
    assert llm.generate("w1 w2", max_tokens=2)[0].prompt_tokens == 2
    with pytest.raises(TokenizerError, match=r"got a int; write Tokenizer.from_hf"):
        LLM(tiny.MODEL, tokenizer=5)


def test_a_tokenizer_may_be_of_transformers():
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core(), eos_token="w9", bos_token="w8")
    fast.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    ours = Tokenizer.from_hf(fast)
    assert (ours.eos_ids, ours.bos_id) == ((9,), 8)
    assert ours.encode("w1 w2") == fast("w1 w2")["input_ids"]
    assert ours.chat([{"role": "user", "content": "w3"}]) == "w3 "


@pytest.mark.parametrize("kind", ["ours", "core", "path", "none"])
def test_a_model_is_saved_with_its_tokenizer(kind, tmp_path):
    made = write_hf(tmp_path / "model", tiny.MODEL, tokenizer=True)
    model, own = load_model(made), load_tokenizer(made)
    given = {"ours": own, "core": own.core, "path": str(made), "none": None}[kind]
    save_model(model, str(tmp_path / "saved"), tokenizer=given)
    again = load_model(str(tmp_path / "saved"))
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.leaves(x) for x in (again, model)))
    if kind == "none":
        with pytest.raises(CheckpointError, match=r"has no tokenizer.json"):
            load_tokenizer(tmp_path / "saved")
    else:
        assert load_tokenizer(tmp_path / "saved").encode("w1") == own.encode("w1")
        said = json.loads((tmp_path / "saved" / "generation_config.json").read_text()) if kind == "ours" else None
        assert said in (None, {"eos_token_id": list(own.eos_ids)})
