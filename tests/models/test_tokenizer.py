"""Text to ids and back: SmolLM2's tokenizer against one built by hand, and other kinds on tiny vocabularies."""

import json
import time
from itertools import pairwise

import pytest
import tokenizers
from gguf import GGUFValueType, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers, processors

from models import CheckpointError, Tokenizer, TokenizerError, load_tokenizer
from models.checkpoints.gguf_file import GgufFile
from models.fields import Fields
from models.hub import smollm2_gguf
from models.special_ids import end_ids

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


def write_gguf(path, **values):
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(values.get("model", "llama"))
    if "pre" in values:
        writer.add_tokenizer_pre(values["pre"])
    if values.get("tokens"):
        writer.add_token_list(values["tokens"])
        writer.add_token_scores(values.get("scores", [0.0] * len(values["tokens"])))
        writer.add_token_types(values.get("types", [1] * len(values["tokens"])))
        writer.add_token_merges(values.get("merges", ["a b"]))
    if "space" in values:
        writer.add_add_space_prefix(values["space"])
    if "add_bos" in values:
        writer.add_add_bos_token(values["add_bos"])
    for key, value in ({"bos_token_id": 1, "eos_token_id": 2} | values.get("ids", {})).items():
        if isinstance(value, list):
            writer.add_array(f"tokenizer.ggml.{key}", value)
        elif value is not None:
            writer.add_key_value(f"tokenizer.ggml.{key}", value, GGUFValueType.INT64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("values", "adds"),
    [
        ({"model": "gpt2", "pre": "llama-bpe"}, True),
        ({"model": "gpt2", "pre": "llama-v3"}, True),
        ({"model": "gpt2", "pre": "llama-bpe", "add_bos": False}, False),
        ({"model": "gpt2", "pre": "qwen2"}, False),
        ({"model": "gpt2", "pre": "qwen2", "add_bos": True}, True),
        ({"model": "gpt2"}, False),
    ],
)
def test_llama_3_begins_with_bos_unless_its_file_says_otherwise(tmp_path, values, adds):
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab"]
    tokenizer = load_tokenizer(write_gguf(tmp_path / "bpe.gguf", tokens=tokens, types=[2, 3, 3, 1, 1, 1], **values))
    assert tokenizer.encode("ab") == ([1, 5] if adds else [5])
    assert tokenizer.encode("ab", add_special=False) == [5]
    assert tokenizer.encode("<s>ab") == [1, 5]


