"""Several chips that share one model's KV heads (docs/parallel.md): what each has, and what they send each other."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from flax import nnx
from targets import Device

from models import Llama, LlamaConfig
from models.sharding import check_count

GROUP = 128
"""Weights of 4 bits that share a scale."""
SUMS_A_LAYER = 2
"""Of hidden states: attention's, and the feed-forward's."""
NUMBERS = 4
"""Sums of single numbers a step, as ``compile_slices.py`` finds them: whether all chips have blocks and room in their
tables, asked by the loop and again by the step."""
HIDDEN, LOGIT = 2, 4
"""Bytes of a hidden state, bfloat16, and of a logit, float32, as they are sent."""


@dataclass(frozen=True, kw_only=True)
class Collectives:
    """What chips in a ring send, each thing after the last and while nothing is computed; that is how a step has it.

    A sum goes round twice, once to add up parts and once to hand them on, a gather once; on each round a chip passes on
    all but its own part, in as many hops as there are other chips.
    """

    chips: int
    hops: int
    """One after the other."""
    sent: float
    """Bytes, by each chip."""

    def seconds(self, device: Device) -> float:
        return sum(self.parts(device).values())

    def parts(self, device: Device) -> dict[str, float]:
        """Seconds of each part, of which both are spent."""
        if self.chips == 1:
            return {"hops": 0.0, "links": 0.0}
        if device.links is None:
            raise ValueError(f"expected a device with links to others, got {device.name} and {self.chips} chips")
        return {"hops": self.hops * device.links.hop, "links": self.sent / device.links.rate(self.chips)}


ALONE = Collectives(chips=1, hops=0, sent=0.0)


def step_collectives(model: LlamaConfig, batch: int, chips: int) -> Collectives:
    """Of a decode step: sums of hidden states and of numbers, and a gather of the logits.

    Args:
      model: the whole one.
    """
    joined = int(is_vocabulary_split(model, chips))
    sums = SUMS_A_LAYER * model.num_layers + joined
    summed = batch * model.hidden_size * HIDDEN * sums + 4 * NUMBERS
    others = chips - 1
    return Collectives(
        chips=chips,
        hops=others * (2 * (sums + NUMBERS) + joined),
        sent=others / chips * (2 * summed + joined * batch * model.vocab_size * LOGIT),
    )


def share(model: LlamaConfig, chips: int) -> LlamaConfig:
    """What one of the chips has, as if it were a model of its own, so that it is counted like a whole one."""
    return replace(
        model,
        num_heads=model.num_heads // chips,
        num_kv_heads=model.num_kv_heads // chips,
        intermediate_size=model.intermediate_size // chips,
        vocab_size=model.vocab_size // (chips if is_vocabulary_split(model, chips) else 1),
    )


def is_vocabulary_split(model: LlamaConfig, chips: int) -> bool:
    """Or whole on each chip, where it doesn't divide."""
    return model.vocab_size % chips == 0


def why_not_shared(device: Device, model: LlamaConfig, weights: str, chips: int) -> str | None:
    """Why so many chips can't share a model; None: they can. ``weights``: of ``roofline.WEIGHTS``."""
    if chips == 1:
        return None
    try:
        check_count(_one_layer(model), chips)
    except ValueError:
        return "does not divide"
    inputs = model.num_heads * model.head_dim, model.intermediate_size
    if weights == "4-bit" and any(size % (GROUP * chips) for size in inputs):
        return "does not divide"
    return None if device.links else "no links between chips"


@cache
def _one_layer(model: LlamaConfig) -> Any:
    """Shapes only; how one layer divides, all do."""
    return nnx.eval_shape(lambda: Llama(replace(model, num_layers=1), rngs=nnx.Rngs(0)))
