"""The fine-tuning experiment on a tiny model: its split, its resumable training, its rows and figures."""

import copy
import json
import math
import time

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.smollm2 import finetune_report as report
from benchmarks.smollm2 import finetune_smollm2 as bench
from benchmarks.smollm2.finetune_parts import FineTuning, batch_of, loss_of, split
from omnisparse_flex import apply_omnisparse, collect_stats
from omnisparse_flex.errors import ConfigError
from omnisparse_flex.model.compiled_module import compiled_decoder_of

NEVER = float("inf")


def tiny(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 96}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1)).eval()


def texts(length=6000):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(96, (length,), generator=generator, dtype=torch.int32) for name in ("one", "two")}


def test_training_and_held_out_text_are_disjoint():
    given = {"one": torch.arange(6000, dtype=torch.int32)}
    training, windows, repeated = split(given, 512, 8, {})
    assert len(windows) == 2 and all(len(window) == 512 for window in windows)
    assert max(training["one"]) < min(int(window.min()) for window in windows) and repeated == 0
    rows = torch.cat([batch_of(training, 512, step, 2) for step in range(20)])
    assert int(rows.max()) <= int(training["one"].max()) and (rows[:, 1:] - rows[:, :-1] == 1).all()
    assert torch.equal(batch_of(training, 512, 3, 2), batch_of(training, 512, 3, 2))
    assert split({"one": torch.arange(6000) % 50}, 512, 8, {})[2] == 1.0, "text that repeats itself says so"
    with pytest.raises(ConfigError, match="tokens must leave a training window of the text one"):
        split(given, 3100, 8, {})


def test_further_text_is_trained_on_and_counted_when_it_repeats_what_is_held_out():
    given, other = {"one": torch.arange(6000)}, {"training.one": torch.arange(5000, 7000)}
    training, windows, repeated = split(given, 512, 8, other)
    assert set(training) == {"one", "training.one"} and len(windows) == 2
    assert repeated == pytest.approx((6000 - 5000 - 31) / (2 * 512 - 31), abs=0.03)
    assert split(given, 512, 8, {})[2] == 0


def test_the_plan_refuses_an_estimator_that_there_is_not():
    assert bench.Plan().config("tile_pool", 4).scoring == "tile_pool"
    with pytest.raises(ConfigError, match="scoring"):
        bench.Plan().config("tiles", 4)


def test_losses_are_the_model_s_own():
    model, ids = tiny(), texts()["one"][None, :300].long()
    with torch.no_grad():
        assert float(loss_of(model, ids).mean()) == pytest.approx(float(model(ids, labels=ids).loss), rel=1e-5)


