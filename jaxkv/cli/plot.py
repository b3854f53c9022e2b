"""The picture of what compression does: how many blocks each head of each layer kept."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from jaxkv.cache.stats import CacheStats
from jaxkv.report import blocks, tier_mix


def check_drawable(path: Path) -> None:
    """Raises ValueError where ``head_map`` could not draw into that file, before there is anything to draw."""
    if find_spec("matplotlib") is None:
        raise ValueError("a plot needs matplotlib: pip install 'jaxkv[plot]'")
    from matplotlib.backend_bases import FigureCanvasBase

    if not path.parent.is_dir():
        raise ValueError(f"can't write {path}: {path.parent} is not a directory")
    if path.is_dir():
        raise ValueError(f"can't write {path}: it is a directory")
    if path.suffix[1:].lower() not in (kinds := FigureCanvasBase.get_supported_filetypes()):
        raise ValueError(f"can't draw into {path}: its name must end in one of {', '.join(sorted(kinds))}")


def head_map(cache: CacheStats, path: Path) -> None:
    """Draws blocks kept, layers across and KV heads down, into an image file; needs the extra ``jaxkv[plot]``."""
    from matplotlib.figure import Figure

    kept = cache.blocks_per_head.T
    heads, layers = kept.shape
    figure = Figure(figsize=(max(4.0, 2.4 + 0.2 * layers), max(2.0, 1.3 + 0.32 * heads)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(kept, aspect="auto", cmap="viridis", vmin=0)
    axes.set(xlabel="layer", ylabel="KV head", xticks=range(0, layers, max(1, layers // 10)), yticks=range(heads))
    mix = tier_mix(cache)
    title = f"{blocks(cache)} ({cache.bytes_full / cache.bytes_held:.1f}x)"
    axes.set_title(f"{title}\n{mix.replace('; ', chr(10))}" if mix else title, fontsize=8 if mix else 10)
    figure.colorbar(image, label="blocks" if mix else f"blocks of {cache.block_size}")
    figure.savefig(path, dpi=150)
