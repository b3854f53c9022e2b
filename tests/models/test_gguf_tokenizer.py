"""Tokenizers out of GGUF files with tiny vocabularies: byte-level BPE and SentencePiece."""

import time
from itertools import pairwise

import pytest
from gguf import GGUFValueType, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from models import CheckpointError, load_tokenizer
from models.checkpoints.gguf_file import GgufFile
from models.fields import Fields
from models.special_ids import end_ids
from models.tokenizer import save_tokenizer


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


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("values", [{}, {"model": "gpt2", "pre": "llama-bpe"}])
def test_one_that_is_written_as_files_does_what_it_did(tmp_path, values, add_bos):
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab", "▁a"]
    types = [2, 3, 3, 1, 1, 1, 1]
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", tokens=tokens, types=types, add_bos=add_bos, **values))
    (tmp_path / "files").mkdir()
    save_tokenizer(tokenizer, tmp_path / "files")
    loaded = load_tokenizer(tmp_path / "files")
    for text in ("ab", "a<s>b", "<s>ab", "abab"):
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.encode_chat(text) == tokenizer.encode_chat(text)
        assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert (loaded.bos_id, loaded.adds_bos, loaded.eos_ids) == (1, add_bos, tokenizer.eos_ids)