def test_interrupted_training_goes_on_exactly(tmp_path):
    training = {name: ids.long() for name, ids in texts().items()}
    whole = FineTuning(tiny(), steps=3, lr=1e-2, rows=2)
    assert whole.run(training, 256, NEVER) and whole.done == 3
    first = FineTuning(tiny(), steps=3, lr=1e-2, rows=2)
    assert not first.run(training, 256, time.monotonic() - 1) and first.done == 0
    clock = iter([0.0, 0.0, 2.0, 2.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: next(clock))
        assert not first.run(training, 256, 1.0)
    assert first.done == 2
    first.save(tmp_path / "part.pt")
    again = FineTuning(tiny(seed=5), steps=3, lr=1e-2, rows=2)
    again.load(tmp_path / "part.pt")
    assert again.run(training, 256, NEVER)
    for one, two in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert whole.history[-1]["loss"] == again.history[-1]["loss"]


def test_the_target_falls_while_training_and_goes_on_falling(tmp_path):
    plan = bench.Plan(tokens=256, steps=4, rows=1, windows=1, lr=1e-2, warmup=4)
    made = bench.Experiment(tiny(), texts(), plan, tmp_path / "rows.json", tmp_path, NEVER)
    assert made._warmup(0)() is None, "dense: nothing falls"
    apply_omnisparse(made.model, plan.config("mean_pool", 2), min_seq_len=0)
    recall = compiled_decoder_of(made.model).state.recall
    seen, step = [float(recall[1])], made._warmup(0)
    for _ in range(2):
        step()
        seen.append(float(recall[1]))
    assert seen == [0.5, 0.875, 0.75]
    bench.set_targets(made.model, 0.5, 1)
    again = made._warmup(2)
    assert float(recall[1]) == 0.75
    again(), again()
    assert float(recall[1]) == 0.5
    with pytest.raises(ConfigError, match="warmup must be at least 0 and at most steps, got 5"):
        bench.Plan(steps=4, warmup=5)


@pytest.mark.slow
def test_the_experiment_measures_every_row_once(tmp_path, eager_inner):
    plan = bench.Plan(tokens=1024, steps=1, rows=1, windows=1, densities=(0.9,), train_density=0.9, lr=1e-2)
    path, work = tmp_path / "rows.json", tmp_path / "work"

    def run(deadline):
        made = bench.Experiment(tiny(), texts(), plan, path, work, deadline)
        made.dense()
        if not made.late():
            made.sparse("mean_pool")
        return made.content

    run(time.monotonic() - 1)
    assert not path.exists(), "nothing begins after the deadline"
    rows = run(NEVER)["rows"]
    made = bench.Experiment(tiny(), texts(), bench.Plan(tokens=1024), tmp_path / "new.json", work, NEVER)
    apply_omnisparse(made.model, made.plan.config("mean_pool", 2), min_seq_len=0)
    with collect_stats(made.model) as stats:
        made.look("pretrained", made.pretrained, "mean_pool", 0.5, stats)
    assert made.content["rows"] == [], "half is less than the dense layer and what is always kept"
    kinds = [(row["weights"], row["inference"], row["wanted"]) for row in rows]
    sparse = [(name, "mean_pool", d) for name in ("pretrained", "tuned dense", "tuned sparse") for d in (0.9, None)]
    dense = [(name, "dense", None) for name in ("pretrained", "tuned dense", "tuned sparse")]
    assert sorted(kinds, key=str) == sorted(sparse + dense, key=str)
    assert all(0.5 < row["density"] <= 0.91 for row in rows if row["wanted"] == 0.9)
    by = {(row["weights"], row["inference"], row["wanted"]): sum(row["losses"]) for row in rows}
    assert by["tuned dense", "dense", None] != by["pretrained", "dense", None]
    assert by["pretrained", "mean_pool", 0.9] != by["pretrained", "dense", None], "the selection is on"
    assert run(NEVER)["rows"] == rows
    assert path.with_suffix(".md").read_text().count("\n") == len(rows) + 2
    with pytest.raises(ConfigError, match="out must hold rows of the same plan"):
        bench.Experiment(tiny(), texts(), bench.Plan(tokens=1024), path, work, NEVER)


def content(**change):
    rows = [
        {"weights": "pretrained", "inference": "dense", "density": 1.0, "losses": [2.0, 3.0]},
        {"weights": "pretrained", "inference": "mean_pool", "density": 0.19, "losses": [2.1, 3.1]},
        {"weights": "tuned dense", "inference": "dense", "density": 1.0, "losses": [1.0, 2.0]},
        {"weights": "tuned sparse", "inference": "mean_pool", "density": 0.18, "losses": [1.01, 2.01]},
        {"weights": "tuned sparse", "inference": "mean_pool", "density": 0.3, "losses": [1.0, 2.0]},
    ]
    rows = [{"wanted": None, "trained_with": None, **row} for row in rows]
    plan = {"tokens": report.TOKENS, "steps": 7}
    told = {"torch": "0", "device": "none", "held_out_windows": 2, "layers": report.LAYERS}
    return {"plan": plan, "rows": rows, **told, **change}


def test_figures_compare_with_equally_trained_dense_weights(tmp_path):
    names = report.keep_figures(content(), "mean_pool", __file__, tmp_path / "summary.json")
    found = {name: entry["value"] for name, entry in json.loads((tmp_path / "summary.json").read_text()).items()}
    assert set(found) == set(names) and len(names) == 3
    assert found["smollm2.finetuned.ppl_delta_pct.8k"] == pytest.approx(100 * math.expm1(0.01))
    assert found["smollm2.training_free.ppl_delta_pct.8k"] == pytest.approx(100 * math.expm1(0.1))
    assert found["smollm2.finetuned.density.8k"] == 0.18, "the densest row within the limit"


def test_no_figure_of_another_length_or_a_part_of_the_model(tmp_path):
    for other in ({"layers": 2}, {"plan": {"tokens": 1024, "steps": 7}}, {"rows": content()["rows"][:2]}):
        assert report.keep_figures(content(**copy.deepcopy(other)), "mean_pool", __file__, tmp_path / "s.json") == []
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ('{"steps": 0}', "steps must be at least 1, got 0"),
        ('{"densities": [1.5]}', "densities must be in (0, 1), got 1.5"),
        ('{"base": {"budget": "none"}}', "budget must be one of"),
        ('{"speed": 1}', "plan must hold only fields of the plan, got ['speed']"),
    ],
)
def test_bad_plans_are_refused_before_any_work(tmp_path, capsys, fields, message):
    assert bench.main(["--data", str(tmp_path), "--plan", fields, "--out", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err.startswith(f"finetune_smollm2.py: {message}")
