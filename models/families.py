"""The families of models that can be loaded: a new one is a file of its own, and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from models import llama
from models.errors import CheckpointError
from models.family import Family
from models.fields import Fields

Model = llama.Llama
"""What loading gives; a union where there are several families."""

FAMILIES: tuple[Family[Model], ...] = (llama.FAMILY,)


def family_of_hf(config: Mapping[str, object]) -> Family[Model]:
    """By the contents of a config.json.

    Raises:
      CheckpointError: its model type is unknown.
    """
    types = tuple(kind for family in FAMILIES for kind in family.hf_types)
    kind = Fields(origin="config.json", values=config).choice("model_type", types)
    return next(family for family in FAMILIES if kind in family.hf_types)


def family_of_gguf(metadata: Mapping[str, object]) -> Family[Model]:
    """By a GGUF file's metadata.

    Raises:
      CheckpointError: its architecture is unknown.
    """
    architectures = tuple(kind for family in FAMILIES for kind in family.gguf_architectures)
    kind = Fields(origin="GGUF metadata", values=metadata).choice("general.architecture", architectures)
    return next(family for family in FAMILIES if kind in family.gguf_architectures)


def family_of_config(config: object) -> Family[Model]:
    """By the config of a model that was built.

    Raises:
      CheckpointError: it is of no family's class.
    """
    for family in FAMILIES:
        if type(config) is family.config:
            return family
    raise CheckpointError(
        f"the model's config is a {type(config).__name__}, expected one of "
        f"{', '.join(family.config.__name__ for family in FAMILIES)}. Add its family to models/families.py."
    )
