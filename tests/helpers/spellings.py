"""Spellings of attention whose outcome ``docs/rewritten.md`` tells: run through the backend, and compared."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from omnisparse_flex.backend import Backend
from tests.helpers.rewriting import keep_all, qkv

N = 140


class Spelling(NamedTuple):
    """One row: what is computed of ``q, k, v``, and where eager torch does something else, what that means."""

    code: str
    group: str
    kv_heads: int = 4
    rules: dict[str, object] = {}  # noqa: RUF012  (never changed)
    learns: bool = False
    meaning: str = ""


def _of(group: str, *codes: str, **how: object) -> list[Spelling]:
    return [Spelling(code, group, **how) for code in codes]  # type: ignore[arg-type]


SDPA = "F.scaled_dot_product_attention(q, k, v, {})"
ROWS = [
    *_of(
        "Calls",
        "F.scaled_dot_product_attention(q, k, v)",
        SDPA.format("is_causal=True"),
        SDPA.format("scale=0.3"),
        SDPA.format("dropout_p=0.1"),
        "torch.ops.omnisparse.attn(q, k, v, pad, None, True, 0.25, 0, 0.0)",
        "torch.softmax(q @ k.mT / 4, -1) @ v",
        "torch.softmax((q * 0.25) @ k.permute(0, 1, 3, 2) + order, -1) @ v",
        "(q @ k.transpose(2, 3)).masked_fill(order < 0, -math.inf).softmax(-1) @ v",
        "F.dropout(F.softmax(q @ k.mT, -1, dtype=torch.float32), 0.1, False) @ v",
        "F.dropout(torch.softmax(q @ k.mT, -1), 0.1) @ v",
        "torch.softmax(torch.add(q @ k.mT, order, alpha=2), -1) @ v",
        "torch.softmax(torch.div(q @ k.mT, 4, rounding_mode='floor'), -1) @ v",
        "(lambda w: w @ v + w.mean())(torch.softmax(q @ k.mT, -1))",
        "F.scaled_dot_product_attention(q[0], k[0], v[0])[None]",
        "F.scaled_dot_product_attention(q, k[:1], v[:1])",
        "F.scaled_dot_product_attention(q, k, v[:, :1])",
    ),
    *_of(
        "Repeated keys and values",
        *(
            f"F.scaled_dot_product_attention(q, *({x} for x in (k, v)))"
            for x in (
                "x.repeat_interleave(2, 1)",
                "x[:, :, None].expand(2, 2, 2, N, 16).reshape(2, 4, N, 16)",
                "x.repeat_interleave(torch.tensor([1, 3]), 1, output_size=4)",
                "x.repeat(1, 2, 1, 1)",
                "x[:, torch.tensor([0, 0, 0, 1])]",
            )
        ),
        "(lambda kk, vv: (k.mul_(2), F.scaled_dot_product_attention(q, kk, vv))[1])"
        "(k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))",
        kv_heads=2,
    ),
    *_of(
        "Boolean masks",
        *(
            SDPA.format(x)
            for x in (
                "torch.ones(N, N, dtype=torch.bool).tril()",
                "j <= i",
                "(j <= i) & (i - j < 50)",
                "(j <= i) & pad[:, None, None]",
                "(doc[:, None, :, None] == doc[:, None, None]) & (j <= i)",
                "(j <= i) | (j < start[:, None, None, None])",
                "frames[:, torch.arange(N) // 20][:, None, None]",
                "torch.arange(2 * N)[-N:] - N <= i",
                "j <= torch.arange(N)[:, None] + position[0]",
                "random",
                "u @ u.T > 0",
                "j.to(torch.int8) <= i",
                "(lambda m: (m[:, :3].fill_(True), m)[1])(j <= i)",
                "(lambda p: (p.logical_or_(pad), p)[1])(pad.clone())[:, None, None]",
            )
        ),
    ),
    *_of(
        "Additive masks",
        *(
            SDPA.format(x)
            for x in (
                "order",
                "order + low_pad[:, None, None]",
                "torch.where(j <= i, 0.0, torch.finfo(torch.float32).min)",
                "(1 - pad[:, None, None].float()) * -1e9",
                "order + slope[:, None, None] * (j - i)",
                "table[:, (i - j).clamp(-9, 9) + 9]",
                "F.embedding((i - j).clamp(0, 18), table.T).permute(2, 0, 1)",
                "torch.randn(N, N)",
            )
        ),
    ),
    *_of(
        "Learned biases, tokens",
        SDPA.format("order + table[:, (i - j).clamp(-9, 9) + 9]"),
        rules={"granularity": "token"},
        learns=True,
    ),
    *_of("Learned biases, blocks", SDPA.format("order + table[:, (i - j).clamp(-9, 9) + 9]"), learns=True),
    *_of(
        "flex_attention",
        "flex_attention(q, k, v, block_mask=causal_blocks)",
        "flex_attention(q, k, v, block_mask=causal_blocks, score_mod=lambda s, b, h, i, j: s - slope[h] * (i - j))",
        "flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + 1)",
        "flex_attention(q, k, v, block_mask=causal_blocks, return_lse=True)[1][..., None]",
    ),
    # Eagerly flex_attention does not read its block lists; compiled it does.
    Spelling(
        "flex_attention(q, k, v, block_mask=fewer_blocks)",
        "flex_attention",
        meaning=SDPA.format("(j <= i) & (i // 128 == j // 128)"),
    ),
]


def inputs() -> dict[str, object]:
    """What the codes read beside ``q, k, v``: small tensors, made in the graph where a model makes them there."""
    g = torch.Generator().manual_seed(0)
    pad = torch.arange(N) >= torch.tensor([[0], [30]])
    low = torch.zeros(2, N).masked_fill(~pad, -math.inf)
    few = torch.tensor([[[1, 1]]], dtype=torch.int32), torch.tensor([[[[0, 0], [1, 0]]]], dtype=torch.int32)
    causal = lambda b, h, i, j: i >= j  # noqa: E731
    return {
        "pad": pad,
        "low_pad": low,
        "doc": torch.arange(N).div(50, rounding_mode="floor").expand(2, N).contiguous(),
        "start": torch.tensor([9, 60]),
        "frames": torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 1, 1]]).bool(),
        "position": torch.arange(N),
        "slope": torch.rand(4, generator=g),
        "table": torch.randn(4, 19, generator=g),
        "u": torch.randn(N, 3, generator=g),
        "random": torch.rand(N, N, generator=g) < 0.5,
        "causal_blocks": create_block_mask(causal, None, None, N, N, device="cpu"),
        "fewer_blocks": BlockMask.from_kv_blocks(*few, BLOCK_SIZE=128, mask_mod=causal, seq_lengths=(N, N)),
    }


def outcome(row: Spelling) -> str:
    """``exact``, ``left alone`` or the reason for which it stays dense; fails where the numbers are not the model's."""
    names = inputs()
    names |= {"F": F, "torch": torch, "math": math, "N": N, "flex_attention": flex_attention}
    setup = "i, j = torch.arange(N)[:, None], torch.arange(N)\n    order = torch.full((N, N), -math.inf).triu(1)"
    for name, code in (("call", row.code), ("meaning", row.meaning or row.code)):
        exec(f"def {name}(q, k, v):\n    {setup}\n    return {code}", names)
    call, meaning = names["call"], names["meaning"]
    given = [qkv(N, kv_heads=row.kv_heads) for _ in range(2)]
    if row.learns:
        names["table"].requires_grad_()  # type: ignore[attr-defined]
    inner = "aot_eager" if row.learns else "eager"
    backend = Backend(keep_all(**row.rules), inner=inner, min_seq_len=0)
    torch.manual_seed(0)  # of dropout
    got = torch.compile(call, backend=backend)(*given[0])  # type: ignore[arg-type]
    torch.manual_seed(0)
    want = meaning(*given[1])  # type: ignore[operator]
    live = want.isfinite() & (want != 0)
    torch.testing.assert_close(torch.where(live, got, 0.0), torch.where(live, want, 0.0))
    torch._dynamo.reset()
    if not backend.log.sites:
        return "left alone: not attention as any pass knows it"
    return re.sub(r"^mask \w+ (?=\(|is )", "mask ", backend.log.sites[0].reason) or "exact"
