"""FSDP2, layer by layer and at the root: the sharded model trains as the whole one does."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist

from omnisparse_flex import apply_omnisparse, rewrite_report
from tests.helpers.tiny import batch, build
from tests.model.test_training import SPARSE, loss_of, worst

fsdp = pytest.importorskip("torch.distributed.fsdp")


@pytest.fixture
def mesh():
    """One process: sharding, its hooks and what Dynamo makes of them are those of many."""
    if not dist.is_gloo_available():
        pytest.skip("needs gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def gradients(model, inputs):
    model.train().zero_grad()
    loss_of(model, inputs).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}


def hooks_are_checkpointed():
    """Whether transformers checkpoints a layer's call, FSDP2's hooks included (5.17), and not its forward (5.23)."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__call__" in vars(GradientCheckpointingLayer)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("shard_first", [False, True], ids=["apply-shard", "shard-apply"])
def test_each_layer_sharded(shard_first, checkpointing, mesh):
    inputs = batch((260,))
    whole = apply_omnisparse(build("llama"), SPARSE, min_seq_len=0, inner="aot_eager")
    expected = gradients(whole, inputs)

    model = build("llama")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if not shard_first:
        apply_omnisparse(model, SPARSE, min_seq_len=0, inner="aot_eager")
    for layer in model.model.layers:
        fsdp.fully_shard(layer, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    if shard_first:
        apply_omnisparse(model, SPARSE, min_seq_len=0, inner="aot_eager")
    if checkpointing and hooks_are_checkpointed():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            gradients(model, inputs)
        assert any("layers 0, 1 are dense" in str(x.message) for x in said)
        return
    assert worst(gradients(model, inputs), expected) < 1e-5
    report = rewrite_report(model)
    assert {site.layer for site in report.rewritten} == {0, 1} and not report.skipped
    assert not any("outside" in note or "eagerly" in note for note in report.notes)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs).logits, whole.eval()(**inputs).logits)
