"""The held-out measurement of benchmarks/smollm2/calibration_smollm2.py, on a tiny model."""

import dataclasses

import pytest
import torch

from benchmarks.smollm2.calibration_smollm2 import held_out, measure, windows_of
from benchmarks.smollm2.calibration_transfer import LADDER, RESERVES, capture, carried, ladder, transfer
from omnisparse_flex.calibration.progress import Progress
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from tests.calibration.test_calibration import RULES, repetitive, sharpened
from tests.helpers.tiny import build


def test_windows_spread_over_the_text():
    found = windows_of(torch.arange(100, dtype=torch.int32), 10, 3)
    assert [int(x["input_ids"][0, 0]) for x in found] == [0, 45, 90]
    assert all(x["input_ids"].shape == (1, 10) and x["input_ids"].dtype == torch.int64 for x in found)
    assert len(windows_of(torch.arange(100), 10, 1)) == 1


def test_dense_layers_count_as_met_and_sparse_ones_by_head(device):
    model = sharpened(build("llama", device, num_hidden_layers=2))
    config = dataclasses.replace(RULES, target_recall=(1.0, 0.3))
    inputs = [{name: x.cpu() for name, x in repetitive(700, device).items()}]
    low, high = (held_out(model, config, inputs, target) for target in (0.01, 0.9999))
    assert (low["met_share"], low["met_share_sparse"], low["sparse_layers"]) == (1.0, 1.0, 1)
    assert (high["met_share"], high["met_share_sparse"]) == (0.5, 0.0)
    assert 0.5 < high["density"] < 1 and list(high["recalls"]) == ["1"] and len(high["recalls"]["1"]) == 4
    assert high["recall_mean"] == pytest.approx((4 + sum(high["recalls"]["1"])) / 8, abs=1e-4)
    assert compiled_decoder_of(model) is None


def test_each_text_is_measured_under_the_other_ones_rules(device, capsys, monkeypatch):
    monkeypatch.setattr("omnisparse_flex.calibration.search.MAX_DENSITY", 1.0)  # five blocks: most are kept
    model = sharpened(build("llama", device, num_hidden_layers=1))
    texts = {name: [repetitive(600, device, seed=i)] for i, name in enumerate(("a", "b"))}
    found = measure(model, RULES, texts, 0.2, Progress(), "eager")
    assert found.keys() == {"a > b", "b > a"}
    assert "a > b: " in capsys.readouterr().out
    for row in found.values():
        assert row["calibration"]["target_recall"] == 0.2 and 0 <= row["met_share"] <= 1
    assert compiled_decoder_of(model) is None


def test_recall_carried_over_is_interpolated():
    own = torch.tensor([[0.5, 0.9], [0.8, 0.9], [0.9, 0.95]]), torch.tensor([0.1, 0.2, 0.7])
    other = torch.tensor([[0.4, 0.6], [0.6, 0.8], [0.8, 1.0]]), torch.tensor([0.2, 0.4, 0.6])
    heads, density = carried(own, other, 0.65)  # half-way between the first two steps
    assert heads.tolist() == pytest.approx([0.5, 0.7]) and density == pytest.approx(0.3)
    assert carried(own, other, 0.5)[0].tolist() == pytest.approx([0.4, 0.6]), "the first step is enough"
    assert carried(own, other, 0.95) is None, "out of reach"
    assert carried(own, other, 0.89) is None, "0.65 of the blocks does not pay"
    both = transfer({"a": [own], "b": [other]}, 0.65, 0.0)
    # a > b: heads 0.5 and 0.7; b > a: 0.65 is met a quarter of the way from step 1 to 2, where a has 0.825 and 0.9125.
    assert both["met_share_sparse"] == 0.75 and both["sparse_pairs"] == 4
    assert both["recall_min"] == pytest.approx(0.5) and both["density"] == pytest.approx((0.3 + 0.325) / 2)


def test_a_ladder_climbs(device):
    model = sharpened(build("llama", device, num_hidden_layers=2))
    found = capture(model, repetitive(600, device)["input_ids"], [1])
    assert list(found) == [1] and found[1][0].shape == (1, 4, 600, 16)
    recalls, densities = ladder(*found[1], dataclasses.replace(RULES, scoring="mean_pool"))
    assert recalls.shape == (len(LADDER), 4) and (densities.diff() >= 0).all() and densities[0] < densities[-1]
    assert recalls[-1].min() > recalls[0].min() and RESERVES[0] == 0
