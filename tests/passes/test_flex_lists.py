"""Block lists of a flex_attention call are the caller's mask as much as its mask_mod."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from omnisparse_flex.backend import Backend
from omnisparse_flex.masks.blocks.block_lists import block_lists, map_of_lists
from omnisparse_flex.masks.expr.block_bounds import Grid
from omnisparse_flex.masks.expr.expr import causal as causal_expr
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.testing import assert_close_to_oracle, expand_block_mask
from tests.helpers.rewriting import keep_all, qkv

N = 500


def causal(b, h, i, j):
    return i >= j


def everything(b, h, i, j):
    return j >= 0


def lists_of(blocks):
    count, indices = block_lists(blocks)
    return count.contiguous(), indices.contiguous()


def chosen(seed, shape=(1, 1, 4, 4), share=0.5):
    blocks = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    return blocks | torch.eye(shape[-2], shape[-1], dtype=torch.bool)


def mask(partial, full=None, mod=causal, block=128):
    whole = (None, None) if full is None else lists_of(full)
    return BlockMask.from_kv_blocks(*lists_of(partial), *whole, BLOCK_SIZE=block, mask_mod=mod, seq_lengths=(N, N))


LISTS = {
    "fewer than the function allows": mask(chosen(0)),
    "of each head": mask(chosen(1, (1, 4, 4, 4))),
    "of each batch row": mask(chosen(2, (2, 1, 4, 4))),
    "of each row and head": mask(chosen(3, (2, 4, 4, 4))),
    "full blocks that the function forbids": mask(torch.zeros(1, 1, 4, 4).bool(), chosen(4)),
    "some full, some not": mask(chosen(5) & ~chosen(6), chosen(6), everything),
    "small blocks": mask(chosen(7, (1, 1, 8, 8)), block=64),
    "large blocks": mask(chosen(8, (1, 1, 2, 2)), block=256),
    "oblong blocks": mask(chosen(9, (1, 1, 4, 8)), block=(128, 64)),
    "few blocks": mask(chosen(10, share=0.1)),
    "a list for every row but one": mask(chosen(11) & (torch.arange(4) != 2)[:, None]),
    "those of the function": create_block_mask(causal, None, None, N, N, device="cpu"),
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("granularity", ["block", "token"])
def test_lists_are_honoured(name, granularity):
    block_mask, tensors = LISTS[name], qkv(N)
    backend = Backend(keep_all(granularity=granularity), inner="eager", min_seq_len=0)
    out = torch.compile(lambda q, k, v: flex_attention(q, k, v, block_mask=block_mask), backend=backend)(*tensors)
    assert [x.reason for x in backend.log.sites] == [""]
    assert_close_to_oracle(out, *tensors, expand_block_mask(block_mask, 2, 4))


def test_lists_of_the_function_keep_its_bounds():
    """What the lists add costs nothing where they say the same: full blocks stay full, empty ones empty."""
    backend = Backend(keep_all(), inner="eager", min_seq_len=0)
    block_mask = create_block_mask(causal, None, None, N, N, device="cpu")
    torch.compile(lambda q, k, v: flex_attention(q, k, v, block_mask=block_mask), backend=backend)(*qkv(N))
    maps = [
        map_of_lists(count, indices)
        for count, indices in (
            (block_mask.kv_num_blocks, block_mask.kv_indices),
            (block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
        )
    ]
    (site,) = backend.last.sites
    full, some = IndexMask(site.expr, tuple(maps)).bounds(Grid(2, 4, N, N, 128, torch.device("cpu")))
    plain = IndexMask(causal_expr()).bounds(Grid(2, 4, N, N, 128, torch.device("cpu")))
    assert torch.equal(full, plain[0]) and torch.equal(some, plain[1])


@pytest.mark.slow
def test_lists_through_inductor():
    block_mask, tensors = LISTS["of each head"], qkv(N)
    backend = Backend(keep_all(), inner="inductor", min_seq_len=0)
    out = torch.compile(lambda q, k, v: flex_attention(q, k, v, block_mask=block_mask), backend=backend)(*tensors)
    assert [x.reason for x in backend.log.sites] == [""]
    assert_close_to_oracle(out, *tensors, expand_block_mask(block_mask, 2, 4))


@pytest.mark.parametrize("width", [0, 3, 9])
def test_maps_of_lists(width):
    blocks = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    count, indices = block_lists(blocks)
    indices = torch.where(torch.arange(6) < count[..., None], indices, 77)  # what lies behind the count may be anything
    found = map_of_lists(count, indices, width)
    assert torch.equal(found[..., :6], blocks) and not found[..., 6:].any() and found.shape[-1] == max(6, width)
