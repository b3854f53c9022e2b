"""Special tokens by a GGUF file's metadata, found as llama.cpp finds them."""

from __future__ import annotations

from models.fields import Fields

_TOKENS = "tokenizer.ggml.tokens"
_ENDS = ("eos_token_id", "eos_token_ids", "eot_token_id", "eom_token_id")  # end of sequence, of turn, of message
_SENTENCE_PIECE = {"bos": 1, "eos": 2, "unknown": 0}  # where the file names none
END_TEXTS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<｜end▁of▁sentence｜>",  # noqa: RUF001 (DeepSeek's)
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<eos>",
    }
)
"""Tokens that end an answer whatever the metadata declares: files often name only the end of a text, not of a turn."""


def special_id(fields: Fields, name: str) -> int | None:
    """The id under ``tokenizer.ggml.{name}_token_id``; None: there is none, or it is outside the vocabulary.

    Raises:
      CheckpointError: it is no id.
    """
    named = fields.ids(f"tokenizer.ggml.{name}_token_id")
    default = _SENTENCE_PIECE.get(name) if fields.values.get("tokenizer.ggml.model") == "llama" else None
    found = [*_known(fields, named), *([] if default is None else _known(fields, (default,)))]
    return found[0] if found else None


def end_ids(fields: Fields) -> tuple[int, ...]:
    """Tokens that end an answer, the declared end of a text first: by the keys, and by what the tokens are called.

    Raises:
      CheckpointError: a key that holds no ids, or a vocabulary that isn't a list of texts.
    """
    eos = special_id(fields, "eos")
    named = [i for key in _ENDS for i in fields.ids(f"tokenizer.ggml.{key}")]
    called = [i for i, token in enumerate(fields.texts(_TOKENS)) if token in END_TEXTS]
    return tuple(dict.fromkeys([*([] if eos is None else [eos]), *_known(fields, named), *called]))


def _known(fields: Fields, ids: list[int] | tuple[int, ...]) -> list[int]:
    """Those that the vocabulary has; some files say -1 or 2**32 - 1 for none."""
    size = len(fields.texts(_TOKENS)) if fields.has(_TOKENS) else 2**31
    return [i for i in ids if 0 <= i < size]
