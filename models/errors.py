"""What goes wrong with checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint, tokenizer or model name that can't be used; says what was found, what was expected, what to do."""
