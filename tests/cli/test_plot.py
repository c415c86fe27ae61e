"""Pictures: the numbers behind them, and that they are drawn."""

from pathlib import Path

import pytest
import torch

from omnisparse_flex.cli.plot import recall_matrix, save_heatmap
from omnisparse_flex.masks.statistics import STATS
from omnisparse_flex.stats import Stats


def stats_of(layers: int, heads: int, sparse: dict[int, float]) -> Stats:
    """``layers`` layers, those of ``sparse`` at the given density, head h of layer i at recall 1 - (i + h) / 100."""
    raw, recalls = torch.zeros(layers, len(STATS)), torch.zeros(layers, 2, heads)
    for layer, density in sparse.items():
        raw[layer, STATS.index("allowed_blocks")] = 100.0
        raw[layer, STATS.index("kept_blocks")] = 100.0 * density
        recalls[layer] = 1 - (layer + torch.arange(heads)) / 100
    return Stats(layers, raw, None, recalls)


def test_recalls_by_layer_and_head() -> None:
    values = recall_matrix(stats_of(4, 3, {1: 0.5, 3: 0.25}))
    assert values.shape == (4, 3)
    assert values[[0, 2]].isnan().all(), "dense layers have no sampled recall"
    assert values[3].tolist() == pytest.approx([0.97, 0.96, 0.95])
    assert recall_matrix(stats_of(2, 3, {})).shape == (2, 1)


@pytest.mark.parametrize("case", [(4, 3, {1: 0.5, 3: 0.25}), (40, 28, {i: i / 40 for i in range(2, 40)}), (2, 1, {})])
def test_the_heatmap_is_drawn(case: tuple[int, int, dict[int, float]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save_heatmap(stats_of(*case), tmp_path / "heat.png", title="a model")
    assert (tmp_path / "heat.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
