"""Text to token ids and back, from a ``tokenizer.json`` or from a GGUF file's own vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from models.chat import render_chat
from models.checkpoints.gguf_file import ggufs_in
from models.errors import CheckpointError, TokenizerError, tokenizers_errors
from models.fields import read_json
from models.generation_config import ends_in
from models.hub import resolve
from models.vocabulary import tokenizer_from_gguf

_ADDS_BOS = "jaxkv_adds_bos"
"""In a tokenizer_config.json of ours: ``Tokenizer.adds_bos``, which a GGUF file says and others have no word for."""


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer with what a model needs to know beside it."""

    core: tokenizers.Tokenizer
    eos_ids: tuple[int, ...] = ()
    """Tokens that end an answer."""
    bos_id: int | None = None
    adds_bos: bool = False
    """Whether ``encode`` itself puts the first token in front (else the core's post-processor does what is due)."""
    chat_template: str | None = None

    @classmethod
    def from_hf(cls, tokenizer: Any) -> Tokenizer:
        """Of a fast tokenizer of transformers, or one of the tokenizers library; one of ours stays as it is, and so
        does what has its ``encode``, ``stream`` and ``eos_ids``.

        Raises:
          TokenizerError: it is none of these.
        """
        if all(hasattr(tokenizer, name) for name in ("encode", "stream", "eos_ids")):
            return tokenizer
        core = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not isinstance(core, tokenizers.Tokenizer):
            raise TokenizerError(
                f"expected a tokenizer of models, of transformers (a fast one) or of tokenizers, got a "
                f"{type(tokenizer).__name__}; write Tokenizer.from_hf(AutoTokenizer.from_pretrained(…))"
            )
        core = tokenizers.Tokenizer.from_str(core.to_str())  # its user's own may go on to cut and pad
        _only_encode(core)
        eos, template = getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "chat_template", None)
        ends = [] if eos is None else eos if isinstance(eos, list | tuple) else [eos]
        return cls(
            core=core,
            eos_ids=tuple(ends),
            bos_id=getattr(tokenizer, "bos_token_id", None),
            chat_template=template.get("default") if isinstance(template, dict) else template,
        )

    @property
    def vocab_size(self) -> int:
        return self.core.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids; ``add_special`` adds what the model expects around a text, unless it begins with that already.

        Raises:
          TokenizerError: the tokenizer can't take the text, such as a letter where it has no token for unknown ones.
        """
        bos = self.core.id_to_token(self.bos_id) if self.bos_id is not None else None
        add_special = add_special and not (bos and text.lstrip().startswith(bos))
        with tokenizers_errors(lambda said: TokenizerError(f"the model's tokenizer can't take this text ({said})")):
            ids = self.core.encode(text, add_special_tokens=add_special).ids
        return [self.bos_id, *ids] if self.adds_bos and add_special and self.bos_id is not None else ids

    def encode_chat(self, text: str) -> list[int]:
        """Token ids of what ``chat`` gave: as it stands, since the template writes the special tokens that are due.

        But a model whose ``encode`` itself begins with the first token gets it here too, once (``docs/models.md``).
        """
        return self.encode(text, add_special=self.adds_bos)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD.

        Raises:
          TokenizerError: the tokenizer can't make a text of them.
        """
        with tokenizers_errors(lambda said: TokenizerError(f"the model's tokenizer can't make a text of ids ({said})")):
            return self.core.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self) -> Detokenizer:
        """Text from tokens that come one by one."""
        return Detokenizer(tokenizer=self)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """A conversation in the model's format, as text for ``encode_chat``; ``options`` are the template's own.

        Raises:
          CheckpointError: the checkpoint has no chat template, or it refuses the conversation.
          ValueError: an option that the template never reads, or a message without role or content.
        """
        if self.chat_template is None:
            raise CheckpointError("this model has no chat template; give the prompt as plain text, without chat")
        named = {"bos_token": self.bos_id, "eos_token": self.eos_ids[0] if self.eos_ids else None}
        special = {name: self.core.id_to_token(i) or "" for name, i in named.items() if i is not None}
        return render_chat(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=special,
            tools=tools,
            options=options,
        )


