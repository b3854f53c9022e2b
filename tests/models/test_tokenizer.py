"""Text to ids and back: SmolLM2's tokenizer against one built by hand, conversations, and files of tokenizer.json."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers, processors

from models import CheckpointError, Tokenizer, TokenizerError, load_tokenizer
from models.hub import smollm2_gguf

TEXTS = [
    "Emma Woodhouse, handsome, clever, and rich",
    "def f(x):\n\treturn x ** 2  # 3.14159\n\n\n",
    "In 1815 it cost 12,345.67 pounds; don't ask.",
    "naïve café — “quotes” … ½",
    "日本語のテキスト、中文文本。 한국어",
    "🙂👩‍👩‍👧‍👦 emoji",
    "  leading and trailing   spaces  \r\n",
    "",
]


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer(smollm2_gguf())


@pytest.fixture(scope="module")
def by_hand():
    """From the file's lists alone: byte-level BPE with every digit apart."""
    from gguf import GGUFReader

    fields = GGUFReader(smollm2_gguf()).fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [tuple(m.split(" ")) for m in merges]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    return core


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_a_tokenizer_built_by_hand(smollm2, by_hand, text):
    ids = smollm2.encode(text)
    assert ids == by_hand.encode(text).ids
    assert smollm2.decode(ids) == text


def spelled(**limits):
    """Texts that SmolLM2 can spell: its vocabulary lacks a few bytes, of control characters and unused planes."""
    return st.text(
        st.characters(max_codepoint=0xFFFF, exclude_categories=["Cc", "Cs", "Cn", "Co"], include_characters="\n\t"),
        **limits,
    )


@given(text=spelled())
def test_text_comes_back(smollm2, text):
    assert smollm2.decode(smollm2.encode(text, add_special=False), skip_special=False) == text


@given(text=spelled(min_size=1))
def test_a_stream_gives_whole_characters_that_join_to_the_text(smollm2, text):
    ids, stream = smollm2.encode(text, add_special=False), smollm2.stream()
    pieces = [stream.push(i) for i in ids]
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == smollm2.decode(ids)


def test_a_stream_that_ends_within_a_character_says_so(smollm2):
    first = smollm2.encode("日", add_special=False)[:-1]
    stream = smollm2.stream()
    assert "".join(stream.push(i) for i in first) == ""
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_are_single_ids_that_decoding_leaves_out(smollm2):
    ids = smollm2.encode("<|im_start|>user\nHi<|im_end|>")
    assert ids[0] == 1
    assert ids[-1] == 2
    assert smollm2.decode(ids) == "user\nHi"
    assert smollm2.decode(ids, skip_special=False) == "<|im_start|>user\nHi<|im_end|>"
    assert smollm2.eos_ids == (2, 0)  # <|im_end|>, and <|endoftext|> by its name
    assert smollm2.vocab_size == 49152


def test_a_conversation_in_smollm2s_own_format(smollm2):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert smollm2.chat(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert smollm2.chat(messages, add_generation_prompt=False).endswith("Hi<|im_end|>\n")


def words_of(template, post_processor=None, **special):
    """A tokenizer of words, whose first two are special."""
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "U": 2, "A": 3, "a": 4}))
    core.add_special_tokens(["<s>", "</s>"])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if post_processor is not None:
        core.post_processor = processors.TemplateProcessing(
            single=post_processor, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return Tokenizer(core=core, chat_template=template, bos_id=0, eos_ids=(1,), **special)


PLAIN = "{% for m in messages %}U {{ m.content }}{% endfor %} A"


@pytest.mark.parametrize(
    ("template", "post_processor", "expected"),
    [
        (PLAIN, "<s> $A </s>", [2, 4, 3]),
        (PLAIN, "<s> $A", [2, 4, 3]),
        (PLAIN, "$A </s>", [2, 4, 3]),
        ("{{ bos_token }} " + PLAIN, "<s> $A", [0, 2, 4, 3]),
        ("\n{{ bos_token }} " + PLAIN, "<s> $A", [0, 2, 4, 3]),
        ("{{ bos_token }} " + PLAIN, None, [0, 2, 4, 3]),
        ("{{ bos_token }}{{ bos_token }} " + PLAIN, None, [0, 0, 2, 4, 3]),
    ],
)
def test_a_conversation_is_encoded_as_its_template_writes_it(template, post_processor, expected):
    tokenizer = words_of(template, post_processor)
    assert tokenizer.encode_chat(tokenizer.chat([{"role": "user", "content": "a"}])) == expected
    assert tokenizer.encode("a") == [{"<s>": 0, "</s>": 1, "$A": 4}[w] for w in (post_processor or "$A").split()]


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("beginning", ["", "{{ bos_token }} ", "\n{{ bos_token }} "])
def test_a_gguf_that_adds_bos_begins_a_conversation_with_one(adds_bos, beginning):
    tokenizer = words_of(beginning + PLAIN, adds_bos=adds_bos)
    ids = tokenizer.encode_chat(tokenizer.chat([{"role": "user", "content": "a"}]))
    assert ids == ([0, 2, 4, 3] if adds_bos or beginning else [2, 4, 3])


def test_a_text_that_begins_with_the_first_token_gets_no_second():
    tokenizer = words_of(None, "<s> $A")
    assert tokenizer.encode("<s> a") == tokenizer.encode(" \n<s> a") == [0, 4]


def test_a_directory_with_tokenizer_json(tmp_path, smollm2):
    smollm2.core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>", "chat_template": "{{ bos_token }}"}
        )
    )
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(TEXTS[0]) == smollm2.encode(TEXTS[0])
    assert tokenizer.eos_ids == (2, 0)
    assert tokenizer.chat([{"role": "user", "content": "x"}]) == "<|im_start|>"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content | tojson }}")
    assert load_tokenizer(tmp_path).chat([{"role": "user", "content": 'é"'}]) == '"é\\""'


TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
PADDING = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 7, "pad_type_id": 0, "pad_token": "x"}


@pytest.mark.parametrize(
    "left",
    [
        {"truncation": TRUNCATION},
        {"truncation": TRUNCATION | {"direction": "Left", "stride": 2}},
        {"truncation": TRUNCATION | {"stride": 5}},
        {"padding": PADDING | {"strategy": {"Fixed": 64}}},
        {"padding": PADDING | {"strategy": "BatchLongest", "pad_to_multiple_of": 8, "direction": "Left"}},
        {"model": {"dropout": 0.5}},
    ],
)
def test_what_training_left_in_tokenizer_json_does_not_act(tmp_path, smollm2, left):
    values = json.loads(smollm2.core.to_str())
    values |= left | {"model": values["model"] | left.get("model", {})}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(tmp_path)
    for _ in range(3):
        assert [tokenizer.encode(text) for text in TEXTS] == [smollm2.encode(text) for text in TEXTS]


WITHOUT_UNKNOWN = {
    "Unigram": tokenizers.models.Unigram([("a", -1.0)]),
    "WordLevel": tokenizers.models.WordLevel({"a": 0}, unk_token="none"),
    "WordPiece": tokenizers.models.WordPiece({"a": 0}, unk_token="none"),
}


@pytest.mark.parametrize("model", WITHOUT_UNKNOWN.values(), ids=WITHOUT_UNKNOWN.keys())
def test_a_letter_that_a_tokenizer_does_not_know_is_said_of_the_text(tmp_path, model):
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a") == [0]
    for text in ("é", "\ud800"):
        with pytest.raises(TokenizerError, match="can't take this text"):
            tokenizer.encode(text)
    with pytest.raises(TokenizerError, match="can't make a text of ids"):
        tokenizer.decode([2**40])


class Panic(BaseException):
    """As the library's own, which is no ``Exception`` either."""


def test_a_panic_of_the_library_is_an_error_like_others(tmp_path, smollm2, monkeypatch):
    from dataclasses import replace

    class Panicking:
        def __getattr__(self, name):
            def panic(*_, **__):
                raise Panic("index out of bounds")

            return panic

    with pytest.raises(TokenizerError, match="Panic: index out of bounds"):
        replace(smollm2, core=Panicking(), bos_id=None).encode("a")
    with pytest.raises(TokenizerError, match="Panic: index out of bounds"):
        replace(smollm2, core=Panicking()).decode([1])
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(tokenizers, "Tokenizer", Panicking())
    with pytest.raises(CheckpointError, match=r"tokenizer\.json can't be read \(Panic: index out of bounds\)"):
        load_tokenizer(tmp_path)


PRECOMPILED = {"type": "Precompiled", "precompiled_charsmap": "AAAAAQ=="}
EMPTY_PATTERN = {"type": "Replace", "pattern": {"Regex": "("}, "content": "x"}


@pytest.mark.parametrize("normalizer", [PRECOMPILED, EMPTY_PATTERN])
def test_a_normalizer_that_can_not_work_is_refused_or_its_text(tmp_path, smollm2, normalizer):
    values = json.loads(smollm2.core.to_str()) | {"normalizer": normalizer}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises((CheckpointError, TokenizerError), match="can't"):
        load_tokenizer(tmp_path).encode("some text")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "isn't JSON that can be read"),
        ('{"a":' * 100_000, "isn't JSON that can be read"),
        (r'{"chat_template": "\ud800"}', "half a surrogate pair"),
        (r'{"\udc00": 1}', "half a surrogate pair"),
        ("[1]", "expected a JSON object"),
        ("\ufeff{", "isn't JSON"),
    ],
)
def test_a_file_beside_the_tokenizer_that_is_no_json_is_refused(tmp_path, smollm2, name, text, message):
    smollm2.core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"{name} .*{message}|{name} {message}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("eos", [-1, 2**32, 10**400, [2, -1]])
def test_ends_that_no_id_can_be_are_none(tmp_path, smollm2, eos):
    smollm2.core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ eos_token }}!"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == ((2,) if isinstance(eos, list) else ())
    assert tokenizer.chat([{"role": "user", "content": "a"}]).endswith("!")
    assert tokenizer.encode("a")


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="can't be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="isn't a GGUF"):
        load_tokenizer(tmp_path / "x.gguf")


def test_a_conversation_that_the_template_can_not_take_is_refused(tmp_path, smollm2):
    from dataclasses import replace

    with pytest.raises(CheckpointError, match="no chat template"):
        replace(smollm2, chat_template=None).chat([{"role": "user", "content": "x"}])
    with pytest.raises(CheckpointError, match="only two"):
        replace(smollm2, chat_template="{{ raise_exception('only two') }}").chat([{"role": "user", "content": "x"}])
    with pytest.raises(CheckpointError, match="can't take this conversation: division by zero"):
        replace(smollm2, chat_template="{{ 1 / 0 }}").chat([{"role": "user", "content": "x"}])
    with pytest.raises(ValueError, match="message 0 needs a 'role' and a 'content'"):
        smollm2.chat([{"text": "x"}])
