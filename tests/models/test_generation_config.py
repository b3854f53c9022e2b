"""What generation_config.json and GGUF metadata say of sampling, and how an LLM goes by it."""

import json

import gguf
import pytest
import tiny
from tiny_checkpoint import write_hf

from jaxkv import LLM, SamplingParams
from jaxkv.cli.commands import sampling_from
from jaxkv.cli.options import answer_settings, parser
from jaxkv.requests import GREEDY
from models import CheckpointError, load_model, load_tokenizer
from models.generation_config import SamplingDefaults, ends_in, sampling_defaults

QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}


def says(directory, **values):
    (directory / "generation_config.json").write_text(json.dumps(values))
    return sampling_defaults(directory)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {}),
        (QWEN, {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": None, "min_p": 0.1}, {"temperature": 1.0, "min_p": 0.1}),
        ({"do_sample": True, "temperature": 0, "top_k": -1}, {"temperature": 0.0, "top_k": 0}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"top_p": 0.9}),
        ({"temperature": 0.6, "top_k": None}, {}),
    ],
)
def test_what_a_directory_says(values, expected, tmp_path):
    assert says(tmp_path, **values) == SamplingDefaults(**expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_sample": "yes"}, "do_sample is 'yes', expected true or false"),
        ({"do_sample": True, "temperature": "hot"}, "temperature is 'hot', expected a finite number"),
        ({"do_sample": True, "temperature": -1}, "temperature is -1.0, expected 0 to 1e6"),
        ({"top_p": 0}, r"top_p is 0.0, expected a number in \(0, 1\]"),
        ({"top_k": 2.5}, r"top_k is 2.5, expected a whole number"),
        ({"top_k": 2**40}, "top_k is 1099511627776, expected 0 to"),
        ({"repetition_penalty": 0}, r"repetition_penalty is 0.0, expected a number in"),
        ({"min_p": float("nan")}, "min_p is nan, expected a finite number"),
        ({"min_p": [0.1]}, r"min_p is \[0.1\], expected a finite number"),
    ],
)
def test_what_can_not_be_is_named_with_the_way_around_it(values, message, tmp_path):
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {message}(.|\n)*--no-generation-config"):
        says(tmp_path, **values)


def test_a_gguf_says_it_in_its_metadata(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_sampling_temp(0.5)
    writer.add_sampling_top_k(40)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    for path in (tmp_path / "a.gguf", tmp_path):
        assert sampling_defaults(path) == SamplingDefaults(temperature=0.5, top_k=40)


def test_what_a_user_says_comes_first():
    own = SamplingDefaults(temperature=0.7, top_k=20, top_p=0.8)
    filled = SamplingParams(temperature=0.0, min_p=0.2, seed=3).filled(own)
    rest = {"min_p": 0.2, "repetition_penalty": 1.0, "seed": 3}
    assert filled == SamplingParams(temperature=0.0, top_k=20, top_p=0.8, **rest)
    assert vars(SamplingParams().filled()).items() >= vars(GREEDY).items()
    assert SamplingParams().filled().filled(own).temperature == GREEDY.temperature


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    made = write_hf(tmp_path_factory.mktemp("of") / "model", tiny.random_model(), tokenizer=True)
    (made / "generation_config.json").write_text(json.dumps(QWEN | {"temperature": 3.0, "eos_token_id": [2, 7]}))
    return made


def test_an_llm_samples_as_its_model_says_and_the_same_each_time(directory):
    def answer(llm, **settings):
        params = SamplingParams(max_tokens=16, ignore_eos=True, **settings)
        return llm.generate([3, 4, 5, 6], params)[0].token_ids

    llm, plain = LLM(directory), LLM(directory, generation_config=False)
    drawn, greedy = answer(llm), answer(plain)
    assert drawn == answer(llm) != answer(llm, seed=1)
    assert drawn == answer(plain, temperature=3.0, top_k=20, top_p=0.8, repetition_penalty=1.05)
    assert drawn != greedy == answer(llm, temperature=0, repetition_penalty=1)


def test_lists_of_ends_are_read_wherever_they_stand(directory):
    assert ends_in(directory) == (2, 7)
    assert load_tokenizer(directory).eos_ids == (2, 7)
    assert load_model(directory).config.eos_token_ids == (2, 7)
    (config := directory / "config.json").write_text(
        json.dumps(json.loads(config.read_text()) | {"eos_token_id": [9, 2]})
    )
    assert load_model(directory).config.eos_token_ids == (9, 2, 7)
    assert LLM(directory)._ends() == (2, 7, 9)


def test_the_command_line_leaves_the_choice_to_the_model():
    batch = ["batch", "--model", "m", "--input", "i", "--output", "o"]
    plain, without = (parser().parse_args([*batch, *more]) for more in ([], ["--no-generation-config"]))
    assert sampling_from(plain) == SamplingParams()
    assert "generation_config" not in answer_settings(plain)
    assert answer_settings(without)["generation_config"] is False