@dataclass(kw_only=True)
class Detokenizer:
    """Gives out only whole characters: bytes of an unfinished one are held back. Special tokens have no text."""

    tokenizer: Tokenizer
    _special: frozenset[int] = field(init=False)
    _ids: list[int] = field(default_factory=list)
    _start: int = 0
    """Where the text that gives the next token its context begins."""
    _given: int = 0
    """Tokens whose text is out."""

    def __post_init__(self) -> None:
        added = self.tokenizer.core.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)

    def push(self, token: int) -> str:
        """The text that this token completes; often empty."""
        if token in self._special:  # as the context of the next token, it would have that lose its space
            return ""
        self._ids.append(token)
        text = self._new_text()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._start, self._given = self._given, len(self._ids)
        return text

    def flush(self) -> str:
        """What is still held back, with U+FFFD for what never became a character."""
        text = self._new_text()
        self._start = self._given = len(self._ids)
        return text

    def _new_text(self) -> str:
        before = self.tokenizer.decode(self._ids[self._start : self._given])
        return self.tokenizer.decode(self._ids[self._start :])[len(before) :]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a ``.gguf`` file, or of a directory with ``tokenizer.json`` or one ``.gguf``; a text may also be
    a built-in name or one of the Hugging Face Hub.

    Raises:
      CheckpointError: there is none, it can't be read, or it is of an unknown kind.
    """
    path = resolve(path) if isinstance(path, str) else path
    if path.is_dir() and not (path / "tokenizer.json").exists():
        files = ggufs_in(path)
        if len(files) != 1:
            raise CheckpointError(f"{path} has no tokenizer.json; copy the model's own beside its weights.")
        path = files[0]
    if path.is_dir():
        return _from_directory(path)
    parts = tokenizer_from_gguf(path)
    return Tokenizer(
        core=parts.core,
        eos_ids=parts.eos_ids,
        bos_id=parts.bos_id,
        adds_bos=parts.adds_bos,
        chat_template=parts.chat_template,
    )


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write what ``load_tokenizer`` reads from a directory, but for the ends of an answer after the first."""
    tokenizer.core.save(str(directory / "tokenizer.json"))
    ids = {"bos_token": tokenizer.bos_id, "eos_token": next(iter(tokenizer.eos_ids), None)}
    config = {name: tokenizer.core.id_to_token(i) for name, i in ids.items() if i is not None}
    config = {name: text for name, text in config.items() if text is not None}
    said = json.dumps(config | {_ADDS_BOS: tokenizer.adds_bos}, indent=2)
    (directory / "tokenizer_config.json").write_text(said, encoding="utf-8")
    if tokenizer.chat_template is not None:
        (directory / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def _from_directory(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    with tokenizers_errors(lambda said: CheckpointError(f"{file} can't be read ({said}). Download it again.")):
        core = tokenizers.Tokenizer.from_file(str(file))
        _only_encode(core)
    config = _json(path / "tokenizer_config.json")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    if (path / "chat_template.jinja").exists():
        try:
            template = (path / "chat_template.jinja").read_text(encoding="utf-8")
        except ValueError as error:
            raise CheckpointError(f"{path / 'chat_template.jinja'} isn't UTF-8: {error}. Download it again.") from error
    ends = [core.token_to_id(token) for token in [_content(config.get("eos_token"))] if token]
    ends += ends_in(path)
    bos = _content(config.get("bos_token"))
    return Tokenizer(
        core=core,
        eos_ids=tuple(dict.fromkeys(i for i in ends if i is not None and 0 <= i < 2**32)),  # some say -1 for none
        bos_id=core.token_to_id(bos) if bos else None,
        adds_bos=config.get(_ADDS_BOS) is True,
        chat_template=template if isinstance(template, str) else None,
    )


def _only_encode(core: tokenizers.Tokenizer) -> None:
    """Undo what ``tokenizer.json`` keeps of a training: a text is all of its tokens, and the same each time."""
    core.no_truncation()
    core.no_padding()
    if isinstance(core.model, tokenizers.models.BPE):
        core.model.dropout = None


def _content(token: object) -> str | None:
    """A special token, which is written as text or as an object with its text in it."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _json(path: Path) -> dict[str, object]:
    return read_json(path) if path.exists() else {}
