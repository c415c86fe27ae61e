"""What token attention in kernels holds beside its inputs and results: no more than the layer's keys and values."""

import dataclasses
import gc
import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from omnisparse_flex.attention.call import SparseCall, register
from omnisparse_flex.attention.tokens import dispatch as token_attention
from omnisparse_flex.attention.tokens.dispatch import attend_tokens
from omnisparse_flex.attention.tokens.gradients import token_backward
from omnisparse_flex.attention.tokens.op import call_token_op
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.expr.expr import causal
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.tokens.chunks import layer_bytes
from tests.helpers.interpreter import needs_interpreter

HEADS, KV_HEADS, DIM = 28, 4, 128
UNBOUNDED = OmniSparseConfig(granularity="token", target_recall=0.95, lazy_threshold=0.05)
CONFIGS = {
    "flattest": UNBOUNDED,
    "all_active": dataclasses.replace(UNBOUNDED, lazy_threshold=None),
    "sinks": dataclasses.replace(UNBOUNDED, budget="per_head"),
    "bounded": dataclasses.replace(UNBOUNDED, max_kv_budget=1024),
    "heads": dataclasses.replace(UNBOUNDED, gqa_choice="head", scoring_dims=32, lazy_threshold=0.1),
}
KERNELS = {
    "kernels.classify_queries": ("_classify",),
    "kernels.column_mass": ("_pack", "_mass"),
    "kernels.key_lists": ("_list",),
    "kernels.pack_keys": ("_ready",),
    "kernels.head_dims": ("_squares",),
    "kernels.top_keys": ("_needs", "_pick"),
    "kernels.attend_lists": ("_attend",),
    "kernels.attend_lists_backward": ("_of_queries", "_of_keys"),
}


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside of it held at once."""

    def __init__(self):
        super().__init__()
        self.held, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        found = func(*args, **(kwargs or {}))
        self.held = {at: (storage, size) for at, (storage, size) in self.held.items() if not storage.expired()}
        for x in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                storage = x.untyped_storage()
                self.held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return found


class Unlaunched:
    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def inputs(tokens, device, heads=(HEADS, KV_HEADS, KV_HEADS)):
    return [torch.randn(1, count, tokens, DIM, device=device, dtype=torch.bfloat16) for count in heads]


def site_of(config, name, device):
    sinks = torch.zeros(HEADS, dtype=torch.bfloat16, device=device) if name == "sinks" else None
    return SparseCall(config=config, target=0.95, mask=IndexMask(causal()), sinks=sinks)


def results_of(found):
    return sum(x.nbytes for x in (found if isinstance(found, tuple) else (found,)) if x is not None)


@needs_interpreter
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [4096, 5000, 8192, 32768, 131072, 524288])
@pytest.mark.parametrize("backward", [False, True])
def test_a_run_without_data(monkeypatch, tokens, name, backward):
    """Tensors without data, kernels not launched: what is held, and that no shape depends on data and nobody waits."""
    for module, names in KERNELS.items():
        for kernel in names:
            monkeypatch.setattr(importlib.import_module(f"omnisparse_flex.{module}"), kernel, Unlaunched())
    select = importlib.import_module("omnisparse_flex.masks.tokens.select_triton")
    monkeypatch.setattr(select, "packed_type", lambda *_: torch.float8_e4m3fn)
    monkeypatch.setattr(token_attention, "takes_kernels", lambda *_: True)
    with FakeTensorMode(), torch.no_grad():
        tensors, site = inputs(tokens, "cpu"), site_of(CONFIGS[name], name, "cpu")
        grad = inputs(tokens, "cpu", [HEADS])
        with Live() as live:
            found = token_backward(*grad, *tensors, site) if backward else attend_tokens(*tensors, site)
        share = (live.peak - results_of(found)) / layer_bytes(tensors[1])
    # The masks of one member of a group are small.
    assert (0.25 if name == "heads" else 0.5) < share <= 1, share


def extra_on_the_gpu(run):
    """Device bytes that a call takes at most beside what it returns."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - results_of(found)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [4096, 8192, 32768, 131072])
def test_forward_on_the_gpu(tokens, name):
    tensors, site = inputs(tokens, "cuda"), site_of(CONFIGS[name], name, "cuda")
    run = lambda: attend_tokens(*tensors, site)  # noqa: E731
    run()  # compiles
    share = extra_on_the_gpu(run) / layer_bytes(tensors[1])
    print(f"forward {tokens} {name}: {share:.3f}")
    assert share <= 1, share


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [4096, 16384])
def test_backward_on_the_gpu(tokens, name):
    """Through the operator of a model's graph, whose backward keeps nothing but the inputs."""
    tensors, site = [x.requires_grad_() for x in inputs(tokens, "cuda")], site_of(CONFIGS[name], name, "cuda")
    site = dataclasses.replace(site, rules=register(site))
    # As models hand it over: heads inside of tokens.
    grad = torch.randn(1, tokens, HEADS, DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    for _ in range(2):  # the first compiles
        forward = extra_on_the_gpu(lambda: call_token_op(*tensors, site).detach()) / layer_bytes(tensors[1])
        out = call_token_op(*tensors, site)
        backward = extra_on_the_gpu(lambda: torch.autograd.grad(out, tensors, grad)) / layer_bytes(tensors[1])  # noqa: B023
    print(f"training {tokens} {name}: {forward:.3f} {backward:.3f}")
    assert forward <= 1 and backward <= 1, (forward, backward)
