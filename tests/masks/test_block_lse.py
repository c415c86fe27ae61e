"""The operator behind exact rows: tensor code on the CPU, one kernel on a GPU, and the same numbers."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnisparse_flex.kernels.fallback import load
from omnisparse_flex.masks.blocks import block_lse as module
from omnisparse_flex.masks.blocks.block_lse import block_lse
from tests.helpers.interpreter import needs_scalars, run_interpreted

BLOCK = 32


def inputs(batch=1, kv_heads=2, group=2, count=6, keys=100, dim=16, *, dtype=torch.float32, device="cpu", padded=False):
    """Rows that see all, some and no keys; keys that are laid out as a projection leaves them."""
    generator = torch.Generator().manual_seed(count * keys + dim)
    rows = torch.randn(batch, kv_heads * group, count, dim, generator=generator)
    key = torch.randn(batch, keys, kv_heads, dim, generator=generator)
    last = torch.linspace(-1, keys - 1, count).long()
    real = torch.rand(batch, keys, generator=generator) < 0.7 if padded else None
    if real is not None:
        real[0, : keys // 2] = False
    given = (3 * rows.to(device, dtype), key.to(device, dtype).transpose(1, 2), last.to(device))
    return *given, None if real is None else real.to(device), dim**-0.5


def expected(rows, key, last, real, scale, block):
    """By definition, in float64."""
    wide = key.double().repeat_interleave(rows.shape[1] // key.shape[1], 1)
    logits = rows.double() @ wide.transpose(-1, -2) * scale
    seen = torch.arange(key.shape[2], device=key.device) <= last[:, None]
    seen = seen if real is None else seen & real[:, None, None]
    logits = logits.masked_fill(~seen, -torch.inf)
    return torch.stack([torch.logsumexp(part, -1) for part in logits.split(block, -1)], -1)


def check(made, wanted, tolerance):
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), wanted, atol=tolerance, rtol=0)


def check_interpreted():
    """In a process where Triton interprets."""
    from omnisparse_flex.kernels.block_lse import block_lse_in_one

    for options in ({}, {"padded": True, "batch": 2}, {"dim": 20, "group": 3, "keys": 300, "count": 7}):
        given = inputs(**options)
        check(block_lse_in_one(*given, BLOCK), expected(*given, BLOCK), 1e-5)
    rows, key, last, real, scale = inputs()
    key[0, 0, 40, 3] = torch.nan
    made = block_lse_in_one(rows, key, last, real, scale, BLOCK)
    assert torch.equal(made.isnan(), block_lse(rows, key, last, real, scale, BLOCK).isnan()) and made.isnan().any()


@given(
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 100), st.booleans()
)  # fmt: skip
def test_the_operator_is_the_log_sum_exp_of_each_block(batch, kv_heads, group, count, keys, padded):
    given = inputs(batch, kv_heads, group, count, keys, padded=padded)
    made = block_lse(*given, BLOCK)
    check(made, expected(*given, BLOCK), 1e-5)


def test_the_operator_is_what_the_compiler_was_told():
    for padded in (False, True):
        torch.library.opcheck(torch.ops.omnisparse.block_lse.default, (*inputs(padded=padded), BLOCK))


def test_without_a_kernel_tensor_code_makes_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert load.__wrapped__(*module.KERNEL) is None


SHAPES = [
    {},
    {"padded": True, "batch": 2},
    {"dim": 64, "kv_heads": 3, "group": 1, "count": 128, "keys": 1000},
    {"dim": 80, "group": 7, "count": 64, "keys": 4133},
    {"dim": 128, "kv_heads": 4, "group": 7, "count": 128, "keys": 32794},
    {"dim": 256, "count": 64, "keys": 2000, "padded": True},
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_the_kernel_on_the_gpu(options, dtype):
    given = inputs(**options, dtype=dtype, device="cuda")
    made = load(*module.KERNEL)(*given, 128)
    assert made is not None
    check(made, expected(*given, 128), 1e-4)
    assert torch.equal(made, block_lse(*given, 128))


@pytest.mark.gpu
def test_products_are_never_in_memory_on_the_gpu():
    given = inputs(kv_heads=4, group=7, count=128, keys=65536, dim=128, dtype=torch.bfloat16, device="cuda")
    block_lse(*given, 128)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = block_lse(*given, 128)
    assert torch.cuda.max_memory_allocated() - before <= made.numel() * 4 + 2**20


@needs_scalars
def test_in_the_interpreter():
    run_interpreted("tests.masks.test_block_lse", "check_interpreted()")
