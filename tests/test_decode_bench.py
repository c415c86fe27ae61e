"""benchmarks/bench_decode_model.py runs, on thin layers and a short cache."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_compile
import bench_decode_model as bench


@pytest.mark.slow
def test_a_quick_run_times_everything_it_claims(capsys):
    with torch.no_grad():
        results = bench.measure(2, (2048,), "cpu", "7b_thin")
    row = results["2048"]
    assert row["dense"].keys() == {"cpu", "dynamic"}
    for ratio in ("2.4", "4.0"):
        found = row[ratio]
        assert found["speedup_ms"] == min(x["ms"] for x in row["dense"].values()) / found["replayed"]["ms"]
        assert 0 < found["replayed"]["low_ms"] <= found["replayed"]["ms"] <= found["replayed"]["high_ms"]
    assert row["2.4"]["memory_ratio"] < row["4.0"]["memory_ratio"] < 4  # room for an answer counts too
    assert "4.0x: " in capsys.readouterr().out


def test_the_full_cache_is_attended_whole(monkeypatch):
    """The dense baseline writes the token into the last place, and sees all the others."""
    sizes = bench.Sizes(1, 64, 1.0, [0], "cpu")
    keys, values = (sizes.random(bench.KV_HEADS, 10) for _ in range(2))
    monkeypatch.setattr(bench, "FULL", [(keys.clone(), values.clone())])
    query, key, value = sizes.random(28, 1), sizes.random(bench.KV_HEADS, 1), sizes.random(bench.KV_HEADS, 1)
    out = torch.ops.omnisparse_bench.full_attend(query, key, value, 0)
    all_keys, all_values = (torch.cat([x[:, :, :-1], y], 2) for x, y in ((keys, key), (values, value)))
    logits = (query @ all_keys.repeat_interleave(7, 1).transpose(2, 3)) * bench.SCALE
    assert torch.allclose(out, logits.softmax(-1) @ all_values.repeat_interleave(7, 1), atol=1e-5)


def test_dense_and_ours_have_the_same_decoder():
    """The dense baseline's decoder gives, over equal keys, what transformers' own attention gives."""
    from transformers import AttentionInterface, DynamicCache

    AttentionInterface.register(bench.NAME, bench.full_attention)
    model = bench_compile.build(argparse.Namespace(hidden="7b_thin", layers=1, device="cpu"))
    sizes = bench.Sizes(1, 20, 1.0, [0], "cpu")
    past = [sizes.random(bench.KV_HEADS, 19) for _ in range(2)]
    token = bench.inputs_of(model, sizes)
    cache = DynamicCache()
    cache.update(*past, 0)
    with torch.no_grad():
        expected = model(**token, past_key_values=cache).last_hidden_state
        bench.FULL[:] = [tuple(torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in past)]
        model.set_attn_implementation(bench.NAME)
        found = model(**token, use_cache=False).last_hidden_state
    bench.FULL.clear()
    assert torch.allclose(found, expected, atol=1e-5)
