"""The recall's warm-up: from dense to the config's targets in one graph."""

import pytest
import torch

from omnisparse_flex import ConfigError, OmniSparseConfig, apply_omnisparse
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from omnisparse_flex.warmup import RecallWarmup
from tests.helpers.tiny import batch, build

CONFIG = OmniSparseConfig(target_recall=0.3, lazy_threshold=None, sink_size=16, window_size=64)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_from_dense_to_the_target_without_another_graph():
    inputs = batch((900,), "cpu")
    model = build("llama", "cpu")
    dense = logits(model, inputs)
    apply_omnisparse(model, CONFIG, min_seq_len=0, inner="aot_eager")
    sparse = logits(model, inputs)
    assert not torch.allclose(sparse, dense, atol=1e-3)
    graphs, warmup, seen = compiled_decoder_of(model).backend.log.graphs, RecallWarmup(model, 4), []
    for _ in range(6):
        seen.append(logits(model, inputs))
        warmup.step()
    assert torch.allclose(seen[0], dense, atol=1e-5)
    assert torch.equal(seen[4], sparse) and torch.equal(seen[5], sparse)
    assert not torch.equal(seen[2], seen[0]) and not torch.equal(seen[2], sparse)
    assert compiled_decoder_of(model).backend.log.graphs == graphs


def test_the_line_is_straight_and_dense_layers_stay_dense():
    model = apply_omnisparse(build("llama", "cpu"), OmniSparseConfig(target_recall=(1.0, 0.6)))
    warmup, seen = RecallWarmup(model, 4), []
    for _ in range(6):
        seen.append(compiled_decoder_of(model).state.recall.tolist())
        warmup.step()
    expected = torch.tensor([[1.0, x] for x in (1.0, 0.9, 0.8, 0.7, 0.6, 0.6)])
    torch.testing.assert_close(torch.tensor(seen), expected)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_steps_are_counted(steps):
    model = apply_omnisparse(build("llama", "cpu"), CONFIG)
    with pytest.raises(ConfigError, match="steps must be an int of at least 1"):
        RecallWarmup(model, steps)


def test_the_model_must_be_ours():
    with pytest.raises(ConfigError, match="model must be one that apply_omnisparse returned, got Linear"):
        RecallWarmup(torch.nn.Linear(2, 2), 3)
