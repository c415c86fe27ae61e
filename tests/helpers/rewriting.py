"""For tests of whole sites: run a call through the backend and compare with the call itself."""

import torch

from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.backend import Backend


def keep_all(**others):
    """Rules that keep everything, on the sparse path: 1.0 would mean a dense layer."""
    return OmniSparseConfig(target_recall=0.9999999, lazy_threshold=None, **others)


def qkv(length=140, *, batch=2, heads=4, kv_heads=4, kv_len=None, dim=16, dtype=torch.float32, seed=0):
    """Normal queries, keys and values."""
    g = torch.Generator().manual_seed(seed)
    kv_len = length if kv_len is None else kv_len
    shapes = (batch, heads, length, dim), (batch, kv_heads, kv_len, dim), (batch, kv_heads, kv_len, dim)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def rewritten(call, *calls, config=None, inner="eager", dynamic=None, rows=None):
    """Compile ``call`` once and compare it with itself in float64 for each tuple of inputs.

    Args:
        call: What computes attention.
        *calls: Inputs of each call; each side gets its own copies.
        config: Rules; None: everything is kept.
        inner: The inner compiler.
        dynamic: As in ``torch.compile``.
        rows: bool, broadcastable to (B, H, L): rows that have an answer; None: all.

    Returns:
        For every site why it is dense, "" where it was rewritten.
    """
    backend = Backend(config or keep_all(), inner=inner, min_seq_len=0)
    compiled = torch.compile(call, backend=backend, dynamic=dynamic)
    for inputs in calls:
        exact = call(*_copies(inputs, torch.float64))
        near, got = call(*_copies(inputs)), compiled(*_copies(inputs))
        assert got.shape == exact.shape
        if rows is not None:
            exact, near, got = (torch.where(rows.unsqueeze(-1), x, 0) for x in (exact, near, got))
        bound = 8 * ((near - exact).abs().max() + 16 * torch.finfo(got.dtype).eps * exact.abs().max())
        assert (got.double() - exact).abs().max() <= bound, [x.reason for x in backend.log.sites]
    return [site.reason for site in backend.log.sites]


def _copies(inputs, dtype=None):
    return [
        x.clone().to(dtype or x.dtype)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x.clone()
        if isinstance(x, torch.Tensor)
        else x
        for x in inputs
    ]
