"""A real model: SmolLM2-135M-Instruct from its Q4_1 GGUF, against transformers in float32."""

from pathlib import Path

import numpy as np
import pytest

from models import Llama, load_model
from models.hub import smollm2_gguf
from models.tokenizer import load_tokenizer

PROMPT, NEW = 512, 64
PROSE = Path(__file__).parents[2] / "LICENSE"


@pytest.fixture(scope="module")
def gguf() -> Path:
    return smollm2_gguf()


@pytest.fixture(scope="module")
def model(gguf) -> Llama:
    return load_model(gguf)


@pytest.fixture(scope="module")
def prompt(gguf) -> np.ndarray:
    """i32[1, PROMPT], the beginning of an English text."""
    ids = load_tokenizer(gguf).encode(PROSE.read_text(encoding="utf-8"))
    assert len(ids) >= PROMPT
    return np.asarray([ids[:PROMPT]], np.int32)


def test_logits_and_greedy_tokens_are_those_of_transformers(gguf, model, prompt, forward, torch):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    theirs.generation_config.eos_token_id = None  # so that every run is NEW tokens long
    ids = torch.tensor(prompt).long()
    with torch.no_grad():
        generated = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, pad_token_id=0
        )
        expected = theirs(generated).logits.numpy()
    assert generated.shape == (1, PROMPT + NEW)

    ours = forward(model, generated.numpy())
    assert np.abs(ours - expected).max() <= 2e-3
    # Given the tokens before it, each generated token is our argmax too; so, by induction, greedy runs are identical.
    np.testing.assert_array_equal(ours[0, PROMPT - 1 : -1].argmax(-1), generated[0, PROMPT:])


def test_it_reads_english(model, prompt, forward):
    config = model.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.max_context, config.rope_theta, config.tie_embeddings) == (8192, 100_000.0, True)
    logits = forward(model, prompt)[0]
    shifted = logits - logits.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    perplexity = np.exp(-log_probabilities[np.arange(PROMPT - 1), prompt[0, 1:]].mean())
    assert perplexity < 20  # of English legal text; a wrong weight makes it thousands
