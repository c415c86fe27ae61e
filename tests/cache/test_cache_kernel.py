"""The decode kernel: on the GPU if there is one, else in Triton's interpreter, else not at all."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from omnisparse_flex.kernels.fallback import load
from tests.helpers.interpreter import needs_interpreter, run_interpreted

CASES = [  # B, Hkv, group, D, keys of the two rectangles, tail, with padding
    (1, 4, 7, 128, (300, 90), 5, False),
    (2, 3, 3, 64, (130, 40), 70, True),
    (1, 2, 1, 16, (10, 10), 1, False),
    (2, 2, 4, 64, (64, 200), 64, True),
    (1, 4, 7, 128, (1, 700), 300, False),
]


def layer_of(case, dtype, device, split: bool):
    """A random layer with ragged rows, as the cache would hold it."""
    from omnisparse_flex.cache.kept_keys import KeptKeys
    from omnisparse_flex.cache.layer import SlimLayer

    batch, kv_heads, _, dim, sizes, tail, padded = case
    layer = SlimLayer(0)
    even = tuple(range(0, kv_heads, 2)) if split else tuple(range(kv_heads))
    for heads, size in zip((even, tuple(h for h in range(kv_heads) if h not in even)), sizes, strict=True):
        if heads:
            shape = (batch, len(heads), size, dim)
            keys, values = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
            counts = torch.randint(0, size + 1, shape[:2], device=device) if batch > 1 else None
            places = torch.zeros(shape[:3], dtype=torch.int32, device=device)
            layer.kept += (KeptKeys(heads, keys, values, places, counts),)
    layer.prefix = 20
    if tail > 1:
        layer.append(*(torch.randn(batch, kv_heads, tail - 1, dim, device=device).to(dtype) for _ in range(2)))
    padding = torch.rand(batch, layer.length + 1, device=device) < 0.8 if padded else None
    return layer, padding


def token_of(case, dtype, device):
    """Query, key and value of one token."""
    shapes = [(case[0], heads, 1, case[3]) for heads in (case[1] * case[2], case[1], case[1])]
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def check(device: str) -> None:
    """The kernel against dense attention in float64, by the errors that the dense kernels make themselves."""
    from omnisparse_flex.kernels import decode_token as decode_kernel
    from omnisparse_flex.kernels.decode_token import attend_token

    decode_kernel.RUN = 64
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16, *([torch.bfloat16] if device == "cuda" else [])):
        for case in CASES:
            for split in (True, False):
                layer, padding = layer_of(case, dtype, device, split)
                query, key, value = token_of(case, dtype, device)
                # Of the order of the log-sum-exps, in one of the two dtypes that a model may hold them in.
                sinks = 5 + torch.randn(query.shape[1], device=device).to(dtype) if split else None
                bits = None if padding is None else padding.view(torch.uint8)
                tail = (*layer._room(key, value), layer._count(query.device), layer.prefix)
                parts = [(part.keys, part.values) for part in layer.kept]
                out = attend_token(query, key, value, parts, *layer._table(), *tail, bits, 0.2, sinks)
                layer.tail += 1
                assert layer.counter.item() == layer.tail == case[5]
                assert torch.equal(layer.tail_keys[:, :, layer.tail - 1 : layer.tail], key)
                assert torch.equal(layer.tail_values[:, :, layer.tail - 1 : layer.tail], value)
                layer.kept = tuple(
                    dataclasses.replace(part, keys=part.keys.double(), values=part.values.double())
                    for part in layer.kept
                )
                layer.tail_keys, layer.tail_values = layer.tail_keys.double(), layer.tail_values.double()
                exact = layer._attend_parts(query.double(), padding, 0.2, None if sinks is None else sinks.double())
                size = max(case[4]) + case[5]
                # Products and sums in float32, weights and result rounded to the inputs' type.
                tolerance = 4 * torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * (case[3] + size)
                assert (out.double() - exact).abs().max() <= tolerance * 4, (dtype, case, split)


@pytest.mark.gpu
def test_on_the_gpu():
    check("cuda")


@needs_interpreter
def test_in_the_interpreter():
    run_interpreted("tests.cache.test_cache_kernel", "check('cpu')")


@pytest.mark.gpu
def test_a_kernel_that_fails_leaves_dense_kernels(monkeypatch):
    from omnisparse_flex.kernels import decode_token as decode_kernel

    monkeypatch.setattr(decode_kernel, "_runs", None)
    load.cache_clear()
    layer, padding = layer_of(CASES[0], torch.float16, "cuda", True)
    inputs = token_of(CASES[0], torch.float16, "cuda")
    with pytest.warns(UserWarning, match="the decode kernel failed, decoding runs on dense kernels"):
        out = layer.attend(*inputs, padding, 0.2)
    load.cache_clear()
    assert layer.tail == 5 and torch.equal(out, layer._attend_parts(inputs[0], padding, 0.2))


@pytest.mark.gpu
def test_a_captured_step_replays_while_the_tail_has_room():
    """The tail's length lives on the device: a graph of one step serves the next ones."""
    torch.manual_seed(0)
    layer, _ = layer_of(CASES[0], torch.float16, "cuda", True)
    twin, _ = layer_of(CASES[0], torch.float16, "cuda", True)
    twin.kept, twin.tail_keys, twin.tail_values = (
        layer.kept,
        *(x.clone() for x in (layer.tail_keys, layer.tail_values)),
    )
    inputs = token_of(CASES[0], torch.float16, "cuda")
    for one in (layer, twin):
        one.attend(*inputs, None, 0.2)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.attend(*inputs, None, 0.2)
    for _ in range(10):
        for x, new in zip(inputs, token_of(CASES[0], torch.float16, "cuda"), strict=True):
            x.copy_(new)
        graph.replay()
        assert torch.equal(captured, twin.attend(*inputs, None, 0.2))
    assert layer.counter.item() == twin.counter.item() == twin.tail == 15
