"""The decode benchmarks run, on thin layers and a short cache, and record what they claim."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_compile
import bench_decode
import bench_decode_model as bench
import needle_decode


@pytest.mark.slow
def test_a_quick_run_times_everything_it_claims(capsys):
    with torch.no_grad():
        cases, seen = {2048: (4.0, 2.4), 1024: (4.0,)}, []
        results = bench.measure(2, cases, "cpu", "7b_thin", done=lambda found, *case: seen.append(case))
    assert seen == [(2048, 4.0), (2048, 2.4), (1024, 4.0)] and results["graphs"] == 1, "a length compiled anew"
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
    monkeypatch.setattr(bench, "TURN", [0])
    query, key, value = sizes.random(28, 1), sizes.random(bench.KV_HEADS, 1), sizes.random(bench.KV_HEADS, 1)
    out = torch.ops.omnisparse_bench.full_attend(query, key, value)
    all_keys, all_values = (torch.cat([x[:, :, :-1], y], 2) for x, y in ((keys, key), (values, value)))
    logits = (query @ all_keys.repeat_interleave(7, 1).transpose(2, 3)) * bench.SCALE
    assert torch.allclose(out, logits.softmax(-1) @ all_values.repeat_interleave(7, 1), atol=1e-5)


@pytest.mark.parametrize("whole", [True, False])
def test_dense_and_ours_have_the_same_decoder(whole):
    """The dense baseline's decoder gives, over equal keys, what transformers' own attention gives; one layer's code."""
    from torch._dynamo.utils import counters
    from transformers import AttentionInterface, DynamicCache

    AttentionInterface.register(bench.NAME, bench.full_attention)
    model = bench_compile.build(argparse.Namespace(hidden="small", layers=3, device="cpu"))
    sizes = bench.Sizes(3, 20, 1.0, [0], "cpu")
    past = [[torch.randn(1, 2, 19, 16) for _ in range(2)] for _ in range(3)]
    token = bench.inputs_of(model, sizes)
    cache = DynamicCache()
    for layer, (key, value) in enumerate(past):
        cache.update(key, value, layer)
    counters.clear()
    bench.TURN[0] = 0
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "SCALE", 16**-0.5)
        expected = model(**token, past_key_values=cache).last_hidden_state
        bench.FULL[:] = [tuple(torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in pair) for pair in past]
        model.set_attn_implementation(bench.NAME)
        for _ in range(2):
            found = model(**token, use_cache=False)[0] if whole else bench.by_layer(model, "cpu")(**token, use_cache=0)
            assert torch.allclose(found, expected, atol=1e-5)
    bench.FULL.clear()
    assert counters["stats"]["unique_graphs"] <= 1


def test_figures_are_of_the_full_shape_and_written_case_by_case(monkeypatch, tmp_path):
    import summary

    written, recorded = [], {}
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(summary, "write_json", lambda content, path: written.append((path.name, content)))
    monkeypatch.setattr(summary, "record", lambda name, value, **facts: recorded.update({name: (value, facts)}))
    results = {"dense_compiled": "by layer", "131072": {"4.0": {"speedup_ms": 1.5}, "2.4": {"speedup_ms": 1.2}}}
    bench.keep(results, 131072, 2.4)
    assert recorded == {} and written[0][0] == "decode_model.json"
    bench.keep(results, 131072, 4.0)
    assert recorded["decode.model_step_speedup.128k"][0] == 1.5 and len(written) == 2
    assert next(iter(bench.CASES)) == 131072 and {8192, 4096} < set(bench.CASES)
    monkeypatch.setattr(sys, "argv", ["bench", "--layers", "2", "--device", "cpu"])
    called = []
    monkeypatch.setattr(bench, "measure", lambda *args, **keywords: called.append((args, keywords)))
    assert bench.main() == 0 and called[0][1] == {"whole": False}, "fewer layers record nothing"


@pytest.mark.parametrize("ratio", [2.4, 4.0])
def test_the_cache_of_the_benchmark_has_the_memory_it_claims(ratio):
    """Filled layer by layer; a turn fetches everything and slims it again to the same size."""
    sizes = bench_decode.Sizes(2, 8192, ratio, [1, 2], "cpu")
    with torch.no_grad():
        store, _ = bench_decode.fill(sizes, offload=True)
        first = bench_decode.SlimReport(store)
        found = bench_decode.turn(store, sizes)
    second = bench_decode.SlimReport(store)
    assert ratio <= first.full / first.device <= 1.05 * ratio, "room for the first new tokens comes with them"
    assert [len(layer.lazy) for layer in store.layers] == [1, 2] and found["fetch_ms"] < found["total_ms"]
    assert second.host >= first.host > 0 and second.full / second.device == pytest.approx(ratio, rel=0.06)


def test_figures_of_the_decode_benchmark(monkeypatch, tmp_path):
    import summary

    recorded = {}
    monkeypatch.setattr(bench_decode, "RESULTS", tmp_path)
    monkeypatch.setattr(summary, "record", lambda name, value, **facts: recorded.update({name: value}))
    row = {"memory_ratio": 3.97, "device_speedup": 2.5, "eager_speedup": 1.0, "turn": {"total_ms": 400.0}}
    bench_decode.keep({"131072": {"4.0": row}})
    assert recorded == {
        "decode.memory_ratio.128k": 3.97, "decode.step_speedup.128k": 2.5,
        "decode.step_speedup_eager.128k": 1.0, "decode.offload_turn_ms.128k": 400.0,
    }  # fmt: skip
    assert (tmp_path / "decode.json").exists()


@pytest.mark.parametrize("name", ["slim2_4x", "slim4x", "window_only", "random"])
def test_the_look_up_variants_spend_the_same_memory(name):
    """A control holds as many keys as what it is a control for; only which ones differs."""
    variant = next(v for v in needle_decode.VARIANTS if v.name == name)
    torch.manual_seed(0)
    mass, shares = torch.softmax(4 * torch.randn(1, 3, 4000), -1) * 0.9, []
    choice = needle_decode.budgeted(variant, 4096, 512, shares)(mass, 0)
    held = 3 * 96 + len(choice.fetching) * choice.picked.shape[2]
    spent = (held * (512 + needle_decode.POSITION_BYTES) + 3 * needle_decode.TAIL_STEP * 512) / (3 * 4096 * 512)
    assert 1 / spent == pytest.approx(variant.ratio, rel=0.01) and shares == [(0, 0, choice.picked.shape[2])]
    picked = choice.picked[0, 0]
    assert len(set(picked.tolist())) == len(picked)
    if name == "window_only":
        assert picked.tolist() == list(range(3999, 3999 - len(picked), -1))
    best = mass[0, 0].topk(len(picked)).values.sum()
    share = mass[0, 0, picked].sum() / best
    assert share > 0.8 if variant.keys == "mass" else share < 0.5
