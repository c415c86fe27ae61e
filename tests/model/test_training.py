"""Training with the selection on: same call, same selection, gradients of the masked dense reference."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from omnisparse_flex import OmniSparseConfig, apply_omnisparse, collect_stats
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from tests.helpers.tiny import batch, build

EVERYTHING = OmniSparseConfig(target_recall=0.999, budget=1 << 20, lazy_threshold=None)
SPARSE = OmniSparseConfig(target_recall=0.6, sink_size=16, window_size=64)


def loss_of(model, inputs):
    return model(**inputs, labels=inputs["input_ids"]).loss


def gradients(model, inputs, **kwargs):
    model.zero_grad()
    with torch.autocast(inputs["input_ids"].device.type, dtype=torch.bfloat16, **kwargs):
        loss_of(model, inputs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst(actual, expected):
    return max((actual[k] - expected[k]).abs().max() / expected[k].abs().max().clamp(min=1e-6) for k in expected)


@pytest.mark.parametrize("config", [EVERYTHING, SPARSE], ids=["everything", "sparse"])
def test_checkpointing_changes_no_gradient(config, device):
    inputs = batch((600, 430), device)
    model = apply_omnisparse(build("qwen2_5_vl", device).train(), config, min_seq_len=0)
    plain = gradients(model, inputs, enabled=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients(model, inputs, enabled=False)
    log = compiled_decoder_of(model).backend.log
    assert log.graphs == 2 and not any("eagerly" in note for note in log.notes)
    assert all(not site.reason for site in log.sites)
    assert worst(checkpointed, plain) < 1e-4


def test_everything_kept_trains_like_dense_under_autocast(device):
    inputs = batch((300, 211), device)
    model = build("llama", device).train()
    exact, dense = gradients(model, inputs, enabled=False), gradients(model, inputs, enabled=True)
    apply_omnisparse(model, EVERYTHING, min_seq_len=0)
    sparse = gradients(model, inputs, enabled=True)
    assert worst(sparse, exact) <= 2 * worst(dense, exact) + 1e-3


def test_accumulation_adds_up(device):
    model = apply_omnisparse(build("llama", device).train(), SPARSE, min_seq_len=0)
    first, second = batch((300,), device, seed=1), batch((300,), device, seed=2)
    one, two = gradients(model, first, enabled=False), gradients(model, second, enabled=False)
    model.zero_grad()
    for inputs in (first, second):
        loss_of(model, inputs).backward()
    total = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert worst(total, {name: one[name] + two[name] for name in one}) < 1e-4


def test_selection_is_the_same_in_training_and_inference(device):
    inputs = batch((700, 512), device)
    model = apply_omnisparse(build("llama", device), SPARSE, min_seq_len=0, inner="aot_eager")
    maps = []
    for train in (False, True):
        model.train(train)
        with collect_stats(model, maps=True) as stats, torch.set_grad_enabled(train):
            model(**inputs)
        maps.append(torch.stack([stats.block_maps(layer) for layer in (0, 1)]))
    assert torch.equal(*maps) and maps[0].any()


def test_a_step_trains(device):
    inputs = batch((300,), device)
    model = apply_omnisparse(build("llama", device).train(), SPARSE, min_seq_len=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = copy.deepcopy(model.state_dict())
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_of(model, inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert any(not torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert compiled_decoder_of(model).backend.log.graphs == 1


def test_symbolic_sizes_are_traced_once(device):
    """Dynamo would start over for a symbolic epsilon, once the joint graph is made."""
    from functorch.compile import make_boxed_func
    from torch._inductor.compile_fx import compile_fx

    calls = []

    def inner(graph_module, inputs):
        calls.append(graph_module)
        return compile_fx(graph_module, inputs, inner_compile=lambda graph, *_, **__: make_boxed_func(graph.forward))

    model = build("llama", device, num_hidden_layers=1).train()
    model = apply_omnisparse(model, SPARSE, min_seq_len=1 << 20, inner=inner, dynamic=True)  # dense is enough
    for length in (30, 43):
        loss_of(model, batch((length,), device)).backward()
    assert len(calls) == 1 == compiled_decoder_of(model).backend.log.graphs


def test_recall_schedule_needs_no_recompile(device):
    inputs = batch((700,), device)
    # Exact rows would count beside the kept pairs.
    config = dataclasses.replace(SPARSE, budget="per_head", last_rows=0)
    model = apply_omnisparse(build("llama", device), config, min_seq_len=0, inner="eager")
    entry = compiled_decoder_of(model)
    densities = []
    for recall in (1.0, 0.9, 0.3):
        entry.state.recall.fill_(recall)
        with torch.no_grad(), collect_stats(model) as stats:
            model(**inputs)
        densities.append(stats.density)
    assert densities[0] == pytest.approx(1.0, abs=1e-3) and densities[0] >= densities[1] >= densities[2]
    assert entry.backend.log.graphs == 1
