"""The decode benchmarks run, on thin layers and a short cache, and record what they claim."""

from __future__ import annotations

import argparse
import json
import sys

import pytest
import torch

from benchmarks.decode import bench_decode, needle_decode, needle_held
from benchmarks.decode import bench_decode_model as bench
from benchmarks.model import bench_compile
from omnisparse_flex.cache.choose_keys import HeadChoice
from omnisparse_flex.cache.layer import SlimLayer
from omnisparse_flex.cache.store import SlimStore
from tests.helpers.tiny import cached


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
        expected = model(**token, **cached(cache)).last_hidden_state
        bench.FULL[:] = [tuple(torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in pair) for pair in past]
        model.set_attn_implementation(bench.NAME)
        for _ in range(2):
            found = model(**token, use_cache=False)[0] if whole else bench.by_layer(model, "cpu")(**token, use_cache=0)
            assert torch.allclose(found, expected, atol=1e-5)
    bench.FULL.clear()
    assert counters["stats"]["unique_graphs"] <= 1


def test_figures_are_of_the_full_shape_and_written_case_by_case(monkeypatch, tmp_path):
    from benchmarks.common import summary

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
    from benchmarks.common import summary

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
    spent = (held * (512 + needle_decode.POSITION_BYTES) + 3 * needle_decode.MIN_TAIL_STEP * 512) / (3 * 4096 * 512)
    assert 1 / spent == pytest.approx(variant.ratio, rel=0.01) and shares == [(0, 0, choice.picked.shape[2])]
    picked = choice.picked[0, 0]
    assert len(set(picked.tolist())) == len(picked)
    if name == "window_only":
        assert picked.tolist() == list(range(3999, 3999 - len(picked), -1))
    best = mass[0, 0].topk(len(picked)).values.sum()
    share = mass[0, 0, picked].sum() / best
    assert share > 0.8 if variant.keys == "mass" else share < 0.5


def test_a_layer_of_lazy_heads_only_fetches_nothing():
    variant = needle_decode.Variant("slim", 4.0)
    choice = needle_decode.budgeted(variant, 4096, 512, [])(torch.full((2, 3, 4000), 1e-6), 0)
    assert choice.lazy == (0, 1, 2) and choice.fetching == () and choice.picked.shape[1] == 0


def look_ups(count, tokens=1200):
    """Items of random tokens with one fact for each question, said twice."""
    generator = torch.Generator().manual_seed(0)
    context = torch.randint(10, 100, (count, tokens), generator=generator)
    answers = torch.randint(100, 180, (count, 2, 3), generator=generator)
    for fact, places in enumerate(((200, 900), (400, 700))):
        for place in places:
            context[:, place : place + 3] = answers[:, fact]
    first, second = (torch.randint(10, 100, (count, n), generator=generator) for n in (9, 3))
    return needle_decode.Items(context, first, second, answers)


def test_the_look_up_benchmark_writes_after_each_row(monkeypatch, tmp_path, capsys):
    from benchmarks.common import summary
    from tests.helpers.tiny import build

    recorded, seen = {}, []
    monkeypatch.setenv(needle_decode.DISABLE_VARIABLE, "1")  # measure sets it: so it is taken back
    monkeypatch.setattr(needle_decode, "RESULTS", tmp_path)
    monkeypatch.setattr(summary, "record", lambda name, value, **facts: recorded.update({name: facts["baseline"]}))

    def done(name, results):
        needle_decode.keep(name, results, tokens=8000)
        seen.append((name, sorted(json.loads((tmp_path / "needle_decode_8k.json").read_text())["variants"])))
        print(needle_decode.line(name, results))

    model = build("llama", head_dim=16).eval().requires_grad_(False)
    results = needle_decode.measure(model, look_ups(3), 2, 1e9, done)
    assert [name for name, _ in seen] == [v.name for v in needle_decode.VARIANTS]
    assert all(len(rows) == number + 1 for number, (_, rows) in enumerate(seen))
    assert set(recorded) == {f"{name}.8k" for name in needle_decode.FIGURES}
    assert recorded["needle.second_turn.dropped2_4x.8k"].endswith(
        "second question, another fact; 2.42x less device memory"
    )
    for name, row in results["variants"].items():
        variant = next(v for v in needle_decode.VARIANTS if v.name == name)
        assert ("held" in row) == (variant.ratio is not None)
        if variant.ratio and variant.ratio <= 4:
            assert row["ratio"] == pytest.approx(variant.ratio, rel=0.02) and 0 <= row["held"]["second_fact"] < 1
    assert "of the words held when the second question comes" in capsys.readouterr().out


def test_the_look_up_benchmark_stops_in_time(monkeypatch):
    """No row is begun that would not end within the limit, and none is left half done."""
    monkeypatch.setenv(needle_decode.DISABLE_VARIABLE, "1")
    monkeypatch.setattr(needle_decode, "run", lambda model, variant, items, span: (items.answers, {}))
    monkeypatch.setattr(needle_decode, "apply_omnisparse", lambda *args, **kwargs: None)
    rows = []
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(needle_decode.time, "perf_counter", lambda: next(clock))
    results = needle_decode.measure(None, look_ups(3), 2, 65, lambda name, results: rows.append(name))
    assert 1 < len(rows) < len(needle_decode.VARIANTS) and list(results["variants"]) == rows
    assert all(row["first"] == row["second"] == 1 for row in results["variants"].values())


def test_words_of_a_fact_are_found_and_counted():
    items = look_ups(2)
    first, second = (needle_held.words_in(items.context, items.answers[:, i]) for i in range(2))
    assert first.nonzero()[:, 1].tolist() == [200, 201, 202, 900, 901, 902] * 2
    assert second[0].nonzero()[:, 0].tolist() == [400, 401, 402, 700, 701, 702]
    picked = torch.stack([torch.arange(700), torch.arange(300, 1000)]).expand(2, -1, -1)
    store = SlimStore([SlimLayer(0)], lambda mass, layer: HeadChoice((1,), (0, 2), picked), False, 0, 0)
    visual = torch.zeros(2, 1209, dtype=torch.bool)
    visual[:, :1200] = True
    with torch.no_grad():
        store.begin(torch.zeros(2, 1209), None, visual)
        store.store_layer(torch.randn(2, 3, 1209, 4), torch.randn(2, 3, 1209, 4), torch.randn(2, 3, 1209, 4), 0, 0.5)
    shares = torch.stack([needle_held.held_share(store.layers, x) for x in (first, second)], 1)
    assert shares.shape == (2, 2, 1, 3)
    assert shares[0, :, 0].tolist() == [[0.5, 0.0, 0.5], [0.5, 0.0, 1.0]]
    found = needle_held.summary_of(shares, torch.tensor([True, False]))
    assert found["second_fact"] == 0.5 and found["second_fact_if"] == {"right": 0.5, "wrong": 0.5}
    assert found["heads_with_all_of_it"] == pytest.approx(1 / 3) and found["first_fact"] == pytest.approx(1 / 3)
