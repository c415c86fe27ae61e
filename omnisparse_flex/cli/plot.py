"""Pictures: the block masks of a few heads per layer, the true recall of every head, the density of every layer."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from omnisparse_flex.masks.statistics import FORCED, SELECTED
from omnisparse_flex.stats import Stats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Cell classes of a picture, and their colours and names.
DROPPED, CHOSEN, ALWAYS, FUTURE = range(4)
COLOURS = ("#e9edf2", "#1f6feb", "#f59f00", "#ffffff")
NAMES = ("not kept", "selected", "always kept (sinks, window, long text)", "above the causal diagonal")
#: Layers and heads that fit on one page.
MAX_LAYERS, MAX_HEADS = 6, 4


def mask_cells(blocks: Tensor) -> Tensor:
    """Classes of a head's block pairs.

    Args:
        blocks: uint8 (rows, columns), ``masks.statistics`` cell values of a self-attention prefill.

    Returns:
        uint8 (rows, columns) of ``DROPPED``, ``CHOSEN``, ``ALWAYS``, ``FUTURE``.
    """
    cells = torch.full_like(blocks, DROPPED)
    cells[blocks == SELECTED], cells[blocks == FORCED] = CHOSEN, ALWAYS
    rows, columns = blocks.shape
    future = torch.arange(columns) > torch.arange(rows).view(-1, 1)
    return cells.masked_fill(future, FUTURE)


def save_masks(stats: Stats, tokens: int, heads: int, path: Path, *, title: str, block: int = 128) -> None:
    """Draw the masks of up to ``MAX_HEADS`` query heads of up to ``MAX_LAYERS`` layers.

    Args:
        stats: From ``collect_stats(model, exact=True, maps=True)``.
        tokens: Length of the recorded prefill.
        heads: Query heads of a layer, whose blocks are chosen.
        path: Where the PNG goes.
        title: First line of the picture.
        block: Tokens per block.
    """
    from matplotlib.figure import Figure  # with its own Agg canvas: no global state, no display

    layers = _spread(stats.per_layer(), MAX_LAYERS)
    heads = min(heads, MAX_HEADS)
    if not layers:
        return
    # The width never falls under the legend's.
    width = max(2.6 * len(layers) + 1.1, 8.5)
    recalls = any(layer.true_recall for layer in layers)  # none were asked for: no empty space for them
    ratios = [2.9] * heads + ([0.35 * len(layers) + 0.9] if recalls else [])
    figure = Figure(figsize=(width, sum(ratios) + 1.5), dpi=130, layout="constrained")
    grid = figure.add_gridspec(len(ratios), len(layers), height_ratios=ratios)
    size = min((tokens + block - 1) // block, 256)
    for (column, layer), head in itertools.product(enumerate(layers), range(heads)):
        axes = figure.add_subplot(grid[head, column])
        maps = stats.block_maps(layer.layer)
        if maps is not None:
            _draw_mask(axes, mask_cells(maps[head, :size, :size]), size * block)
        top = f"layer {layer.layer} · density {layer.density:.2f}\n" if head == 0 else ""
        axes.set_title(f"{top}query head {head}", fontsize=9)
        if column == 0:
            axes.set_ylabel("query (tokens)", fontsize=8)
        if head == heads - 1:
            axes.set_xlabel("key (tokens)", fontsize=8)
    if recalls:
        _draw_recall(figure, figure.add_subplot(grid[heads, :]), stats)
    figure.suptitle(title, fontsize=12)
    _legend(figure)
    figure.savefig(path)


def recall_matrix(stats: Stats) -> Tensor:
    """True recall by layer and query head: float64 (layers, heads), NaN for layers that ran densely."""
    layers = {layer.layer: layer.true_recall for layer in stats.per_layer() if layer.true_recall}
    heads = max((len(x) for x in layers.values()), default=1)
    blank = (float("nan"),) * heads
    count = max(stats.layers, *(i + 1 for i in layers), 1)
    return torch.tensor([layers.get(i, blank) for i in range(count)], dtype=torch.float64)


def save_heatmap(stats: Stats, path: Path, *, title: str, safe: float = 0.8) -> None:
    """Draw true recall, layer x query head, beside the density of each layer.

    Args:
        stats: From ``collect_stats(model, exact=True)``.
        path: Where the picture goes; its suffix says the format.
        title: First line of the picture.
        safe: The colours' lower end: every head under it looks alike, and bad.
    """
    from matplotlib.figure import Figure

    values = recall_matrix(stats)
    layers, heads = values.shape
    density = {layer.layer: layer.density for layer in stats.per_layer()}
    figure = Figure(figsize=(max(0.32 * heads + 4.6, 7.5), 0.24 * layers + 1.9), dpi=130, layout="constrained")
    grid, bars = figure.subplots(1, 2, sharey=True, width_ratios=(max(heads, 6), 6))
    grid.set_facecolor("#dfe4ea")  # what shows where nothing is drawn: dense layers
    image = grid.imshow(values.numpy(), cmap="viridis", vmin=safe, vmax=1.0, aspect="auto")
    grid.set_title("true recall (mean of sampled rows); grey: dense", fontsize=9)
    grid.set_xlabel("query head", fontsize=8)
    grid.set_ylabel("layer", fontsize=8)
    grid.set_xticks(range(0, heads, max(1, heads // 16)))
    grid.set_yticks(range(layers))
    figure.colorbar(image, ax=grid, fraction=0.03, pad=0.01, extend="min").ax.tick_params(labelsize=7)
    bars.barh(range(layers), [density.get(i, 1.0) for i in range(layers)], height=0.8, color=COLOURS[CHOSEN])
    for index in range(layers):
        bars.text(0.02, index, f"{density.get(index, 1.0):.2f}", va="center", fontsize=6.5, color="black")
    bars.set_xlim(0.0, 1.0)
    bars.set_title(f"density (model: {stats.density:.2f})", fontsize=9)
    for axes in (grid, bars):
        axes.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def _spread(items: list[Any], highest: int) -> list[Any]:
    """At most ``most`` of them, evenly spaced, first and last included."""
    if len(items) <= highest:
        return items
    return [items[round(i * (len(items) - 1) / (highest - 1))] for i in range(highest)]


def _draw_mask(axes: Axes, cells: Tensor, tokens: int) -> None:
    from matplotlib.colors import ListedColormap

    extent = (0.0, float(tokens), float(tokens), 0.0)
    axes.imshow(
        cells.numpy(), cmap=ListedColormap(COLOURS), vmin=-0.5, vmax=3.5, extent=extent, interpolation="nearest"
    )
    ticks = [0, tokens // 2, tokens]
    axes.set_xticks(ticks, [_thousands(t) for t in ticks], fontsize=7)
    axes.set_yticks(ticks, [_thousands(t) for t in ticks], fontsize=7)
    for side in axes.spines.values():
        side.set_color("#9aa4b0")


def _thousands(tokens: int) -> str:
    return f"{tokens / 1000:.1f}K" if tokens >= 1000 else str(tokens)


def _draw_recall(figure: Any, axes: Axes, stats: Stats) -> None:
    """True recall by query head and layer, as a heat-map with its numbers."""
    layers = [layer for layer in stats.per_layer() if layer.true_recall]
    if not layers:
        axes.set_axis_off()
        return
    values = torch.tensor([layer.true_recall for layer in layers])
    image = axes.imshow(values.numpy(), cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_title("true recall: softmax mass that each query head really keeps (mean of sampled rows)", fontsize=9)
    axes.set_xlabel("query head", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(len(layers)), [str(layer.layer) for layer in layers])
    axes.tick_params(labelsize=7)
    if values.numel() <= 256:
        for row, column in itertools.product(range(values.shape[0]), range(values.shape[1])):
            value = float(values[row, column])
            colour = "white" if value < 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01).ax.tick_params(labelsize=7)


def _legend(figure: Any) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=c, edgecolor="#9aa4b0", label=n) for c, n in zip(COLOURS, NAMES, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=8.5, frameon=False)
