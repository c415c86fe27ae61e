"""The operator that makes a site's block lists: tensor code on the CPU, one kernel on a GPU, and the same numbers."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omnisparse_flex.kernels.fallback import load
from omnisparse_flex.masks.blocks import block_lists as blocks
from omnisparse_flex.masks.blocks.block_lists import block_lists
from tests.helpers.interpreter import needs_scalars, run_interpreted

SMALL = [(1, 1, 1, 1), (2, 1, 9, 5), (1, 3, 5, 9), (1, 1, 2, 1100)]
SHAPES = [*SMALL, (4, 1, 64, 80), (2, 2, 1100, 1500)]


def maps(shape, device="cpu", seed=0, density=0.5):
    """Two maps; the second is the same for the whole batch, as a layout's is."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(shape, generator=generator) < density
    full = torch.rand((1, 1, *shape[2:]), generator=generator) < 0.5
    return keep.to(device), full.to(device)


def expected(keep, full):
    return (*block_lists(keep & ~full), *block_lists(keep & full))


def check(lists, shape, device="cpu", density=0.5):
    keep, full = maps(shape, device, density=density)
    wide = full.expand_as(keep)
    for one, other in ((keep, wide), (keep.transpose(-1, -2), wide.transpose(-1, -2))):
        made = lists(one, other)
        for got, wanted in zip(made, expected(one, other), strict=True):
            assert got.dtype == torch.int32 and got.is_contiguous() and torch.equal(got, wanted)


def check_interpreted():
    """In a process where Triton interprets."""
    from omnisparse_flex.kernels.block_lists import lists_in_one

    for shape in SMALL:
        check(lists_in_one, shape)
    check(lists_in_one, SMALL[1], density=0.0)
    check(lists_in_one, SMALL[1], density=1.0)


@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 2**16))
def test_the_operator_means_the_lists_of_both_maps(batch, heads, rows, columns, transposed, seed):
    keep, full = maps((batch, heads, rows, columns), seed=seed)
    if transposed:
        keep, full = keep.transpose(-1, -2), full.transpose(-1, -2)
    made = torch.ops.omnisparse.map_lists(keep, full)
    assert all(x.is_contiguous() for x in made)
    assert all(torch.equal(a, b) for a, b in zip(made, expected(keep, full), strict=True))


def test_the_operator_is_what_the_compiler_was_told():
    keep, full = maps((2, 1, 9, 5))
    for arguments in ((keep, full), (keep.transpose(-1, -2), full.transpose(-1, -2))):
        torch.library.opcheck(torch.ops.omnisparse.map_lists.default, arguments)


def test_without_a_kernel_tensor_code_makes_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert load.__wrapped__(*blocks.KERNEL) is None
    check(blocks._map_lists, (2, 1, 9, 5))


@pytest.mark.gpu
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_on_the_gpu(shape, density):
    from omnisparse_flex.kernels.block_lists import lists_in_one

    check(lists_in_one, shape, "cuda", density)
    assert load(*blocks.KERNEL)(*(x.expand(shape) for x in maps(shape, "cuda"))) is not None


@needs_scalars
def test_in_the_interpreter():
    run_interpreted("tests.masks.test_block_lists", "check_interpreted()")
