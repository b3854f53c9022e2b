"""A snapshot in a file: its arrays as they are held, and what they mean."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.snapshot import Snapshot
from pallas_kernels.paged_attention import Weakest
from pallas_kernels.quantised_block import BlockLayout, Format

VERSION = 2
PLAIN = ("pool", "scores", "positions", "lengths", "num_tokens")


def save_snapshot(snapshot: Snapshot, path: Path, said: Mapping[str, Any]) -> None:
    """Writes one ``.npz`` file, whole or not at all, with what else is to be said of it.

    Raises:
      OSError: it can't be written.
    """
    arrays = {name: getattr(snapshot, name) for name in PLAIN}
    layout = None
    if snapshot.layout is not None and snapshot.weakest is not None:
        arrays |= {"quantised": snapshot.quantised, "quantised_lengths": snapshot.quantised_lengths}
        arrays |= {"weakest_value": snapshot.weakest.value, "weakest_index": snapshot.weakest.index}
        layout = asdict(snapshot.layout)
    fetched = jax.device_get(arrays)
    about = {"version": VERSION, "layout": layout, "said": dict(said)}
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **fetched)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_snapshot(path: Path) -> tuple[Snapshot, dict[str, Any]]:
    """What ``save_snapshot`` wrote, in the host's memory.

    Raises:
      OSError: it can't be read.
      ValueError: it is something else, or of another version.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            arrays = {name: file[name] for name in file.files if name != "about"}
            layout = about["layout"] and _layout(about["layout"])
            said, version = about["said"], about["version"]
    except (ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} is no context that was saved: {error!s:.80}") from None
    if version != VERSION:
        raise ValueError(f"{path} is a saved context of version {version}, expected {VERSION}; read the context again")
    tiers: dict[str, Any] = {}
    if layout is not None:
        weakest = Weakest(value=jnp.asarray(arrays["weakest_value"]), index=jnp.asarray(arrays["weakest_index"]))
        tiers = {name: arrays[name] for name in ("quantised", "quantised_lengths")} | {"weakest": weakest}
    return Snapshot(**{name: arrays[name] for name in PLAIN}, **tiers, layout=layout), said


def _layout(said: dict[str, Any]) -> BlockLayout:
    formats: dict[str, Any] = {name: Format(**said[name]) for name in ("high", "low")}
    return BlockLayout(**{**said, **formats})
