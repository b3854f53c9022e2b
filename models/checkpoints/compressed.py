"""What a config.json says of quantised weights: which layers', in how many bits, and what shares a scale."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from models.errors import CheckpointError
from models.fields import Fields

KEYS = ("quantization_config", "compression_config")
"""Of config.json; the second is that of older checkpoints."""
METHODS = ("compressed-tensors", "fp8", "fbgemm_fp8", "modelopt", "gptq", "awq")
_FORMATS = ("dense", "naive-quantized", "float-quantized", "int-quantized", "pack-quantized", "mixed-precision")
_STRATEGIES = ("tensor", "channel", "block", "group")
_FEW_REPEATS, _SHORT = 4, 300
"""Of a pattern: more could take a regular expression years."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one linear layer's weights are quantised."""

    kind: str = "float"
    """Or "int"."""
    bits: int = 8
    strategy: str | None = None
    """What shares a scale: "tensor", "channel" (an output), "block" or "group"; None: whatever its shape says."""
    group: int | None = None
    """Inputs of a group; None: all of them."""
    block: tuple[int, int] | None = None
    """Outputs and inputs of a block."""
    symmetric: bool = True


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """What the config says of the whole checkpoint."""

    method: str | None
    """Of ``METHODS``; None: nothing."""
    scheme_of: Callable[[str], Scheme | None]
    """By a module's name; None: it isn't quantised."""
    older_zeros: bool = True
    """Whether GPTQ's zero points are stored less one."""


def quantisation_of(config: Mapping[str, object]) -> Quantisation:
    """From the contents of config.json.

    Raises:
      CheckpointError: a method, format or setting that isn't known; names it.
    """
    key = next((key for key in KEYS if config.get(key) is not None), None)
    if key is None:
        return Quantisation(method=None, scheme_of=lambda module: None)
    fields = Fields(origin="config.json", values=config).section(key)
    usual = "compressed-tensors" if key == KEYS[1] or fields.has("config_groups") else None
    method = fields.text("quant_method", usual)
    if method not in METHODS:
        raise CheckpointError(
            f"{fields.origin}: quant_method is {method!r:.60}, expected one of {', '.join(METHODS)}. Use another "
            "checkpoint of the model, or a GGUF file."
        )
    if method == "compressed-tensors":
        return Quantisation(method=method, scheme_of=_compressed(fields))
    scheme, unconverted = _uniform(fields, method), _unconverted(fields)
    kinds = {fields.text(name, "gptq") for name in ("checkpoint_format", "format")} if method == "gptq" else set()
    if unknown := sorted(kinds - {"gptq", "gptq_v2"}):
        raise CheckpointError(f"{fields.origin}: the format is {unknown[0]!r:.60}, expected 'gptq' or 'gptq_v2'.")
    return Quantisation(
        method=method,
        scheme_of=lambda module: None if any(_within(module, name) for name in unconverted) else scheme,
        older_zeros="gptq_v2" not in kinds,
    )


def _unconverted(fields: Fields) -> list[str]:
    keys = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
    return [name for key in keys for name in fields.texts(key)]


def _within(module: str, name: str) -> bool:
    """Whether a module is the named one, or in it; the name may leave out what stands before it."""
    return f".{name}." in f".{module}."


