"""What a family of models says of itself, so that its checkpoints can be loaded from any format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from models.fields import Fields
from models.interface import ModelSizes, ParameterPath, Shardable
from models.layers import Layered


@dataclass(frozen=True)
class Whole:
    """A parameter that is one tensor."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)


@dataclass(frozen=True)
class Rows:
    """A parameter that is rows ``start`` to ``stop`` of a tensor, such as the queries' part of a fused projection."""

    name: str
    start: int
    stop: int

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)


@dataclass(frozen=True)
class Stacked:
    """A parameter of one axis more than its tensors, such as the weights of a layer's experts."""

    names: tuple[str, ...]


Stored = Whole | Rows | Stacked
"""Where a checkpoint has a parameter. Linear weights are stored as ``[out, in]``, so that rows are outputs."""


@dataclass(frozen=True, kw_only=True)
class NameMap:
    """Names of a checkpoint that has each parameter as a tensor of its own."""

    model: Mapping[str, str]
    """Modules outside the layers."""
    layer_prefix: str
    """What stands before a layer's number."""
    layer: Mapping[str, str]
    """Modules inside a layer."""

    def __call__(self, path: ParameterPath, config: ModelSizes) -> Whole:
        leaf = "bias" if path[-1] == "bias" else "weight"
        if path[0] == "layers":
            module = ".".join(path[2:-1])
            return Whole(f"{self.layer_prefix}.{path[1]}.{self.layer[module]}.{leaf}")
        return Whole(f"{self.model[path[0]]}.{leaf}")


class Ported(Shardable, Layered, Protocol):
    """A model that checkpoints are loaded into: an ``nnx.Module`` whose kernels are ``[in, out]``."""

    config: Any
    """A ``ModelSizes``, of the family's own class."""


Model = TypeVar("Model", bound=Ported, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Family(Generic[Model]):
    """A model's class and how to read its checkpoints: all that loading needs to know of it.

    Configs are of the class ``config``; each function that makes one raises ``CheckpointError`` for what it can't be.
    """

    config_file: str
    """In a checkpoint of our own, the file with the config; it tells the family."""
    config: type[ModelSizes]
    build: Callable[..., Model]
    """``build(config, *, rngs, dtype)``: with random weights."""
    hf_types: tuple[str, ...] = ()
    """``model_type`` in config.json."""
    gguf_architectures: tuple[str, ...] = ()
    """``general.architecture`` in GGUF metadata."""
    gguf_interleaved: tuple[str, ...] = ()
    """Architectures whose query and key rows are stored for interleaved RoPE: pair i is rows 2i and 2i + 1."""
    config_from_hf: Callable[[Mapping[str, object]], Any]
    """From the contents of config.json."""
    config_from_gguf: Callable[..., Any]
    """``config_from_gguf(metadata, *, tensor_names, rope_divisors)``, as in ``LlamaConfig.from_gguf``."""
    config_from_saved: Callable[[Fields], Any]
    """From what ``dataclasses.asdict`` made of a config, by way of JSON; raises TypeError too."""
    hf_names: Callable[[ParameterPath, Any], Stored]
    """From a parameter's path and the config."""
    gguf_names: Callable[[ParameterPath, Any], Stored]
    """Like ``hf_names``."""
