"""The peak rule's kernel: what the tensor code chooses, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.blocks import peak, peak_op
from omnisparse_flex.masks.blocks.layout import block_layout, own_positions
from omnisparse_flex.masks.blocks.mean_pool import block_mean
from omnisparse_flex.masks.blocks.peak_rows import Keys, live_rows
from omnisparse_flex.masks.blocks.select import grid_of
from omnisparse_flex.masks.expr.causal_padding import as_causal_padding
from omnisparse_flex.masks.expr.expr import KV, B, Const, Load, causal, conjunction
from omnisparse_flex.masks.expr.index_mask import IndexMask
from tests.helpers.interpreter import needs_scalars, run_interpreted

#: batch, query heads, KV heads, queries, keys, head_dim, padded keys, key block, floor.
CASES = (
    (1, 3, 1, 900, 900, 16, 0, 64, 0.3),
    (1, 2, 2, 400, 700, 20, 0, 128, 0.95),
    (2, 4, 2, 520, 520, 32, 150, 64, 0.6),
    (1, 1, 1, 1, 300, 16, 0, 128, 0.5),
)


def tokens(batch, heads, length, dim, block, generator):
    """Vectors that are alike in a block."""
    theme = torch.randn(batch, heads, -(-length // block), dim, generator=generator)
    noise = 0.4 * torch.randn(batch, heads, length, dim, generator=generator)
    return theme.repeat_interleave(block, 2)[:, :, :length] + noise


def both(kernel, case, device="cpu", dtype=torch.float32, last_rows=64):
    """``(chosen, recall, scored)`` of the kernel, then of tensor code."""
    batch, heads, kv_heads, q_len, kv_len, dim, pad, width, floor = case
    generator = torch.Generator().manual_seed(q_len + kv_len)
    query = tokens(batch, heads, q_len, dim, 128, generator).to(device, dtype)
    key = tokens(batch, kv_heads, kv_len, dim, 64, generator).to(device, dtype)
    offset, mask = kv_len - q_len, IndexMask(causal(Const(kv_len - q_len)))
    if pad:
        real = (torch.arange(kv_len) >= pad).expand(batch, -1).clone().to(device)
        real[-1] = torch.arange(kv_len, device=device) < kv_len - pad // 2
        mask = IndexMask(conjunction(mask.expr, Load(0, (B, KV))), (real,))
    config = OmniSparseConfig(budget="peak", key_block=width, window_size=32)
    grid = grid_of(query, key, config.split)
    layout = block_layout(mask, grid, config, q_offset=offset)
    live = live_rows(mask, grid, own_positions(grid, offset))
    base = peak.base_threshold(layout.some, 0.3, floor)
    maps, scale, means = peak.Maps(layout.full, layout.some, layout.forced), 3 * dim**-0.5, block_mean(key, width)
    site = peak.PeakSite(query, Keys(key, means, width), maps, live, base, floor, scale, offset // 128, None, mask)
    plain = as_causal_padding(mask, batch, kv_len, query.device)
    made = kernel(
        query, key, means, *maps, live.places.int(), live.count.int(), base, torch.tensor(floor, device=device),
        plain.real, plain.offset, scale, width, peak.extra_phases(last_rows), (peak.CANDIDATE, peak.LOWEST),
    )  # fmt: skip
    return made, peak.find_peaks(site, last_rows)


def check_interpreted():
    """In a process where Triton interprets."""
    from omnisparse_flex.kernels.find_peaks import find_peaks

    some, left_out = 0, 0
    for case in CASES:
        made, wanted = both(find_peaks, case)
        assert torch.equal(made[0], wanted.chosen), case
        assert torch.equal(made[2], wanted.scored), case
        torch.testing.assert_close(made[1], wanted.recall, atol=0.02, rtol=0)  # logarithms of half precision
        some, left_out = some + int(wanted.chosen.sum()), left_out + int((~wanted.chosen).sum())
    assert some > 20 and left_out > 20


@needs_scalars
def test_the_kernel_chooses_what_tensor_code_does():
    run_interpreted("tests.kernels.test_find_peaks", "check_interpreted()")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "case", [(1, 7, 1, 4096, 4096, 128, 0, 128, 0.6), (2, 6, 2, 3000, 3500, 64, 700, 64, 0.9), *CASES]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_kernel_chooses_what_tensor_code_does_on_a_gpu(case, dtype):
    from omnisparse_flex.kernels.find_peaks import find_peaks

    made, wanted = both(find_peaks, case, "cuda", dtype)
    # Products of half precision put a share near a threshold on its other side here and there.
    assert (made[0] != wanted.chosen).float().mean() < 2e-3
    assert (made[1] - wanted.recall).abs().mean() < 0.01


def test_the_operator_is_what_the_compiler_was_told():
    mask, query, key = IndexMask(causal()), torch.randn(1, 2, 300, 16), torch.randn(1, 1, 300, 16)
    grid = grid_of(query, key)
    layout = block_layout(mask, grid, OmniSparseConfig(budget="peak"))
    live = live_rows(mask, grid, own_positions(grid, 0))
    base = peak.base_threshold(layout.some, 0.3, 0.5)
    arguments = (
        query, key, layout.full, layout.some, layout.forced, live.places.int(), live.count.int(), base,
        torch.tensor(0.5), None, torch.zeros(1, dtype=torch.int64), 0.25, 128, 64,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.omnisparse.find_peaks.default, arguments)


def test_tensor_code_in_chunks_gives_the_same(monkeypatch):
    query, key = torch.randn(1, 4, 700, 16), torch.randn(1, 2, 700, 16)
    config = OmniSparseConfig(budget="peak", key_block=64, window_size=32)
    grid, mask = grid_of(query, key, 2), IndexMask(causal())
    layout, own = block_layout(mask, grid, config), own_positions(grid, 0)
    rule = {"own": own, "q_offset": 0, "min_peak": 0.3, "floor": 0.5, "scale": 1.0, "last_rows": 64, "score": None}
    whole = peak_op.peaks_of(query, key, mask, layout, grid, **rule)
    monkeypatch.setattr(peak_op, "PAIRS", 4 * 700 * 2)
    for one, other in zip(whole, peak_op.peaks_of(query, key, mask, layout, grid, **rule), strict=True):
        torch.testing.assert_close(one, other)