def _uniform(fields: Fields, method: str) -> Scheme:
    """Of a method that stores all layers alike."""
    if method in ("gptq", "awq"):
        bits, group = fields.integer("bits"), fields.integer("group_size", -1)
        if bits not in (4, 8) or (method, bits) == ("awq", 8):
            raise CheckpointError(f"{fields.origin}: bits is {bits}, expected 4{' or 8' * (method == 'gptq')}.")
        if method == "awq" and (version := fields.text("version", fields.text("format", "gemm")).lower()) != "gemm":
            raise CheckpointError(f"{fields.origin}: version is {version!r:.60}, expected 'gemm'.")
        return Scheme(kind="int", bits=bits, strategy="group", group=_group(fields, group), symmetric=False)
    if method == "modelopt":
        algorithm = fields.text("quant_algo")
        if algorithm != "FP8":
            raise CheckpointError(f"{fields.origin}: quant_algo is {algorithm!r:.60}, expected 'FP8'.")
        return Scheme(strategy="tensor")
    if method == "fbgemm_fp8":
        return Scheme(strategy="channel")
    if (form := fields.text("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):
        raise CheckpointError(f"{fields.origin}: fmt is {form!r:.60}, expected 'e4m3'.")
    block = _block(fields, "weight_block_size")
    return Scheme(strategy="block" if block else None, block=block)


def _group(fields: Fields, size: int) -> int | None:
    if size == -1:
        return None
    if size < 1:
        raise CheckpointError(f"{fields.origin}: group_size is {size}, expected a positive number, or -1 for all.")
    return size


def _block(fields: Fields, key: str) -> tuple[int, int] | None:
    found: Any = fields.values.get(key)
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in found):
        raise CheckpointError(f"{fields.origin}: {key} is {found!r:.60}, expected two positive numbers.")
    return found[0], found[1]


def _compressed(fields: Fields) -> Callable[[str], Scheme | None]:
    form = fields.text("format", "mixed-precision")
    for origin, found in [(fields.origin, form), *((f.origin, f.text("format", form)) for f in _groups(fields))]:
        if found not in _FORMATS:
            raise CheckpointError(
                f"{origin}: format is {found!r:.60}, expected one of {', '.join(_FORMATS)}. Use another checkpoint."
            )
    sparsity = fields.section("sparsity_config")
    for name, refused in (
        ("sparsity_config", sparsity.values and sparsity.text("format", "dense") != "dense"),
        ("transform_config", fields.section("transform_config").section("config_groups").values),
    ):
        if refused:
            raise CheckpointError(f"{fields.origin}: {name} isn't supported, expected none. Use another checkpoint.")
    groups = [([_matcher(t, g.origin) for t in g.texts("targets")], _weights(g)) for g in _groups(fields)]
    ignored = [_matcher(name, fields.origin) for name in fields.texts("ignore")]

    def scheme_of(module: str) -> Scheme | None:
        if any(closeness(module) is not None for closeness in ignored):
            return None
        matches = [(c, scheme) for targets, scheme in groups for match in targets if (c := match(module)) is not None]
        best = min((closeness for closeness, _ in matches), default=None)
        found = {scheme for closeness, scheme in matches if closeness == best}
        if len(found) > 1:
            raise CheckpointError(
                f"{fields.origin}: several config_groups name {module!r}, with different weights. Use a checkpoint "
                "whose groups are of different layers."
            )
        return next(iter(found), None)

    return scheme_of


def _groups(fields: Fields) -> list[Fields]:
    groups = fields.section("config_groups")
    return [groups.section(name) for name in groups.values]


def _weights(group: Fields) -> Scheme | None:
    """None: the group quantises no weights."""
    fields = group.section("weights")
    if not fields.values:
        return None
    kind, bits = fields.text("type", "int"), fields.integer("num_bits", 8)
    size = fields.integer("group_size", -1)
    strategy = fields.text("strategy", "tensor" if size == -1 else "group")
    if (kind, bits) not in (("float", 8), ("int", 8), ("int", 4)) or strategy not in _STRATEGIES:
        raise CheckpointError(
            f"{fields.origin}: weights are {bits}-bit {kind!r:.20}, by {strategy!r:.20}, expected 8-bit float, or 4- "
            f"or 8-bit int, by one of {', '.join(_STRATEGIES)}. Use another checkpoint."
        )
    block = _block(fields, "block_structure")
    if (strategy == "block") != (block is not None):
        raise CheckpointError(
            f"{fields.origin}: strategy is {strategy!r} and block_structure {block}: one contradicts."
        )
    return Scheme(
        kind=kind,
        bits=bits,
        strategy=strategy,
        group=_group(fields, size),
        block=block,
        symmetric=fields.flag("symmetric", True),
    )


def _matcher(target: str, origin: str) -> Callable[[str], int | None]:
    """How closely a target means a module, the least the closest: 0 by name, 1 by pattern, 2 by class; None: not."""
    if not target.startswith("re:"):
        return lambda module: 0 if target == module else 2 if target == "Linear" else None
    pattern = target[3:]
    repeats = len(re.findall(r"[*+{]", pattern))
    if len(pattern) > _SHORT or repeats > _FEW_REPEATS or re.search(r"\)\s*[*+?{]", pattern):
        raise CheckpointError(
            f"{origin}: the pattern {target!r:.60} is too complex, expected at most {_FEW_REPEATS} *."
        )
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{origin}: {target!r:.60} is no regular expression ({error}).") from error
    return lambda module: 1 if compiled.match(module) else None
