"""The beam search of the docs finds what transformers' finds."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny_checkpoint import write_hf

from jaxkv import release
from tests.examples.beam_search import beam_search

pytestmark = pytest.mark.once
STEPS, BEAMS = 14, 4


def test_beams_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = tiny.random_model(replace(tiny.CONFIG, num_heads=4))  # theirs want heads that divide the hidden size
    other = transformers.AutoModelForCausalLM.from_pretrained(write_hf(tmp_path / "model", model))
    ids = tiny.prompt(53, 8)
    made = other.generate(
        torch.tensor(ids[None].astype(np.int64)),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        num_beams=BEAMS,
        num_return_sequences=BEAMS,
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    cache, scores, said = beam_search(model, tiny.empty_cache(batch=BEAMS), jnp.asarray(ids), steps=STEPS)
    np.testing.assert_allclose(scores, made.sequences_scores.numpy(), atol=1e-3)
    np.testing.assert_array_equal(said, made.sequences.numpy()[:, len(ids) :])
    assert int(cache.raw.tables.free.others.sum()) >= 4 * (len(ids) // 16) * (BEAMS - 1)
    cache = jax.jit(release)(cache, jnp.ones(BEAMS, bool))
    tiny.assert_no_block_is_lost_or_shared(cache)
