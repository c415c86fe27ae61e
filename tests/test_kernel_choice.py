"""Which kernel a site runs on, and that the FLASH backend computes the same attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omnisparse_flex import OmniSparseConfig, apply_omnisparse, kernel_choice, rewrite_report
from omnisparse_flex.backend import Backend
from omnisparse_flex.kernel_choice import FLASH, has_flash, kernel_options
from omnisparse_flex.masks.expr import causal
from omnisparse_flex.masks.program import MaskProgram
from omnisparse_flex.masks.select import select_blocks

needs_flash = pytest.mark.skipif(not has_flash(), reason="needs flash-attn-4")


#: A row for the tests.
TUNED = (("num_stages", 3),)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(kernel_choice.TRITON_OPTIONS, (9, 128), TUNED)


class Fake:
    """What the choice reads of a tensor."""

    def __init__(self, head_dim, device="cuda"):
        self.shape, self.device = (1, 8, 512, head_dim), torch.device(device)


def choose(kernel="auto", dim=128, dtype=torch.bfloat16, device="cuda", plain=True, value_dim=None):
    return kernel_options(kernel, Fake(dim, device), Fake(value_dim or dim, device), dtype, plain_scores=plain)


def test_flash_where_it_is_wanted_and_legal(hopper):
    assert choose("flash") == (FLASH, "")
    assert choose() == choose("triton") == (TUNED, "")
    assert choose(dim=64) == ((), ""), "no row for this head_dim"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "dtype torch.float32"),
        ({"dim": 80}, "head_dim 80"),
        ({"value_dim": 64}, "head_dim 128"),
        ({"plain": False}, "logits with a bias, soft cap or score_mod"),
    ],
)
def test_what_flash_does_not_take_runs_on_triton_by_name(hopper, changes, reason):
    options, why = choose("flash", **changes)
    assert FLASH[0] not in options and why == reason


def test_another_gpu_gets_no_options_that_were_not_measured_on_it(monkeypatch):
    monkeypatch.setitem(kernel_choice.TRITON_OPTIONS, (9, 128), TUNED)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose() == ((), "") and choose("flash") == ((), "compute capability 8.x")
    assert choose(device="cpu") == ((), "")


def attend(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def reference(query, key, value, config, target):
    """Dense float32 attention under the blocks that are selected."""
    with torch.no_grad():
        mask = MaskProgram(causal())
        chosen = select_blocks(query, key, mask, config, target=target, scale=query.shape[3] ** -0.5).keep
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    pairs = chosen.repeat_interleave(128, 2).repeat_interleave(128, 3)[:, :, :length, :length].tril()
    pairs = pairs.repeat_interleave(groups, 1)
    tensors = (query.float(), key.float().repeat_interleave(groups, 1), value.float().repeat_interleave(groups, 1))
    return F.scaled_dot_product_attention(*tensors, attn_mask=pairs)


@needs_flash
@pytest.mark.gpu
@pytest.mark.parametrize("length", [1000, 4096 + 300])
def test_flash_equals_the_masked_reference_forward_and_backward(device, length):
    """4396 tokens: with copies of the sinks; 1000: without; neither is a whole number of blocks."""
    config = OmniSparseConfig(target_recall=0.5, window_size=128)
    torch.manual_seed(0)
    heads = (8, 2, 2)
    tensors = [torch.randn(2, h, length, 128, device=device, dtype=torch.bfloat16, requires_grad=True) for h in heads]
    backend = Backend(config, min_seq_len=0, kernel="flash")
    out = torch.compile(attend, backend=backend)(*tensors)
    expected = reference(*tensors, config, 0.5)
    assert backend.log.report().rewritten and not any("FLASH" in note for note in backend.log.notes)
    assert (out.float() - expected).abs().max() < 0.03
    weight = torch.randn_like(out)
    for name, got, wanted in zip(
        "qkv",
        torch.autograd.grad(out, tensors, weight),
        torch.autograd.grad(expected, tensors, weight.float()),
        strict=True,
    ):
        assert (got - wanted).float().abs().max() <= 0.03 * wanted.float().abs().max(), name


@needs_flash
@pytest.mark.gpu
def test_flash_with_a_padded_batch_and_new_lengths(device):
    """A captured padding tensor, lengths that change, one graph for them."""
    from tiny import llama

    torch.manual_seed(0)
    model = llama(head_dim=64).to(device, torch.bfloat16).eval()
    runs = {}
    for kernel in ("dense", "flash"):
        if kernel == "flash":
            rule = OmniSparseConfig(target_recall=0.9999, budget=1 << 20, lazy_threshold=None)
            apply_omnisparse(model, rule, min_seq_len=0, kernel="flash", dynamic=True)
        for length in (700, 900, 1300):
            ids = torch.arange(2 * length, device=device).view(2, length) % 90
            real = torch.ones(2, length, dtype=torch.long, device=device)
            real[0, : length // 3] = 0
            with torch.no_grad():
                runs[kernel, length] = model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, -1].float()
    for length in (700, 900, 1300):
        dense = runs["dense", length]
        assert (runs["flash", length] - dense).abs().max() <= 0.05 * dense.abs().max()
    report = rewrite_report(model)
    assert report.graphs == 1 and report.rewritten
