"""A GGUF file's vocabulary as a ``tokenizers.Tokenizer``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from models.checkpoints.gguf_file import GgufFile
from models.errors import CheckpointError

_CONTROL, _USER_DEFINED = 3, 4
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
      CheckpointError: the file can't be read, has no vocabulary, or one of an unknown kind.
    """
    values = GgufFile(path).metadata(lambda key: key.startswith("tokenizer."))
    try:
        return _tokenizer(path, values)
    except CheckpointError:
        raise
    except Exception as error:  # of a missing or wrong value; the library raises bare Exception
        said = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: its tokenizer can't be read ({said}). Download it again.") from error


def _tokenizer(path: Path, values: Mapping[str, Any]) -> GgufTokenizer:
    kind = values.get("tokenizer.ggml.model")
    tokens = values.get("tokenizer.ggml.tokens")
    if not tokens:
        raise CheckpointError(f"{path} has no vocabulary; use a GGUF file that carries its tokenizer.")
    if kind == "gpt2":
        core = _byte_level(path, values)
    elif kind == "llama":
        core = _sentence_piece(values)
    else:
        raise CheckpointError(f"{path}: tokenizer {kind!r} is not supported, expected 'gpt2' or 'llama'.")
    types = values.get("tokenizer.ggml.token_type") or []
    for special, wanted in ((True, _CONTROL), (False, _USER_DEFINED)):
        named = [t for t, is_a in zip(tokens, types, strict=False) if is_a == wanted]
        added = [AddedToken(t, special=special, normalized=False) for t in named]
        core.add_special_tokens(added) if special else core.add_tokens(added)
    ends = (values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    bos = values.get("tokenizer.ggml.bos_token_id")
    begins = kind == "llama" or values.get("tokenizer.ggml.pre") in _LLAMA_3  # where the file doesn't say: as llama.cpp
    return GgufTokenizer(
        core=core,
        eos_ids=tuple(dict.fromkeys(int(i) for i in ends if i is not None)),
        bos_id=None if bos is None else int(bos),
        adds_bos=bool(values.get("tokenizer.ggml.add_bos_token", begins)),
        chat_template=values.get("tokenizer.chat_template"),
    )


def _byte_level(path: Path, values: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE; the file names how text is cut before the merges."""
    cut = values.get("tokenizer.ggml.pre", "default")
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
            f"{path}: pre-tokenizer {cut!r} is not known, expected smollm, llama-bpe, qwen2, gpt-2 or default. "
            "Use a directory with the model's tokenizer.json."
        )
    vocabulary = {token: i for i, token in enumerate(values["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in values.get("tokenizer.ggml.merges", [])]
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut in _LLAMA_3))
    core.pre_tokenizer = pre
    core.decoder = decoders.ByteLevel()
    if normalizer is not None:
        core.normalizer = normalizer
    return core


def _sentence_piece(values: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece's BPE: whatever two pieces make a better-scored one may merge, the best first."""
    tokens, scores = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.scores"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [
        (-scores[i], vocabulary[token[:cut]], vocabulary[token[cut:]], token[:cut], token[cut:])
        for i, token in enumerate(tokens)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    unknown = tokens[values.get("tokenizer.ggml.unknown_token_id", 0)]
    core = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(left, right) for *_, left, right in sorted(merges)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [normalizers.Prepend("▁")] if values.get("tokenizer.ggml.add_space_prefix", True) else []
    core.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return core
