"""The words of command lines and job files, with nothing heavy behind them: help is there at once."""

DTYPES = ("float32", "bfloat16")
"""Of weights, keys and values."""
WEIGHTS = ("stored", *DTYPES, "int8", "fp8")
"""What weights are held as: as the file has them, all floats, or codes with a scale for each output."""
POLICIES = (
    "kv-compress",
    "kv-compress-full",
    "snapkv",
    "ada-kv",
    "pyramidkv",
    "h2o",
    "streaming-llm",
    "tova",
    "knorm",
    "keydiff",
    "expected-attention",
    "kvzip",
    "auto",
    "gate",
    "leankv",
    "mixed",
)
SCHEDULES = ("throughput", "latency")
"""What goes first where prompts wait while others are answered."""
BUDGETS = ("ratio", "max_cache_tokens", "max_cache_bytes")
SETTINGS = {
    "protected_window": "a whole number",
    "sinks": "a whole number",
    "window": "a whole number",
    "compress_every": "a whole number",
    "high_threshold": "a number",
    "low_threshold": "a number",
    "high": "a text",
    "low": "a text",
    "high_share": "a number",
    "unquantised_window": "true or false",
    "hadamard": "true or false",
    "reread": "true or false",
}
"""What may be said of a policy beside its budget."""
SAMPLING = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "logprobs",
    "top_logprobs",
)


def byte_count(text: str) -> int:
    """``1500000``, ``500M``, ``2G``, ``1.5GiB``: K, M and G are powers of 1000, KiB, MiB and GiB of 1024.

    Raises:
      ValueError: it is none of these.
    """
    units = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}
    number = text.strip().upper().removesuffix("B")
    unit = number.lstrip("0123456789.")
    try:
        return int(float(number[: len(number) - len(unit)]) * units[unit.strip()])
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"{text!r} is no number of bytes; write 500M, 2G or 1.5GiB") from None
