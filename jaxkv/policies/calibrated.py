"""LeanKV's thresholds for models whose own were found: by its authors, or by ``scripts/calibrate.py``."""

from __future__ import annotations

from typing import NamedTuple

from models.interface import ModelSizes


class Thresholds(NamedTuple):
    """Times the text's length; see ``LeanKV``."""

    high: float
    low: float


class Family(NamedTuple):
    """What tells models of one pre-training from others."""

    num_layers: int
    hidden_size: int
    vocab_size: int


GENERAL = Thresholds(high=1.0, low=0.02)
"""Of any other model: those of Llama 3 8B."""
CALIBRATED = {
    Family(num_layers=32, hidden_size=4096, vocab_size=128_256): Thresholds(high=1.0, low=0.02),  # Llama 3 8B
    Family(num_layers=80, hidden_size=8192, vocab_size=128_256): Thresholds(high=1.0, low=0.0),  # Llama 3 70B
    Family(num_layers=28, hidden_size=3584, vocab_size=152_064): Thresholds(high=0.04, low=0.04),  # Qwen2.5 7B
    Family(num_layers=64, hidden_size=5120, vocab_size=152_064): Thresholds(high=3.0, low=0.0),  # Qwen2.5 32B, QwQ
}
"""The authors' evaluation has them from the training problems of MATH; for Qwen2.5 7B it has no low tier."""


def thresholds_for(model: ModelSizes) -> Thresholds:
    """Those of its family, or the general ones."""
    family = Family(model.num_layers, model.hidden_size, model.vocab_size)
    return CALIBRATED.get(family, GENERAL)
