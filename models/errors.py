"""What goes wrong with checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

LONGEST = 2000
"""Characters of a message: names and values in a damaged file may be of any length."""


class _ShortError(ValueError):
    """Its message is cut in the middle where it is too long: it begins with the file and ends with what to do."""

    def __init__(self, message: object = ""):
        text = str(message)
        super().__init__(text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}")


class CheckpointError(_ShortError):
    """A checkpoint, tokenizer or model name that can't be used; says what was found, what was expected, what to do."""


class TokenizerError(_ShortError):
    """A text that the tokenizer can't take, or ids that it can't make a text of."""


@contextmanager
def tokenizers_errors(told: Callable[[str], ValueError]) -> Iterator[None]:
    """Around calls of the tokenizers library, which raises bare ``Exception`` and panics with a ``BaseException``.

    Args:
      told: from what the library said, the error to raise instead.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, CheckpointError, TokenizerError):
        raise
    except BaseException as error:
        raise told(f"{type(error).__name__}: {error}") from error
