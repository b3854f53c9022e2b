"""Weights to several virtual devices; ``test_devices.py`` runs this file in a process that has eight."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from eight_kv_heads import CONFIG, mesh_of
from tiny import answers, prompt, random_model
from tiny_checkpoint import write_hf

from jaxkv import LLM, SamplingParams
from models import load_model
from models.checkpoints.assemble import parameters_of
from models.checkpoints.orbax import save

BY_PARTS = 0.9
"""Of the model's bytes, at least so many are in matrices that are split."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One of Hugging Face's layout, and two of our own: saved from one device and from four."""
    root = tmp_path_factory.mktemp("checkpoints")
    write_hf(root / "hf", random_model(replace(CONFIG, attention_bias=False, output_bias=False)), tokenizer=True)
    save(load_model(root / "hf"), root / "of_one")
    save(load_model(root / "hf", mesh=mesh_of(4)), root / "of_four")
    return root


@pytest.mark.parametrize("name", ["hf", "of_one", "of_four"])
@pytest.mark.parametrize("weights", ["floats", "int8"])
def test_each_device_gets_its_part_of_the_same_weights(checkpoints, name, weights):
    whole, split = (load_model(checkpoints / name, weights=weights, mesh=mesh) for mesh in (None, mesh_of(8)))
    for (path, one), other in zip(parameters_of(whole).items(), parameters_of(split).values(), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one.get_value(), other.get_value())
        for array in jax.tree.leaves(other.get_value()):
            assert {shard.device.id for shard in array.addressable_shards} == set(range(8)), path
    arrays = jax.tree.leaves(split)
    held = sum(array.addressable_shards[3].data.nbytes for array in arrays)
    total = sum(array.nbytes for array in arrays)
    assert held < total * (BY_PARTS / 8 + 1 - BY_PARTS)


def test_a_model_of_a_file_answers_the_same(checkpoints):
    prompts, params = [prompt(40, seed=1), prompt(90, seed=2)], SamplingParams(max_tokens=12)
    one, split = (LLM(checkpoints / "hf", devices=n, max_batch=2) for n in (1, 4))
    assert answers(split, prompts, params) == answers(one, prompts, params)


def test_more_devices_than_it_can_be_split_over_are_refused_before_anything_is_read(checkpoints):
    with pytest.raises(ValueError, match="over 6 devices: it has 8 KV heads; take 1, 2, 4, 8"):
        load_model(checkpoints / "hf", mesh=mesh_of(6))
