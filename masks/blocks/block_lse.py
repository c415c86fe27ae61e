"""Log-sum-exp of a few rows' logits over each block of keys, as one operator: what a softmax over blocks needs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from omnisparse_flex.kernels.fallback import load
from omnisparse_flex.masks.blocks.mean_pool import for_exact_products
from omnisparse_flex.ops import define

KERNEL = ("block_lse.block_lse_in_one", "the kernel for exact rows failed, they are made in tensor code")


def block_lse(rows: Tensor, key: Tensor, last: Tensor, real: Tensor | None, scale: float, block: int) -> Tensor:
    """How much of each row's softmax lies in each block of keys, as logarithms, up to a constant of the row.

    Args:
        rows: (B, Hq, R, D), queries.
        key: (B, Hkv, S, D).
        last: int64 (R,), the last key position that a row sees.
        real: bool (B, S), keys that exist; None: all.
        scale: Logit scale.
        block: Keys per block.

    Returns:
        float32 (B, Hq, R, NK): natural log-sum-exp, -inf where a row sees no key of a block. One Triton kernel on a
        GPU, where products stay float32 and are never in memory; tensor code elsewhere.
    """
    made: Tensor = torch.ops.omnisparse.block_lse(rows, key, last, real, scale, block)
    return made


def _block_lse(rows: Tensor, key: Tensor, last: Tensor, real: Tensor | None, scale: float, block: int) -> Tensor:
    takes = rows.is_cuda and rows.dtype != torch.float64 and rows.shape[3] <= 256
    if takes and (kernel := load(*KERNEL)) is not None:
        made: Tensor | None = kernel(rows, key, last, real, scale, block)
        if made is not None:
            return made
    heads, kv_heads, kv_len = rows.shape[1], key.shape[1], key.shape[2]
    grouped = rows.unflatten(1, (kv_heads, heads // kv_heads)).flatten(2, 3)
    logits = (for_exact_products(grouped) @ for_exact_products(key).transpose(-1, -2)).unflatten(
        2, (heads // kv_heads, -1)
    ).flatten(1, 2).float() * scale
    hidden = torch.arange(kv_len, device=key.device) > last.unsqueeze(1)
    logits = logits.masked_fill(hidden if real is None else hidden | ~real[:, None, None], -torch.inf)
    padded = F.pad(logits, (0, -kv_len % block), value=-torch.inf)
    return torch.logsumexp(padded.unflatten(-1, (-1, block)), -1)


def _fake(rows: Tensor, key: Tensor, last: Tensor, real: Tensor | None, scale: float, block: int) -> Tensor:
    return rows.new_empty((*rows.shape[:3], (key.shape[2] + block - 1) // block), dtype=torch.float32)


SCHEMA = "block_lse(Tensor rows, Tensor key, Tensor last, Tensor? real, float scale, int block) -> Tensor"
define(SCHEMA, _block_lse, _fake)
