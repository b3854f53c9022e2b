"""What a checkpoint's config says of rotary positions: its base and its scaling."""

from __future__ import annotations

from collections.abc import Sequence

from models.errors import CheckpointError
from models.fields import Fields
from models.rope import RopeScaling

_ALWAYS = {"rope_type", "rope_theta", "partial_rotary_factor"}
_LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
_OF_TYPE = {"default": set(), "linear": {"factor"}, "llama3": _LLAMA3}
_OF_GGUF = {"type", "factor", "original_context_length", "finetuned", "attn_factor"}


def hf_rope(fields: Fields) -> Fields:
    """All that a config.json says of RoPE, as one section.

    transformers 5 writes ``rope_parameters``; before, there were ``rope_scaling``, where ``rope_type`` was ``type``,
    and ``rope_theta`` beside it.

    Raises:
      CheckpointError: values that contradict each other, a type or a key that isn't known, or RoPE over part of a head.
    """
    beside = {key: fields.values.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    merged: dict[str, object] = {}
    for said in (fields.section("rope_scaling").values, fields.section("rope_parameters").values, beside):
        _merge(merged, said)
    rope = Fields(origin="config.json: RoPE", values=merged)
    kind = rope.text("rope_type", "default")
    if kind not in _OF_TYPE:
        raise CheckpointError(
            f"config.json: RoPE scaling {kind!r:.60} isn't supported, expected {', '.join(_OF_TYPE)}. Use "
            "another model."
        )
    if kind == "llama3":  # some have it outside
        _merge(merged, {key: fields.values.get(key) for key in ("original_max_position_embeddings",)})
    if unknown := sorted(merged.keys() - _ALWAYS - _OF_TYPE[kind]):
        raise CheckpointError(
            f"config.json: {unknown[0]!r:.60} isn't known of RoPE of type {kind!r}, expected "
            f"{', '.join(sorted(_ALWAYS | _OF_TYPE[kind]))}. Remove it if it means nothing."
        )
    if (rotary := rope.number("partial_rotary_factor", 1.0)) != 1:
        raise CheckpointError(f"config.json: partial_rotary_factor is {rotary}, expected 1: RoPE over the whole head.")
    return rope


def _merge(merged: dict[str, object], said: object) -> None:
    assert isinstance(said, dict)
    for name, value in said.items():
        key = "rope_type" if name == "type" else name
        if value is not None and merged.setdefault(key, value) != value:
            raise CheckpointError(
                f"config.json: {name} of RoPE is both {merged[key]!r:.60} and {value!r:.60}, expected one value. Keep "
                "that which the model was trained with."
            )


def hf_rope_scaling(rope: Fields, *, head_dim: int, theta: float, max_positions: int) -> RopeScaling | None:
    """By what ``hf_rope`` gave.

    Args:
      max_positions: Llama 3's original context where the config doesn't name it.
    """
    match rope.text("rope_type", "default"):
        case "linear":
            return RopeScaling.linear(head_dim=head_dim, factor=rope.number("factor"))
        case "llama3":
            return RopeScaling.llama3(
                head_dim=head_dim,
                theta=theta,
                factor=rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_max_context=rope.integer("original_max_position_embeddings", max_positions),
            )
    return None


def gguf_rope_scaling(
    fields: Fields, kind: str, *, head_dim: int, divisors: Sequence[float] | None
) -> RopeScaling | None:
    """Of a GGUF file of architecture ``kind``. As in llama.cpp a factor without a type means linear, and 0 means 1.

    Args:
      divisors: contents of rope_freqs.weight, ``[head_dim / 2]``, where the file has it.

    Raises:
      CheckpointError: a type or a key that isn't known, or values that contradict each other.
    """
    prefix = f"{kind}.rope.scaling."
    if unknown := sorted(key for key in fields.values if key.startswith(prefix) and key[len(prefix) :] not in _OF_GGUF):
        raise CheckpointError(f"GGUF metadata: {unknown[0]!r:.60} isn't supported, expected a model without it.")
    if (magnitude := fields.number(prefix + "attn_factor", 1.0)) != 1:
        raise CheckpointError(f"GGUF metadata: {prefix}attn_factor is {magnitude}, expected 1. Use another model.")
    scaling = fields.text(prefix + "type", "linear")
    if scaling not in ("none", "default", "linear"):
        raise CheckpointError(f"GGUF metadata: RoPE scaling {scaling!r:.60} isn't supported, expected none or linear.")
    named = [key for key in (prefix + "factor", f"{kind}.rope.scale_linear") if fields.has(key)]  # the latter is older
    factors = {fields.number(key) or 1.0 for key in named} | ({1.0} if scaling != "linear" else set())
    if len(factors) > 1:
        raise CheckpointError(
            f"GGUF metadata: RoPE scaling {scaling!r} with the factors {sorted(factors)}, expected one. Convert the "
            "model again."
        )
    factor = next(iter(factors), 1.0)
    if divisors is not None:
        return RopeScaling(divisors=tuple(factor * float(divisor) for divisor in divisors))
    return None if factor == 1.0 else RopeScaling.linear(head_dim=head_dim, factor=factor)