ENDS = ["a", "</s>", "b", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<|endoftext|>", "ab"]


@pytest.mark.parametrize(
    ("tokens", "ids", "expected"),
    [
        (ENDS, {}, (2, 3, 4, 5, 6, 7)),
        (ENDS, {"eos_token_id": 7}, (7, 3, 4, 5, 6)),
        (["a", "b", "ab"], {"eos_token_id": 0}, (0,)),
        (["a", "b", "ab"], {"eos_token_id": None}, ()),
        (["a", "b", "ab"], {"eos_token_id": [2, 0]}, (2, 0)),
        (["a", "b", "ab"], {"eos_token_id": 1, "eos_token_ids": [1, 2]}, (1, 2)),
        (["a", "b", "ab"], {"eos_token_id": 1, "eot_token_id": 0, "eom_token_id": 2}, (1, 0, 2)),
        (["a", "b", "ab"], {"eos_token_id": 2**32 - 1, "eot_token_id": -1, "eom_token_id": 2}, (2,)),
        (["a", "b", "ab", "<|im_end|>x"], {"eos_token_id": 0}, (0,)),
    ],
)
@pytest.mark.parametrize("control", [True, False])
def test_a_gguf_ends_where_its_keys_or_its_tokens_names_say(tmp_path, tokens, ids, expected, control):
    types = [3 if control and len(token) > 3 else 1 for token in tokens]
    path = write_gguf(tmp_path / "ends.gguf", model="gpt2", tokens=tokens, types=types, ids=ids)
    tokenizer = load_tokenizer(path)
    assert tokenizer.eos_ids == expected
    metadata = GgufFile(path).metadata(lambda key: True)
    assert end_ids(Fields(origin="x", values=metadata)) == expected
    for i in expected:
        if len(tokens[i]) > 3:
            assert tokenizer.encode(f"ab{tokens[i]}ab").count(i) == 1
            assert tokenizer.decode([i]) == ""


def test_a_sentencepiece_gguf_without_special_ids_has_sentencepieces_own(tmp_path):
    ids = {"bos_token_id": None, "eos_token_id": None}
    path = write_gguf(tmp_path / "spm.gguf", tokens=["<unk>", "<s>", "</s>", "▁", "a"], types=[2, 3, 3, 1, 1], ids=ids)
    tokenizer = load_tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert tokenizer.encode("a") == [1, 3, 4]


def test_a_sentencepiece_vocabulary_merges_the_best_scored_pieces_first(tmp_path):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    words = ["▁", "a", "b", "c", "ab", "bc", "▁a", "▁ab", "abc"]
    scores = [0.0] * len(pieces) + [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -4.0, -5.0]
    types = [2, 3, 3] + [6] * 256 + [1] * len(words)
    path = write_gguf(tmp_path / "spm.gguf", tokens=pieces + words, scores=scores, types=types)
    tokenizer = load_tokenizer(path)
    at = {word: len(pieces) + i for i, word in enumerate(words)}
    assert tokenizer.encode("abc") == [1, at["▁a"], at["bc"]]  # bc (-1) before ab (-2)
    assert tokenizer.encode("ab ab") == [1, at["▁ab"], at["▁ab"]]
    assert tokenizer.encode("<s>ab")[0] == 1
    assert tokenizer.encode("<s>ab").count(1) == 1
    assert tokenizer.decode(tokenizer.encode("ab ab")) == "ab ab"
    assert tokenizer.decode(tokenizer.encode("aé")) == "aé"  # by its bytes


SPACED = ["▁", "a", "b", "▁a", "▁b", "ab", "▁ab", "▁▁", "<user>"]


def as_llama_cpp(text, pieces, scores, special, *, space=True):
    """Special tokens are cut out, the longest first; each part between begins with a space; its best pair merges."""
    parts: list[str | int] = [text]
    for token in sorted(special, key=len, reverse=True):
        for i in reversed([i for i, part in enumerate(parts) if isinstance(part, str)]):
            cut = parts[i].split(token)
            parts[i : i + 1] = [x for piece in cut for x in (pieces.index(token), piece)][1:]
    ids = []
    for part in parts:
        if not part or isinstance(part, int):
            ids += [part] if isinstance(part, int) else []
            continue
        symbols = list((" " * space + part).replace(" ", "▁"))
        while found := [
            (-scores[pieces.index(a + b)], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in pieces
        ]:
            at = min(found)[1]
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        for symbol in symbols:
            known = symbol in pieces
            ids += [pieces.index(symbol)] if known else [pieces.index(f"<0x{b:02X}>") for b in symbol.encode()]
    return ids


@pytest.mark.parametrize("space", [True, False])
def test_text_after_a_special_token_is_read_as_llama_cpp_reads_it(tmp_path_factory, space):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *SPACED]
    scores, types = [-float(i) for i in range(len(pieces))], [2, 3, 3] + [6] * 256 + [1] * 8 + [4]
    path = tmp_path_factory.mktemp("spm") / "spm.gguf"
    tokenizer = load_tokenizer(write_gguf(path, tokens=pieces, scores=scores, types=types, space=space))

    @given(words=st.lists(st.sampled_from(["a", "b", " ", "  ", "é", "<s>", "</s>", "<unk>", "<user>"]), max_size=12))
    def same(words):
        text = "".join(words)
        expected = as_llama_cpp(text, pieces, scores, ["<s>", "</s>", "<unk>", "<user>"], space=space)
        assert tokenizer.encode(text, add_special=False) == expected

    same()
    assert tokenizer.decode(tokenizer.encode("</s>a<user>b")) == ("a<user> b" if space else "a<user>b")


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory):
    """Bytes, and letters with and without a space before them; ids 1 and 2 are special."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "▁b", "ab", "▁▁"]
    types = [2, 3, 3] + [6] * 256 + [1] * 7
    path = tmp_path_factory.mktemp("spm") / "spm.gguf"
    return load_tokenizer(write_gguf(path, tokens=pieces, scores=[-float(i) for i in range(len(pieces))], types=types))


@given(
    words=st.lists(st.text("ab é日", min_size=1, max_size=4), max_size=6), special=st.sampled_from([[], [2], [1, 2]])
)
def test_a_stream_keeps_spaces_around_special_tokens(sentence_piece, words, special):
    """Each word is encoded as one that follows others, with its space."""
    ids = [1]
    for word in words:
        ids += [*special, *sentence_piece.encode(word, add_special=False)]
    stream = sentence_piece.stream()
    assert "".join([*map(stream.push, ids), stream.flush()]) == sentence_piece.decode(ids)


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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "t5", "tokens": ["a", "b", "c"]}, "'t5' is not supported"),
        ({"model": "gpt2", "pre": "mystery", "tokens": ["a", "b", "ab"]}, "pre-tokenizer 'mystery' is not known"),
        ({"model": "gpt2"}, "has no vocabulary"),
        ({"model": "gpt2", "tokens": ["a", "b", "ab", "b"]}, "the vocabulary has 'b' twice"),
        ({"tokens": ["a", "b", "ab"], "scores": [0.0]}, "3 tokens, but 1 scores"),
        ({"tokens": ["a", "b", "ab"], "types": [1] * 4}, "3 tokens, but 4 token types"),
        ({"model": "gpt2", "tokens": ["a", b"\xff", "ab"]}, r"odd\.gguf: tokenizer\.ggml\.tokens isn't text"),
    ],
)
def test_an_unknown_vocabulary_is_refused(tmp_path, values, message):
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(write_gguf(tmp_path / "odd.gguf", **values))


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


@pytest.mark.parametrize("bos", [-1, 2**32 - 1, 2**40])
def test_a_gguf_whose_first_token_is_no_id_has_none(tmp_path, bos):
    path = write_gguf(
        tmp_path / "x.gguf", model="gpt2", tokens=["a", "b", "ab"], add_bos=True, ids={"bos_token_id": bos}
    )
    tokenizer = load_tokenizer(path)
    assert tokenizer.bos_id is None
    assert tokenizer.encode("ab") == [2]


def test_a_very_long_token_takes_no_time(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "a" * 200_000]
    began = time.perf_counter()
    tokenizer = load_tokenizer(write_gguf(tmp_path / "long.gguf", tokens=tokens, types=[2, 3, 3, 1, 1, 1, 1, 1]))
    assert tokenizer.encode("ab") == [1, 3, 6]
    assert time.perf_counter() - began < 10


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
