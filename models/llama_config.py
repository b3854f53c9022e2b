"""The config of a Llama-family model, from a Hugging Face config.json or from GGUF metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from models.errors import CheckpointError
from models.fields import Fields
from models.interface import AttentionSpec, ModelSizes
from models.rope import RopeScaling
from models.rope_config import gguf_rope_scaling, hf_rope, hf_rope_scaling
from models.special_ids import end_ids, special_id

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_LLAMA = _SIZES | {"vocab_size": 32_000, "intermediate_size": 11_008, "max_position_embeddings": 2048}
_MISTRAL = _LLAMA | {"intermediate_size": 14_336, "max_position_embeddings": 131_072}
_QWEN = _SIZES | {"vocab_size": 151_936, "intermediate_size": 22_016, "max_position_embeddings": 32_768}
_QWEN |= {"num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_HF_DEFAULTS = {
    "llama": _LLAMA,
    "mistral": _MISTRAL | {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}
"""What transformers' config classes take for an absent key; one that is null is another thing."""


_SAVED = {"int": Fields.integer, "float": Fields.number, "bool": Fields.flag}
"""How ``from_saved`` reads fields, by their types."""


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

        What the file leaves out takes transformers' own default for that model type, but for the special tokens: it has
        none that it doesn't name.

        Raises:
          CheckpointError: another model type, an absent or malformed key, or a feature that isn't supported.
        """
        kind = Fields(origin="config.json", values=config).choice("model_type", MODEL_TYPES)
        fields = Fields(origin="config.json", values={**_HF_DEFAULTS[kind], **config})
        _reject_hf_variants(fields, kind)
        heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
        rope = hf_rope(fields)
        bias = kind != "mistral" and fields.flag("attention_bias", False)  # Mistral has none, whatever its config says
        made = cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=fields.integer("num_key_value_heads", heads),
            head_dim=fields.integer("head_dim", None if kind == "qwen3" else hidden // max(heads, 1)),
            max_context=_hf_max_context(fields, kind),
            rope_theta=rope.number("rope_theta", 10000.0),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            tie_embeddings=fields.flag("tie_word_embeddings", False),
            attention_bias=kind == "qwen2" or bias,
            output_bias=bias and kind != "qwen2",
            qk_norm=kind == "qwen3",
            eos_token_ids=fields.ids("eos_token_id"),
            bos_token_id=next(iter(fields.ids("bos_token_id")), None),
        )
        positions = fields.integer("max_position_embeddings")  # scaling last: by sizes that are known to be sound
        scaling = hf_rope_scaling(rope, head_dim=made.head_dim, theta=made.rope_theta, max_positions=positions)
        return replace(made, rope_scaling=scaling)

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
        made = cls(
            vocab_size=fields.integer(f"{kind}.vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.integer(f"{kind}.feed_forward_length"),
            num_layers=fields.integer(f"{kind}.block_count"),
            num_heads=heads,
            num_kv_heads=fields.integer(f"{kind}.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_context=min(context, fields.integer(f"{kind}.attention.sliding_window", context)),
            rope_theta=fields.number(f"{kind}.rope.freq_base", 10000.0),
            rms_norm_eps=fields.number(f"{kind}.attention.layer_norm_rms_epsilon"),
            tie_embeddings="output.weight" not in tensor_names,
            attention_bias=kind == "qwen2" or "blk.0.attn_q.bias" in tensor_names,
            output_bias="blk.0.attn_output.bias" in tensor_names,
            qk_norm=kind == "qwen3",
            eos_token_ids=end_ids(fields),
            bos_token_id=special_id(fields, "bos"),
        )
        return replace(made, rope_scaling=gguf_rope_scaling(fields, kind, head_dim=head_dim, divisors=rope_divisors))

    @classmethod
    def from_saved(cls, fields: Fields) -> LlamaConfig:
        """From what ``dataclasses.asdict`` made of one, by way of JSON.

        Raises:
          CheckpointError: an unknown key, or a malformed value.
          TypeError: an absent key.
        """
        known = {field.name: str(field.type) for field in dataclasses.fields(cls)}
        if unknown := sorted(fields.values.keys() - known.keys()):
            raise CheckpointError(f"{fields.origin} has {unknown[0]!r:.60}, which isn't known. Save the model again.")
        plain = {name: _SAVED[kind] for name, kind in known.items() if kind in _SAVED and name in fields.values}
        divisors = fields.section("rope_scaling").numbers("divisors") if fields.has("rope_scaling") else None
        converted = {
            "rope_scaling": None if divisors is None else RopeScaling(divisors=divisors),
            "eos_token_ids": fields.ids("eos_token_ids"),
            "bos_token_id": next(iter(fields.ids("bos_token_id")), None),
            "specs": tuple(AttentionSpec(**spec) for spec in fields.sections("specs")),
        }
        return cls(**{name: read(fields, name) for name, read in plain.items()}, **converted)


def _reject_hf_variants(fields: Fields, kind: str) -> None:
    """Refuse what would load as a Llama but compute something else."""
    if fields.text("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"config.json: hidden_act is {fields.text('hidden_act')!r}, expected 'silu'.")
    if kind == "llama" and fields.flag("mlp_bias", False):  # the others have none, whatever their configs say
        raise CheckpointError("config.json: mlp_bias is true, expected false. Such models aren't supported.")


def _reject_gguf_variants(fields: Fields, kind: str) -> None:
    """Refuse what isn't a dense model."""
    if fields.integer(f"{kind}.expert_count", 0):
        raise CheckpointError("GGUF metadata: this is a mixture of experts, expected a dense model.")


def _hf_max_context(fields: Fields, kind: str) -> int:
    """Tokens within which no layer's window cuts anything."""
    context, layers = fields.integer("max_position_embeddings"), fields.integer("num_hidden_layers")
    windowed = kind == "mistral"  # in all layers
    if kind in ("qwen2", "qwen3") and fields.flag("use_sliding_window"):
        types = fields.texts("layer_types")
        if unknown := sorted({*types} - {"full_attention", "sliding_attention"}):
            raise CheckpointError(
                f"config.json: layer_types has {unknown[0]!r:.60}, expected full_attention or sliding_attention. Such "
                "models aren't supported."
            )
        windowed = "sliding_attention" in types if types else fields.integer("max_window_layers") < layers
    return min(context, fields.integer("sliding_window", context)) if windowed else context
