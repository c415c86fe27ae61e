"""What a looped reduction stores and reads back: a barrier lies between, and a compiled norm is the same every time."""

from __future__ import annotations

import types

import pytest
import torch

from omnisparse_flex.compilation import inductor, missing_barrier


def test_a_load_of_what_an_earlier_loop_stored_waits(monkeypatch):
    from torch._inductor.codegen import common, triton
    from torch._inductor.utils import IndentedBuffer

    class Kernel(triton.TritonKernel):
        def __init__(self, stored):
            self.body, self.cse = IndentedBuffer(), types.SimpleNamespace(invalidated_stores=stored)

    monkeypatch.setattr(common.CSEProxy, "load", lambda self, name, index: f"{name}[{index}]")
    assert missing_barrier.patch_inductor.__wrapped__()
    proxy = object.__new__(common.CSEProxy)
    proxy.kernel = Kernel({"buf0"})
    assert proxy.load("buf1", 3) == "buf1[3]" and proxy.kernel.body.getvalue() == ""
    assert proxy.load("buf0", 4) == "buf0[4]" and proxy.kernel.body.getvalue().strip() == missing_barrier.BARRIER


def test_a_torch_with_a_barrier_of_its_own_is_left_alone(monkeypatch):
    from torch._inductor.codegen import common, triton

    def load(self, name, index):
        return name in self.cse.invalidated_stores

    plain = common.CSEProxy.load
    monkeypatch.setattr(triton.TritonKernel, "load", load)
    assert not missing_barrier.patch_inductor.__wrapped__() and common.CSEProxy.load is plain


def norm(residual, first, second, third, fourth, weight):
    """The sum of a float32 stream and bfloat16 layers, and its norm."""
    total = residual + first.float() + second.float() + third.float() + fourth.float()
    return total, (total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * weight).bfloat16()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [256, 1536, 3584])
def test_a_compiled_norm_is_deterministic_and_right(width, device):
    generator = torch.Generator(device).manual_seed(0)
    streams = [torch.randn(65744, width, device=device, generator=generator) for _ in range(5)]
    inputs = (streams[0], *(x.bfloat16() for x in streams[1:]), torch.rand(width, device=device, generator=generator))
    compiled = torch.compile(norm, backend=inductor.compile_graph, dynamic=False)
    want = norm(*inputs)
    for _ in range(20):
        torch.full((1 << 28,), float("nan"), device=device)  # what fresh memory may hold
        for one, other in zip(compiled(*inputs), want, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-4)
