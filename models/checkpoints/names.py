"""Where each parameter of `Llama` is found in the checkpoints of others."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class NameMap:
    """Translates a parameter's path in `Llama` into a checkpoint's name for it."""

    model: Mapping[str, str]  # modules outside the layers
    layer_prefix: str  # what stands before a layer's number
    layer: Mapping[str, str]  # modules inside a layer

    def __call__(self, path: tuple[str, ...]) -> str:
        """The name of e.g. ("layers", "3", "attention", "query", "kernel")."""
        leaf = "bias" if path[-1] == "bias" else "weight"
        if path[0] == "layers":
            module = ".".join(path[2:-1])
            return f"{self.layer_prefix}.{path[1]}.{self.layer[module]}.{leaf}"
        return f"{self.model[path[0]]}.{leaf}"


HUGGING_FACE = NameMap(
    model={"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
    layer_prefix="model.layers",
    layer={
        "attention_norm": "input_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.gate": "mlp.gate_proj",
        "feed_forward.up": "mlp.up_proj",
        "feed_forward.down": "mlp.down_proj",
    },
)

GGUF = NameMap(
    model={"embed": "token_embd", "norm": "output_norm", "head": "output"},
    layer_prefix="blk",
    layer={
        "attention_norm": "attn_norm",
        "attention.query": "attn_q",
        "attention.key": "attn_k",
        "attention.value": "attn_v",
        "attention.output": "attn_output",
        "attention.query_norm": "attn_q_norm",
        "attention.key_norm": "attn_k_norm",
        "feed_forward_norm": "ffn_norm",
        "feed_forward.gate": "ffn_gate",
        "feed_forward.up": "ffn_up",
        "feed_forward.down": "ffn_down",
    },
)
