"""A GGUF file's vocabulary as a ``tokenizers.Tokenizer``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from models.checkpoints.gguf_file import GgufFile
from models.errors import CheckpointError, tokenizers_errors
from models.fields import Fields
from models.special_ids import END_TEXTS, end_ids, special_id

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_LLAMA_3 = ("llama-bpe", "llama3", "llama-v3")
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class GgufTokenizer:
    """What a GGUF file says of its tokenizer."""

    core: Tokenizer
    eos_ids: tuple[int, ...]
    bos_id: int | None
    adds_bos: bool
    chat_template: str | None


def tokenizer_from_gguf(path: Path) -> GgufTokenizer:
    """Reads the metadata under ``tokenizer.``.

    Raises:
      CheckpointError: the file can't be read, has no vocabulary, or one that is damaged or of an unknown kind.
    """
    fields = Fields(origin=str(path), values=GgufFile(path).metadata(lambda key: key.startswith("tokenizer.")))
    with tokenizers_errors(
        lambda said: CheckpointError(f"{path}: its tokenizer can't be read ({said}). Download it again.")
    ):
        return _tokenizer(path, fields)


def _tokenizer(path: Path, fields: Fields) -> GgufTokenizer:
    kind = fields.values.get("tokenizer.ggml.model")
    tokens = fields.texts("tokenizer.ggml.tokens")
    if not tokens:
        raise CheckpointError(f"{path} has no vocabulary; use a GGUF file that carries its tokenizer.")
    if len(set(tokens)) < len(tokens):
        [(twice, _)] = Counter(tokens).most_common(1)
        raise CheckpointError(f"{path}: the vocabulary has {twice!r:.60} twice, expected once. Download it again.")
    if kind == "gpt2":
        core = _byte_level(path, fields)
    elif kind == "llama":
        core = _sentence_piece(path, fields)
    else:
        raise CheckpointError(f"{path}: tokenizer {kind!r:.60} is not supported, expected 'gpt2' or 'llama'.")
    _add_special(core, tokens, _one_each(path, "token types", fields.ids("tokenizer.ggml.token_type"), tokens))
    begins = kind == "llama" or fields.values.get("tokenizer.ggml.pre") in _LLAMA_3  # as llama.cpp
    return GgufTokenizer(
        core=core,
        eos_ids=end_ids(fields),
        bos_id=special_id(fields, "bos"),
        adds_bos=fields.flag("tokenizer.ggml.add_bos_token", begins),
        chat_template=fields.text("tokenizer.chat_template", "") or None,
    )


def _one_each(path: Path, what: str, values: Sequence[Any], tokens: Sequence[str]) -> Sequence[Any]:
    if values and len(values) != len(tokens):
        raise CheckpointError(
            f"{path}: the vocabulary has {len(tokens)} tokens, but {len(values)} {what}. Download it again."
        )
    return values


def _add_special(core: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Tokens that a text names as a whole; those that aren't of the user's making have no text themselves."""
    kinds = dict(zip(tokens, types, strict=True)) if types else {}
    special = [t for t in tokens if t and (kinds.get(t) in (_UNKNOWN, _CONTROL) or t in END_TEXTS)]
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    core.add_tokens([AddedToken(t, normalized=False) for t in tokens if t and kinds.get(t) == _USER_DEFINED])


def _byte_level(path: Path, fields: Fields) -> Tokenizer:
    """Byte-level BPE; the file names how text is cut before the merges."""
    cut = fields.text("tokenizer.ggml.pre", "default")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut in ("smollm", "default", "gpt-2"))
    normalizer = None
    if cut == "smollm":
        pre = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif cut in ("default", "gpt-2"):
        pre = byte_level
    elif cut in (*_LLAMA_3, "qwen2"):
        words = Regex(_WORDS % ("1" if cut == "qwen2" else "1,3"))
        pre = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), byte_level])
        normalizer = normalizers.NFC() if cut == "qwen2" else None
    else:
        raise CheckpointError(
            f"{path}: pre-tokenizer {cut!r:.60} is not known, expected smollm, llama-bpe, qwen2, gpt-2 or default. "
            "Use a directory with the model's tokenizer.json."
        )
    vocabulary = {token: i for i, token in enumerate(fields.texts("tokenizer.ggml.tokens"))}
    merges = [
        (left, right) for left, _, right in (merge.partition(" ") for merge in fields.texts("tokenizer.ggml.merges"))
    ]
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut in _LLAMA_3))
    core.pre_tokenizer = pre
    core.decoder = decoders.ByteLevel()
    if normalizer is not None:
        core.normalizer = normalizer
    return core


def _sentence_piece(path: Path, fields: Fields) -> Tokenizer:
    """SentencePiece's BPE: whatever two pieces make a better-scored one may merge, the best first.

    Each part of a text between special tokens begins with a space, as in llama.cpp: the normalizer works part by part.
    """
    tokens = fields.texts("tokenizer.ggml.tokens")
    scores = _one_each(path, "scores", fields.numbers("tokenizer.ggml.scores"), tokens)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    lengths = {len(token) for token in tokens if token}
    merges = [
        (-scores[i], vocabulary[token[:cut]], vocabulary[token[cut:]], token[:cut], token[cut:])
        for i, token in enumerate(tokens)
        for cut in lengths  # not everywhere: a token may be very long
        if len(token) - cut in lengths and token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    unknown = tokens[special_id(fields, "unknown") or 0]
    core = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(left, right) for *_, left, right in sorted(merges)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [normalizers.Prepend("▁")] if fields.flag("tokenizer.ggml.add_space_prefix", True) else []
    core.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return core
