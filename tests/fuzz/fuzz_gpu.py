"""Calls on a GPU: a few compiled programs of dynamic lengths, many inputs in half precision, against float64."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import omnisparse_flex.ops  # noqa: F401  (defines the marker)
from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.backend import Backend

HEADS, KV_HEADS, DIM = 4, 2, 64
EVERYTHING: dict[str, Any] = {"target_recall": 0.9999999, "lazy_threshold": None}
LOSSY: dict[str, Any] = {"target_recall": 0.9, "window_size": 64, "sink_size": 16}


def _repeated(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k.repeat_interleave(HEADS // KV_HEADS, 1), v.repeat_interleave(HEADS // KV_HEADS, 1)


def _order(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    i = torch.arange(q.shape[2], device=q.device)[:, None] + (k.shape[2] - q.shape[2])
    return i, torch.arange(k.shape[2], device=q.device)


def padded(q, k, v, pad, doc, fpad, slope):  # type: ignore[no-untyped-def]
    """SDPA with a bool mask of order and padding."""
    i, j = _order(q, k)
    return F.scaled_dot_product_attention(q, *_repeated(k, v), attn_mask=(j <= i) & pad[:, None, None])


def float_padded(q, k, v, pad, doc, fpad, slope):  # type: ignore[no-untyped-def]
    """The same with an additive padding mask that is an input."""
    i, j = _order(q, k)
    order = torch.where(j <= i, 0.0, -math.inf).to(q.dtype)
    return F.scaled_dot_product_attention(q, *_repeated(k, v), attn_mask=order + fpad[:, None, None])


def packed(q, k, v, pad, doc, fpad, slope):  # type: ignore[no-untyped-def]
    """Documents in a row, each with a window."""
    i, j = _order(q, k)
    same = doc.index_select(1, i[:, 0])[:, None, :, None] == doc[:, None, None]
    return F.scaled_dot_product_attention(q, *_repeated(k, v), attn_mask=same & (j <= i) & (i - j < 300))


def alibi(q, k, v, pad, doc, fpad, slope):  # type: ignore[no-untyped-def]
    """A bias by distance."""
    i, j = _order(q, k)
    bias = (slope[:, None, None] * (j - i)).masked_fill(j > i, -math.inf).to(q.dtype)
    return F.scaled_dot_product_attention(q, *_repeated(k, v), attn_mask=bias)


def marked(q, k, v, pad, doc, fpad, slope):  # type: ignore[no-untyped-def]
    """What transformers' decoders become, padded."""
    return torch.ops.omnisparse.attn(q, k, v, pad, None, True, DIM**-0.5, 0, 0.0)


#: (call, rules, whether gradients are checked).
PROGRAMS: tuple[tuple[Callable[..., Tensor], dict[str, Any], bool], ...] = (
    (marked, LOSSY, False),
    (marked, EVERYTHING | {"granularity": "token"}, False),
    (padded, EVERYTHING, True),
    (float_padded, EVERYTHING, False),
    (packed, LOSSY, False),
    (alibi, EVERYTHING, False),
    (padded, LOSSY | {"granularity": "token"}, False),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a program."""

    seed: int
    program: int
    dtype: torch.dtype
    batch: int
    q_len: int
    kv_len: int
    loud: float

    def script(self) -> str:
        """How to run it again."""
        return f"import torch\nfrom tests.fuzz import fuzz_gpu\nprint(fuzz_gpu.problem_of(fuzz_gpu.{self!r}))"


def draw(seed: int) -> Case:
    """The case of a seed."""
    r = random.Random(seed)
    kv_len = r.choice((200, 256, 513, r.randint(130, 1200)))
    program = r.randrange(len(PROGRAMS))
    return Case(
        seed,
        program,
        r.choice((torch.bfloat16, torch.float16)),
        r.choice((2, 3)),
        kv_len if r.random() < 0.7 else r.randint(130, kv_len),
        kv_len,
        r.choice((1.0, 1.0, 8.0, 500.0)),
    )


@functools.cache
def compiled(program: int, dtype: torch.dtype) -> tuple[Callable[..., Tensor], Backend]:
    """One program, compiled for all lengths."""
    call, rules, _ = PROGRAMS[program]
    # A code object of its own: Dynamo counts compilations by it.
    name = f"{call.__name__}_{program}_{dtype}"
    own = types.FunctionType(call.__code__.replace(co_name=name), call.__globals__, name)
    torch._dynamo.config.recompile_limit = 64
    backend = Backend(OmniSparseConfig(**rules), inner="inductor", min_seq_len=0)
    return torch.compile(own, backend=backend, dynamic=True), backend


def inputs_of(case: Case, device: str = "cuda") -> list[Tensor]:
    """``(q, k, v, pad, doc, fpad, slope)``; a batch row keeps its last key."""
    g = torch.Generator().manual_seed(case.seed)
    q = case.loud * torch.randn(case.batch, HEADS, case.q_len, DIM, generator=g)
    k, v = (torch.randn(case.batch, KV_HEADS, case.kv_len, DIM, generator=g) for _ in range(2))
    pad = torch.arange(case.kv_len) >= torch.randint(0, case.kv_len - 1, (case.batch, 1), generator=g)
    if case.seed % 3 == 0:
        pad = torch.rand(case.batch, case.kv_len, generator=g) < 0.7
    pad[:, -1] = True
    doc = torch.randint(0, 4, (case.batch, case.kv_len), generator=g).sort(1).values
    low = random.Random(case.seed).choice((-math.inf, torch.finfo(case.dtype).min))
    fpad, slope = torch.where(pad, 0.0, low), torch.rand(HEADS, generator=g) / 9
    floats = {0, 1, 2, 5}
    every = (q, k, v, pad, doc, fpad, slope)
    return [(x.to(case.dtype) if n in floats else x).to(device) for n, x in enumerate(every)]


def logits_of(case: Case, given: list[Tensor]) -> tuple[Tensor, Tensor]:
    """float64 logits (B, H, L, S) and the allowed pairs, by definition."""
    q, k, _, pad, doc, _, slope = given
    i, j = _order(q, k)
    logits = q.double() @ k.double().repeat_interleave(HEADS // KV_HEADS, 1).mT * DIM**-0.5
    call = PROGRAMS[case.program][0]
    allowed = (j <= i)[None, None].expand(case.batch, 1, -1, -1)
    if call in (padded, float_padded, marked):
        allowed = allowed & pad[:, None, None]
    if call is packed:
        allowed = allowed & (doc[:, None, i[:, 0], None] == doc[:, None, None]) & (i - j < 300)
    if call is alibi:
        logits = logits + (slope[:, None, None] * (j - i)).to(q.dtype).double()
    return logits, allowed.expand_as(logits)


def problem_of(case: Case) -> str | None:
    """What is wrong with the library's answer, or None."""
    try:
        return _problem(case)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:500]}"


