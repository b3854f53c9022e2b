"""The config of a Llama-family model, from a Hugging Face config.json or from GGUF metadata."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from models.errors import CheckpointError
from models.fields import Fields
from models.interface import AttentionSpec, ModelSizes
from models.rope import RopeScaling
from models.special_ids import end_ids, special_id

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelSizes):
    """The shape of a ``models.Llama``.

    Raises:
      CheckpointError: sizes that don't belong together.
    """

    intermediate_size: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    attention_bias: bool = False
    """Of the query, key and value projections."""
    output_bias: bool = False
    """Of the attention's output projection."""
    qk_norm: bool = False
    """An RMSNorm over each head's query and key, before RoPE."""
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts("intermediate_size")
        if not (self.rope_theta > 0 and self.rms_norm_eps > 0):
            raise CheckpointError(
                f"expected positive numbers, got {self.rope_theta=}, {self.rms_norm_eps=}. The config is damaged."
            )
        if self.rope_scaling is not None and len(self.rope_scaling.divisors) != self.head_dim // 2:
            raise CheckpointError(
                f"RoPE scaling has {len(self.rope_scaling.divisors)} divisors, expected head_dim / 2 = "
                f"{self.head_dim // 2}. The config or the rope_freqs tensor is damaged."
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, object]) -> LlamaConfig:
        """From the contents of a config.json of model type llama, mistral, qwen2 or qwen3.

        What the file leaves out takes transformers' own default for that model type.

        Raises:
          CheckpointError: another model type, an absent or malformed key, or a feature that isn't supported.
        """
        fields = Fields(origin="config.json", values=config)
        kind = fields.choice("model_type", MODEL_TYPES)
        _reject_hf_variants(fields)
        heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
        head_dim = fields.integer("head_dim", 128 if kind == "qwen3" else hidden // max(heads, 1))
        # transformers 5 writes rope_parameters; before, there were rope_theta and rope_scaling.
        rope = fields.section("rope_parameters" if fields.has("rope_parameters") else "rope_scaling")
        theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
        bias = kind != "mistral" and fields.flag("attention_bias", False)  # Mistral has none, whatever its config says
        return cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=fields.integer("num_key_value_heads", heads if kind == "llama" else None),
            head_dim=head_dim,
            max_context=_hf_max_context(fields, kind),
            rope_theta=theta,
            rope_scaling=_hf_rope_scaling(rope, head_dim, theta),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            tie_embeddings=fields.flag("tie_word_embeddings", False),
            attention_bias=kind == "qwen2" or bias,
            output_bias=bias and kind != "qwen2",
            qk_norm=kind == "qwen3",
            eos_token_ids=fields.ids("eos_token_id"),
            bos_token_id=next(iter(fields.ids("bos_token_id")), None),
        )

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, object],
        *,
        tensor_names: Collection[str],
        rope_divisors: Sequence[float] | None = None,
    ) -> LlamaConfig:
        """From the metadata of a GGUF file of architecture llama (Mistral too), qwen2 or qwen3.

        Args:
          metadata: key-value pairs, as Python values; the tokens among them, where those that end an answer are wanted.
          tensor_names: of the file's tensors; without an output matrix the embeddings are tied.
          rope_divisors: contents of rope_freqs.weight, ``[head_dim / 2]``, where the file has it.

        Raises:
          CheckpointError: another architecture, an absent or malformed key, or a feature that isn't supported.
        """
        fields = Fields(origin="GGUF metadata", values=metadata)
        kind = fields.choice("general.architecture", GGUF_ARCHITECTURES)
        _reject_gguf_variants(fields, kind)
        heads, hidden = fields.integer(f"{kind}.attention.head_count"), fields.integer(f"{kind}.embedding_length")
        head_dim = fields.integer(f"{kind}.attention.key_length", hidden // max(heads, 1))
        for key in (f"{kind}.attention.value_length", f"{kind}.rope.dimension_count"):
            if fields.integer(key, head_dim) != head_dim:
                raise CheckpointError(
                    f"GGUF metadata: {key} is {fields.integer(key)}, expected {head_dim}, as for keys."
                )
        context = fields.integer(f"{kind}.context_length")
        return cls(
            vocab_size=fields.integer(f"{kind}.vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.integer(f"{kind}.feed_forward_length"),
            num_layers=fields.integer(f"{kind}.block_count"),
            num_heads=heads,
            num_kv_heads=fields.integer(f"{kind}.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_context=min(context, fields.integer(f"{kind}.attention.sliding_window", context)),
            rope_theta=fields.number(f"{kind}.rope.freq_base", 10000.0),
            rope_scaling=_gguf_rope_scaling(fields, kind, head_dim, rope_divisors),
            rms_norm_eps=fields.number(f"{kind}.attention.layer_norm_rms_epsilon"),
            tie_embeddings="output.weight" not in tensor_names,
            attention_bias=kind == "qwen2" or "blk.0.attn_q.bias" in tensor_names,
            output_bias="blk.0.attn_output.bias" in tensor_names,
            qk_norm=kind == "qwen3",
            eos_token_ids=end_ids(fields),
            bos_token_id=special_id(fields, "bos"),
        )

    @classmethod
    def from_saved(cls, fields: Fields) -> LlamaConfig:
        """From what ``dataclasses.asdict`` made of one, by way of JSON.

        Raises:
          CheckpointError: a malformed value.
          TypeError: an unknown or absent key, or a value of the wrong type.
        """
        divisors = fields.section("rope_scaling").numbers("divisors") if fields.has("rope_scaling") else None
        converted = {
            "rope_scaling": None if divisors is None else RopeScaling(divisors=divisors),
            "eos_token_ids": fields.ids("eos_token_ids"),
            "specs": tuple(AttentionSpec(**spec) for spec in fields.sections("specs")),
        }
        return cls(**{**fields.values, **converted})


def _reject_hf_variants(fields: Fields) -> None:
    """Refuse what would load as a Llama but compute something else."""
    if fields.text("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"config.json: hidden_act is {fields.text('hidden_act')!r}, expected 'silu'.")
    if fields.flag("mlp_bias", False):
        raise CheckpointError("config.json: mlp_bias is true, expected false. Such models aren't supported.")
    rotary = fields.number(
        "partial_rotary_factor", fields.section("rope_parameters").number("partial_rotary_factor", 1)
    )
    if rotary != 1:
        raise CheckpointError(f"config.json: partial_rotary_factor is {rotary}, expected 1: RoPE over the whole head.")
    if fields.has("quantization_config"):
        raise CheckpointError(
            "config.json has a quantization_config, expected plain float weights. Use the unquantised checkpoint, or a "
            "GGUF file for quantised weights."
        )


def _reject_gguf_variants(fields: Fields, kind: str) -> None:
    """Refuse what isn't a whole, dense model."""
    if fields.integer(f"{kind}.expert_count", 0):
        raise CheckpointError("GGUF metadata: this is a mixture of experts, expected a dense model.")
    if fields.integer("split.count", 1) > 1:
        raise CheckpointError(
            "GGUF metadata: the file is one part of a split model, expected a whole one. Join the parts with "
            "`llama-gguf-split --merge`."
        )


def _hf_max_context(fields: Fields, kind: str) -> int:
    context = fields.integer("max_position_embeddings")
    if kind == "mistral":  # its window is always on; null means none, and transformers takes an absent one for 4096
        absent = context if "sliding_window" in fields.values else 4096
        return min(context, fields.integer("sliding_window", absent))
    # Qwen names a window that use_sliding_window switches on.
    windowed = kind in ("qwen2", "qwen3") and fields.flag("use_sliding_window", False)
    return min(context, fields.integer("sliding_window", context)) if windowed else context


def _hf_rope_scaling(rope: Fields, head_dim: int, theta: float) -> RopeScaling | None:
    kind = rope.text("rope_type", rope.text("type", "default"))
    match kind:
        case "default":
            return None
        case "linear":
            return RopeScaling.linear(head_dim=head_dim, factor=rope.number("factor"))
        case "llama3":
            return RopeScaling.llama3(
                head_dim=head_dim,
                theta=theta,
                factor=rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_max_context=rope.integer("original_max_position_embeddings"),
            )
    raise CheckpointError(f"{rope.origin}: RoPE scaling {kind!r} isn't supported, expected default, linear or llama3.")


def _gguf_rope_scaling(
    fields: Fields, kind: str, head_dim: int, divisors: Sequence[float] | None
) -> RopeScaling | None:
    # Older files have rope.scale_linear where newer ones have rope.scaling.type and rope.scaling.factor.
    older = f"{kind}.rope.scale_linear"
    scaling = fields.text(f"{kind}.rope.scaling.type", "linear" if fields.has(older) else "none")
    if scaling not in ("none", "default", "linear"):
        raise CheckpointError(f"GGUF metadata: RoPE scaling {scaling!r} isn't supported, expected none or linear.")
    factor = 1.0
    if scaling == "linear":
        newer = f"{kind}.rope.scaling.factor"
        factor = fields.number(newer if fields.has(newer) else older)
    if divisors is not None:
        return RopeScaling(divisors=tuple(factor * float(divisor) for divisor in divisors))
    return None if factor == 1.0 else RopeScaling.linear(head_dim=head_dim, factor=factor)
