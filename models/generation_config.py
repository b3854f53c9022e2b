"""How a checkpoint's makers would have answers made: the tokens that end them, and how tokens are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.checkpoints.gguf_file import GgufFile, ggufs_in
from models.errors import CheckpointError
from models.fields import Fields, read_json

FILE = "generation_config.json"
_GGUF = "general.sampling."
_OF_GGUF = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """How tokens are chosen where nobody says otherwise; None: the checkpoint doesn't say.

    Raises:
      CheckpointError: a value out of range.
    """

    temperature: float | None = None
    """0: greedy."""
    top_k: int | None = None
    """0: all."""
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    """What divides or multiplies the logits of tokens that were there already; 1: nothing."""

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise CheckpointError(f"{name} is {getattr(self, name)!r:.60}, expected {expected}")

        check(0 <= (self.temperature or 0) <= 1e6, "temperature", "0 to 1e6")
        check(0 <= (self.top_k or 0) < 2**31, "top_k", "0 to 2**31 - 1")
        check(self.top_p is None or 0 < self.top_p <= 1, "top_p", "a number in (0, 1]")
        check(0 <= (self.min_p or 0) <= 1, "min_p", "a number in [0, 1]")
        penalty = self.repetition_penalty
        check(penalty is None or 0 < penalty <= 1e6, "repetition_penalty", "a number in (0, 1e6]")


def sampling_defaults(path: Path) -> SamplingDefaults:
    """Of a checkpoint's directory, by its generation_config.json, or of a GGUF file, by its metadata.

    As in transformers, a ``do_sample`` that isn't true means greedy, whatever temperature is said. A file that says
    nothing of ``top_k`` means all: the 50 that transformers takes then is its own choice, not the model's makers'.

    Raises:
      CheckpointError: a file that can't be read, or a value that is no number or out of range.
    """
    ggufs = ggufs_in(path) if path.is_dir() and not (path / FILE).exists() else []
    fields = _of_gguf(ggufs[0] if ggufs else path) if ggufs or not path.is_dir() else _json_in(path)
    try:
        numbers = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        temperature, top_k, top_p, min_p, penalty = (fields.number(n) if fields.has(n) else None for n in numbers)
        samples = fields.flag("do_sample", False)
        temperature = (1.0 if temperature is None else temperature) if samples else None
        if top_k is not None and top_k != int(top_k):
            raise CheckpointError(f"top_k is {top_k}, expected a whole number")
        return SamplingDefaults(
            temperature=temperature,
            top_k=None if top_k is None else max(int(top_k), 0),
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=penalty,
        )
    except CheckpointError as error:
        said = str(error).removeprefix(f"{fields.origin}: ").rstrip(".")
        raise CheckpointError(
            f"{fields.origin}: {said}. Mend it, or leave the model's own choices out: --no-generation-config, "
            "LLM(generation_config=False)."
        ) from error


def ends_in(directory: Path) -> tuple[int, ...]:
    """The tokens that a directory's generation_config.json says end an answer; none where it has no such file.

    Raises:
      CheckpointError: the file can't be read, or holds no ids there.
    """
    return _json_in(directory).ids("eos_token_id")


def _json_in(directory: Path) -> Fields:
    file = directory / FILE
    return Fields(origin=str(file), values=read_json(file) if file.exists() else {})


def _of_gguf(file: Path) -> Fields:
    values = GgufFile(file).metadata(lambda key: key.startswith(_GGUF))
    named = {name: values.get(_GGUF + key) for name, key in _OF_GGUF.items()}
    return Fields(origin=f"{file}: {_GGUF[:-1]}", values={**named, "do_sample": named["temperature"] is not None})
