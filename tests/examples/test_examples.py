"""The scripts in examples/ run, and show what they say they show."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TESTED = ("apply_to_a_model", "own_mask", "plain_gpt", "slim_cache", "train_with_trainer", "zipar")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    """A script by its name; they import one another as neighbours do."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_every_example_is_tested() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == set(TESTED)


def test_a_model_is_rewritten_measured_and_taken_back(example) -> None:
    found = example("apply_to_a_model").run(inner="eager")
    assert len(found["report"].rewritten) == 2 and not found["report"].skipped
    assert 0 < found["stats"].density < 0.9, "the example must show a rule that leaves something out"
    assert all(0 < recall < 1 for layer in found["stats"].per_layer() for recall in layer.true_recall)
    assert found["difference"] > 0


def test_a_model_learns_with_trainer(example, tmp_path) -> None:
    losses = example("train_with_trainer").run(str(tmp_path), steps=12)
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5


def test_a_plain_model_runs_through_the_backend(example) -> None:
    dense, sparse, everything = example("plain_gpt").run(inner="eager")
    torch.testing.assert_close(everything, dense)
    assert (sparse - dense).abs().max() > 1e-3, "a rule that drops half of the mass must be seen"


def test_a_mask_is_tested_and_used(example) -> None:
    own_mask = example("own_mask")
    everything, little = own_mask.run()
    assert everything < 1e-5 < little
    wrong = own_mask.frame_causal(8)
    with pytest.raises(AssertionError):
        own_mask.assert_mask_mod_equals(wrong, own_mask.definition(64, 7))


def test_two_turns_share_a_smaller_cache(example) -> None:
    prompt = example("apply_to_a_model").video_inputs()["input_ids"].shape[1]
    cache, tokens = example("slim_cache").run(inner="eager")
    report = cache.memory_report()
    assert tokens.shape == (1, prompt + 6 + 12 + 6)
    assert report.length == tokens.shape[1] - 1, "the last token was never fed back"
    assert report.device < report.full and report.host > 0


def test_fewer_forwards_for_a_picture(example) -> None:
    zipar = example("zipar")
    found = zipar.run(steps=60)
    for measured in found.values():
        assert [forwards for forwards, _, _ in measured] == [8 + 7 * window for window in zipar.WINDOWS]
        assert all(pictures.max() <= zipar.LIGHT for _, _, pictures in measured)
        assert all(bits < 0.7 for _, bits, _ in measured), "an untrained model needs one bit a pixel and more"
