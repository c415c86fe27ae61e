"""A mask of one's own: written as a ``mask_mod``, tested with ``omnisparse_flex.testing``, used in sparse attention.

The mask is *frame-causal*: a token sees its own frame whole, and all frames before it.

    python examples/own_mask.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from omnisparse_flex import OmniSparseConfig, sparse_attention
from omnisparse_flex.testing import assert_block_mask_equals, assert_mask_mod_equals, dense_oracle

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def frame_causal(tokens_per_frame: int) -> MaskMod:
    """A ``mask_mod`` under which frames are causal and the tokens of a frame see one another."""

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx // tokens_per_frame <= q_idx // tokens_per_frame

    return mask_mod


def definition(tokens: int, tokens_per_frame: int) -> Tensor:
    """The same as plain loops over the sequence: bool (1, 1, N, N)."""
    dense = torch.zeros(1, 1, tokens, tokens, dtype=torch.bool)
    for query in range(tokens):
        frame_end = (query // tokens_per_frame + 1) * tokens_per_frame
        dense[..., query, : min(frame_end, tokens)] = True
    return dense


def check(tokens: int, tokens_per_frame: int) -> Tensor:
    """Compare the mask, and the blocks that FlexAttention derives from it, with its definition; return that."""
    mask_mod, dense = frame_causal(tokens_per_frame), definition(tokens, tokens_per_frame)
    assert_mask_mod_equals(mask_mod, dense)
    assert_block_mask_equals(create_block_mask(mask_mod, 1, 1, tokens, tokens, device="cpu"), dense)
    return dense


def run() -> tuple[float, float]:
    """Test the mask, then attend under it, keeping everything and keeping little.

    Returns:
        How far both outputs are from dense attention under the mask.
    """
    for tokens, tokens_per_frame in ((1, 1), (300, 7), (512, 64), (517, 128)):
        check(tokens, tokens_per_frame)

    torch.manual_seed(0)
    tokens, tokens_per_frame = 1024, 64
    query, key, value = (torch.randn(1, 4, tokens, 32) for _ in range(3))
    expected = dense_oracle(query, key, value, mask=check(tokens, tokens_per_frame))

    def distance(config: OmniSparseConfig) -> float:
        mask_mod = frame_causal(tokens_per_frame)
        output = sparse_attention(query, key, value, config=config, is_causal=False, mask_mod=mask_mod)
        return (output - expected).abs().max().item()

    everything = distance(OmniSparseConfig(budget=tokens, lazy_threshold=None))
    little = distance(OmniSparseConfig(min_peak=0.5, target_recall=0.3, sink_size=16, window_size=64))
    print(f"every key: {everything:.2g} from dense attention; a recall of 0.3: {little:.2g}")
    return everything, little


if __name__ == "__main__":
    run()
