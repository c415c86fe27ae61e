"""The benchmark of untrained weights on a real clip, and its control."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from benchmarks.model import seeded_demo
from benchmarks.model import seeded_weights as seeded
from benchmarks.model.random_blocks import RANDOM, random_switch
from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.cli import video
from omnisparse_flex.masks.blocks.select import select_blocks

pytest.importorskip("transformers")


def test_the_random_control_spends_the_same_budgets() -> None:
    from omnisparse_flex.attention.functional import causal_program

    torch.manual_seed(0)
    query, key = 2 * torch.randn(1, 4, 1500, 16), 2 * torch.randn(1, 2, 1500, 16)
    rules = OmniSparseConfig(target_recall=0.6, budget="per_head")

    def select(target: float) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = select_blocks(query, key, causal_program(0, query.device), rules, target=target, scale=0.25)
        return chosen.keep, chosen.layout.forced

    keep, forced = select(0.6)
    with random_switch():
        control, _ = select(0.6 + RANDOM)
        assert torch.equal(control, select(0.6 + RANDOM)[0])
        assert torch.equal(select(0.6)[0], keep)  # switched off
    assert torch.equal(control.sum(-1), keep.sum(-1)) and not torch.equal(control, keep)
    assert (control | ~forced).all()
    assert torch.equal(select(0.6)[0], keep)


def test_seeded_weights_repeat() -> None:
    models = [torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3)) for _ in range(2)]
    for model in models:
        seeded.seed_weights(model, 7)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    assert models[0][0].bias.eq(0).all() and models[0][1].weight.eq(1).all()


def test_the_clip_has_four_thousand_tokens() -> None:
    small = video.resize_frames(torch.zeros(2, 720, 1280, 3, dtype=torch.uint8), seeded_demo.FULL.pixels)
    assert small.shape == (2, 504, 896, 3)
    assert small.shape[1] * small.shape[2] // 28**2 * seeded_demo.FULL.frames // 2 >= 4000


@pytest.mark.slow
def test_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not all(importlib.util.find_spec(module) for module in ("av", "skvideo", "matplotlib")):
        pytest.skip("needs the demo extra")
    seeded_demo.run_demo(tmp_path, quick=True)
    figures = json.loads((tmp_path / "omnisparse_stats.json").read_text())
    assert 0 < figures["density"] < 1 and figures["density_random"] == pytest.approx(figures["density"], abs=0.1)
    assert 0 <= figures["rel_error"] < figures["rel_error_random"]
    assert len(figures["stats"]["layers"]) == figures["report"]["rewritten"] == 1
    assert len(figures["generated_dense"]) == len(figures["generated_sparse"]) == 8
    assert (tmp_path / "omnisparse_masks.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    out = capsys.readouterr().out
    assert "compiling sparse graph 1" in out and "demo.rel_error_random" in out
