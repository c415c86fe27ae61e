"""On a CUDA device, through Inductor: the real kernels, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omnisparse_flex import OmniSparseConfig, apply_omnisparse, collect_stats, rewrite_report
from omnisparse_flex.masks.blocks.select import BLOCK
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from omnisparse_flex.testing.oracle import dense_attention, expand_block_map
from tests.helpers.tiny import batch, build

pytestmark = pytest.mark.gpu

EVERYTHING = OmniSparseConfig(target_recall=0.999, budget=1 << 20, lazy_threshold=None)
SPARSE = OmniSparseConfig(target_recall=0.6, sink_size=16, window_size=64)


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llama"])
def test_full_budget_equals_dense_through_inductor(name):
    inputs = batch((300, 257, 130), "cuda")
    real = inputs["attention_mask"].bool()
    model = build(name, "cuda")
    with torch.no_grad():
        expected = model(**inputs).logits[real]
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    dense = gradients(model, inputs)
    apply_omnisparse(model, EVERYTHING, min_seq_len=0)
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits[real], expected, atol=2e-5)
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), tokens)
    for key, grad in gradients(model, inputs).items():
        assert (grad - dense[key]).abs().max() <= 1e-4 * dense[key].abs().max() + 1e-7, key
    report = rewrite_report(model)
    assert len(report.rewritten) == 2 and not report.skipped
    assert compiled_decoder_of(model).backend.log.inners == {"inductor"} and not any(
        "eagerly" in n for n in report.notes
    )


def test_checkpointed_training_through_inductor():
    inputs = batch((600, 430), "cuda")
    model = apply_omnisparse(build("qwen2_5_vl", "cuda").train(), SPARSE, min_seq_len=0)
    plain = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for key, grad in gradients(model, inputs).items():
        assert (grad - plain[key]).abs().max() <= 1e-3 * plain[key].abs().max() + 1e-7, key
    assert compiled_decoder_of(model).backend.log.graphs == 2


class Plain(torch.nn.Module):
    """Attention alone; the parameter only says where the module lives."""

    def __init__(self):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1, device="cuda"))

    def forward(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(2, 2), (7, 1), (4, 2)])
def test_sparse_equals_the_dense_reference_under_its_own_mask(dtype, heads):
    """Triton forward and backward against fp64, at the very selection that ran."""
    torch.manual_seed(0)
    query_heads, kv_heads = heads
    length, dim = 1000, 64
    q, k, v = (torch.randn(1, h, length, dim, device="cuda", dtype=dtype) for h in (query_heads, kv_heads, kv_heads))
    k[:, :, 384:512] *= 8  # one block stands out, so that the selection has something to drop
    inputs = [x.requires_grad_() for x in (q, k, v)]
    module = apply_omnisparse(Plain(), SPARSE, min_seq_len=0)
    with collect_stats(module, maps=True) as stats:
        out = module(*inputs)
    blocks = (length + BLOCK - 1) // BLOCK
    keep = stats.block_maps(0)[:query_heads, :blocks, :blocks].cuda() > 0
    causal = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()
    allowed = expand_block_map(keep, length, length, BLOCK) & causal
    assert allowed.sum() < 0.95 * causal.sum() * query_heads

    grad = torch.randn_like(out)
    expected = dense_attention(*inputs, mask=allowed[None])
    actual_grads = torch.autograd.grad(out, inputs, grad)
    expected_grads = torch.autograd.grad(expected, inputs, grad.double())
    # fp32 runs through TF32-free Triton dots; bf16 rounds probabilities and outputs to 8 bits.
    limit = {torch.float32: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for actual, reference in zip((out, *actual_grads), (expected, *expected_grads), strict=True):
        assert (actual.double() - reference.double()).norm() <= limit * reference.double().norm()


def test_one_flex_kernel_per_layer():
    from torch._inductor.utils import run_and_get_code

    model = build("llama", "cuda")
    inputs = batch((300,), "cuda")
    apply_omnisparse(model, SPARSE, min_seq_len=0)
    with torch.no_grad():
        _, codes = run_and_get_code(lambda: model(**inputs))
    calls = [line for line in "\n".join(codes).splitlines() if "flex_attention" in line and ".run(" in line]
    assert len(calls) == 2, calls


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_selection_needs_no_host_sync():
    model = build("llama", "cuda")
    inputs = {"input_ids": batch((700,), "cuda")["input_ids"], "use_cache": False}
    apply_omnisparse(model, SPARSE, min_seq_len=0)
    with torch.no_grad():
        model(**inputs)
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            logits = model(**inputs).logits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(logits).all()


def test_stats_on_the_device():
    model = build("qwen2_5_vl", "cuda")
    apply_omnisparse(model, SPARSE, min_seq_len=0)
    with torch.no_grad(), collect_stats(model, exact=True, maps=True) as stats:
        model(**batch((900, 700), "cuda"))
    assert len(stats.per_layer()) == 2 and 0 < stats.density < 1.01
    assert all(0 < r <= 1.001 for layer in stats.per_layer() for r in layer.true_recall)


def test_dense_baseline_is_the_fast_one():
    """Without padding the dense marker runs SDPA without a mask, so that the fused kernels apply."""
    q = torch.randn(1, 4, 256, 64, device="cuda", dtype=torch.bfloat16)
    out = torch.ops.omnisparse.attn(q, q, q, None, None, True, 0.125, 0, 0.0)
    assert torch.equal(out, F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.125, enable_gqa=True))