def _problem(case: Case) -> str | None:
    (call, backend), (_, rules, learns) = compiled(case.program, case.dtype), PROGRAMS[case.program]
    given = inputs_of(case)
    logits, allowed = logits_of(case, given)
    kept = allowed
    if rules["target_recall"] != EVERYTHING["target_recall"]:
        support = _support(call, given)
        if (support & ~allowed).any():
            return f"{int((support & ~allowed).sum())} forbidden pairs have a weight"
        if (allowed.any(-1) & ~support.any(-1)).any():
            return f"{int((allowed.any(-1) & ~support.any(-1)).sum())} live rows lost every key"
        kept = support
    own = [x.requires_grad_(learns) if n < 3 else x for n, x in enumerate(given)]
    out = call(*own)
    if not backend.log.report().rewritten:
        return f"not rewritten: {[x.reason for x in backend.log.sites]}"
    wanted, near = (_define(own, logits, kept, dtype) for dtype in (torch.float64, case.dtype))
    found = [("output", out, wanted, near)]
    if learns:
        weight = torch.randn_like(out)
        grads = [torch.autograd.grad((x * weight.to(x.dtype)).sum(), own[:3]) for x in (out, wanted, near)]
        found += [(f"gradient of {n}", *x) for n, x in zip("qkv", zip(*grads, strict=True), strict=True)]
    return _worst(found, float(logits[kept].detach().abs().max()))


def _worst(found: list[tuple[str, Tensor, Tensor, Tensor]], loudest: float) -> str | None:
    largest = max((float(want.detach().abs().max()) for _, _, want, _ in found[1:]), default=0.0)
    for name, got, want, near in found:
        eps = torch.finfo(got.dtype).eps
        size = float(want.detach().abs().max()) if name == "output" else largest
        error = float((near.detach().double() - want.detach().double()).abs().max())
        bound = 8 * (error + size * (eps + loudest * torch.finfo(torch.float32).eps))
        worst = float((got.detach().double() - want.double()).abs().nan_to_num(math.inf).max())
        if not worst <= bound:
            return f"{name} is off by {worst:.3g}, allowed {bound:.3g}"
    return None


def _define(own: list[Tensor], logits: Tensor, kept: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention over the kept pairs; in half precision logits are float32 and weights rounded, as kernels have them."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = (x.to(wide) for x in own[:3])
    k, v = _repeated(k, v)
    products = q @ k.mT * DIM**-0.5
    shift = (logits - products.detach().double()).to(wide)  # what a mask adds
    weights = torch.softmax((products + shift).masked_fill(~kept, -math.inf), -1)
    weights = torch.where(kept, weights, 0.0)
    return weights @ v if dtype == torch.float64 else (weights.to(dtype) @ v.to(dtype))


@torch.no_grad()
def _support(call: Callable[..., Tensor], given: list[Tensor]) -> Tensor:
    """Pairs with a weight (B, H, L, S), from outputs for one-hot values."""
    q, k, v, *rest = given
    found, S = [], k.shape[2]
    for start in range(0, S, DIM):
        hot = torch.zeros_like(v)
        width = min(DIM, S - start)
        places = torch.arange(width, device=v.device)
        hot[:, :, start + places, places] = 1.0
        found.append(call(q, k, hot, *rest) > 0)
    return torch.cat(found, -1)[..., :S]
