"""Models in Flax NNX, their checkpoints, their tokenizers, and the interface that other models can implement."""

from models.checkpoints import load_model
from models.convert import save_model
from models.errors import CheckpointError, TokenizerError
from models.hub import resolve
from models.interface import Attend, AttentionSpec, Decoder, ModelSizes, Rotary, causal_attention
from models.layers import are_alike, stack_layers
from models.llama import Llama
from models.llama_config import LlamaConfig
from models.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Attend",
    "AttentionSpec",
    "CheckpointError",
    "Decoder",
    "Llama",
    "LlamaConfig",
    "ModelSizes",
    "Rotary",
    "Tokenizer",
    "TokenizerError",
    "are_alike",
    "causal_attention",
    "load_model",
    "load_tokenizer",
    "resolve",
    "save_model",
    "stack_layers",
]
