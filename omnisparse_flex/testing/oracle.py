"""The dense oracle: attention as its definition says, in float64, over the whole N x N matrix.

Slow and memory-hungry on purpose. Every sparse path of the library is tested against it;
it shares no code with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omnisparse_flex.errors import ConfigError, require
from omnisparse_flex.types import MaskMod, ScoreMod


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Softmax attention over every pair that ``mask`` allows.

    Logits are ``scale * q.k``, then soft-capped, then biased, then passed to ``score_mod``,
    then masked. Differentiable in every float tensor given.

    Args:
        query: ``(B, Hq, L, D)``, any float dtype.
        key: ``(B, Hkv, S, D)``; ``Hkv`` divides ``Hq``, query head ``h`` reads head
            ``h // (Hq / Hkv)``.
        value: ``(B, Hkv, S, Dv)``.
        mask: Bool, broadcastable to ``(B, Hq, L, S)``, True at allowed pairs; None: all.
        bias: Float, broadcastable to ``(B, Hq, L, S)``, added to the logits; ``-inf``
            forbids a pair as ``mask`` does.
        score_mod: ``(score, b, h, q_idx, kv_idx) -> score``, called once on the whole
            ``(B, Hq, L, S)`` with broadcastable int64 indices; may return ``-inf``.
        scale: Factor of the logits; None: ``D ** -0.5``.
        softcap: ``softcap * tanh(logit / softcap)``, in logit units; None: no cap.
        sinks: ``(Hq,)`` logits of one learned sink per head, which takes mass and gives no
            value; None: no sink.
        dtype: Of the computation and the result.

    Returns:
        ``(B, Hq, L, Dv)`` in ``dtype``. A row without an allowed key is exactly 0, and so
        is its gradient.

    Raises:
        ConfigError: If the shapes do not fit, or ``mask`` is not bool.

    Source: Vaswani et al., arXiv 1706.03762, equation 1; sinks as in gpt-oss, the soft cap
    as in Gemma 2 (arXiv 2408.00118). Our choice: the order of the terms, which is that of
    transformers' eager attention, with ``score_mod`` last.
    """
    _check(query, key, value, mask)
    if sinks is not None:
        require(tuple(sinks.shape) == (query.shape[1],), "sinks", f"have shape ({query.shape[1]},)", tuple(sinks.shape))
    with torch.autocast(query.device.type, enabled=False):  # autocast would undo ``dtype``
        scores = dense_logits(query, key, scale, dtype)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias.to(dtype)
        if score_mod is not None:
            B, H, L, S = scores.shape
            scores = score_mod(scores, *_indices(B, H, L, S, scores.device)).to(dtype)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = _safe_softmax(scores, None if sinks is None else sinks.to(dtype))
        return weights @ _repeat_heads(value.to(dtype), query.shape[1])


def dense_logits(query: Tensor, key: Tensor, scale: float | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """``scale * q.k`` for every pair, before any mask.

    Args:
        query: ``(B, Hq, L, D)``.
        key: ``(B, Hkv, S, D)``; ``Hkv`` divides ``Hq``.
        scale: None: ``D ** -0.5``.
        dtype: Of the computation and the result.

    Returns:
        ``(B, Hq, L, S)`` in ``dtype``.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return (query.to(dtype) @ _repeat_heads(key.to(dtype), query.shape[1]).mT) * scale


def materialize_mask(mask_mod: MaskMod, B: int, H: int, L: int, S: int, device: torch.device | str = "cpu") -> Tensor:
    """The dense mask that a ``mask_mod`` denotes, by one call on broadcastable indices.

    Args:
        mask_mod: ``(b, h, q_idx, kv_idx) -> bool``, pointwise.
        B: Batch rows.
        H: Query heads.
        L: Queries.
        S: Keys.
        device: Where the indices, and the tensors that ``mask_mod`` captures, live.

    Returns:
        ``(B, H, L, S)`` bool, contiguous.

    Raises:
        ConfigError: If ``mask_mod`` does not return a bool tensor.
    """
    mask = mask_mod(*_indices(B, H, L, S, device))
    is_mask = isinstance(mask, Tensor) and mask.dtype == torch.bool
    require(is_mask, "mask_mod", "return a bool tensor", mask.dtype if isinstance(mask, Tensor) else mask)
    return mask.expand(B, H, L, S).contiguous()


def expand_block_map(keep: Tensor, L: int, S: int, block_size: int | tuple[int, int]) -> Tensor:
    """The token mask of a block map: every pair of a kept block.

    Args:
        keep: ``(..., NQ, NK)`` bool over blocks; blocks past the last token are cut off.
        L: Queries.
        S: Keys.
        block_size: Side of a block in tokens, or (query side, key side).

    Returns:
        ``(..., L, S)`` bool.

    Raises:
        ConfigError: If ``keep`` is not bool or does not cover ``L x S``.
    """
    block_q, block_k = (block_size, block_size) if isinstance(block_size, int) else block_size
    require(keep.dtype == torch.bool, "keep", "be a bool tensor", keep.dtype)
    covered = keep.dim() >= 2 and keep.shape[-2] * block_q >= L and keep.shape[-1] * block_k >= S
    require(covered, "keep", f"cover {L} x {S} tokens in blocks of {block_q} x {block_k}", tuple(keep.shape))
    rows = torch.arange(L, device=keep.device) // block_q
    columns = torch.arange(S, device=keep.device) // block_k
    return keep[..., rows[:, None], columns]


def _repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def _indices(B: int, H: int, L: int, S: int, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, h, q_idx, kv_idx = (torch.arange(extent, device=device) for extent in (B, H, L, S))
    return b[:, None, None, None], h[:, None, None], q_idx[:, None], kv_idx


def _safe_softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last axis where a row of ``-inf`` gives 0 and a zero gradient instead of NaN."""
    top = scores.detach().amax(dim=-1, keepdim=True)
    if sinks is not None:
        sinks = sinks[:, None, None]
        top = torch.maximum(top, sinks.detach())
    top = top.masked_fill(top == -torch.inf, 0.0)  # -inf minus -inf is NaN
    weights = torch.exp(scores - top)
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    return weights / total.masked_fill(total == 0, 1.0)


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require(tensor.dim() == 4, name, "be of shape (B, H, N, D)", tuple(tensor.shape))
    batch, heads, _, dim = query.shape
    require(key.shape[0] == batch and key.shape[3] == dim, "key", f"have B={batch} and D={dim}", tuple(key.shape))
    require(value.shape[:3] == key.shape[:3], "value", f"have B, H, S = {tuple(key.shape[:3])}", tuple(value.shape))
    require(heads % key.shape[1] == 0, "key", f"have a number of heads that divides {heads}", key.shape[1])
    if mask is not None and mask.dtype != torch.bool:
        raise ConfigError(f"mask must be a bool tensor, got {mask.dtype}")
