"""Llama-family models in Flax NNX, their checkpoints, and their tokenizers."""

from models.attention import Attend, causal_attention
from models.checkpoints import load_model
from models.config import LlamaConfig
from models.errors import CheckpointError
from models.hub import resolve
from models.llama import Llama, stack_layers
from models.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Attend",
    "CheckpointError",
    "Llama",
    "LlamaConfig",
    "Tokenizer",
    "causal_attention",
    "load_model",
    "load_tokenizer",
    "resolve",
    "stack_layers",
]
