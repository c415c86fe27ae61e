"""Tolerances derived from the float64 oracle; public through ``omnisparse_flex.testing``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from omnisparse_flex.testing.oracle import dense_attention, dense_logits

_NAMES = ("output", "gradient of query", "gradient of key", "gradient of value")


def tolerance(
    expected: Tensor, dtype: torch.dtype, trusted: Tensor, *, magnitude: float | None = None, factor: float = 4.0
) -> float:
    """How far from the oracle a correct implementation may be: measured, not guessed.

    Args:
        expected: The oracle's result, in float64.
        dtype: What the implementation under test computes in.
        trusted: The result of a trusted dense implementation in ``dtype``.
        magnitude: Size of the numbers that were summed, where terms may cancel; None: the
            largest of ``expected``.
        factor: Slack for another order of summation.

    Returns:
        ``factor * (largest error of trusted + eps(dtype) * magnitude)``, a bound of the
        absolute error.

    Our choice: ``factor`` 4. Over 1500 random shapes in float32 and bfloat16, rows with a
    single key included, the CPU flash kernel and a log-sum-exp softmax stay under 2 times
    the bracket that ``assert_close_to_oracle`` uses.
    """
    error = float((trusted.double() - expected).abs().max())
    size = float(expected.abs().max()) if magnitude is None else magnitude
    return factor * (error + torch.finfo(dtype).eps * size)


def assert_close_to_oracle(
    actual: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    grad_output: Tensor | None = None,
    factor: float = 4.0,
    **oracle: Any,
) -> None:
    """Check an attention output, and its gradients on request, against the float64 oracle.

    The tolerance is ``tolerance`` with SDPA's math kernel in the dtype of ``actual`` as the
    trusted implementation (the oracle itself in that dtype where SDPA lacks the feature).

    Args:
        actual: ``(B, Hq, L, Dv)``, what the implementation under test returned.
        query: ``(B, Hq, L, D)``, its input.
        key: ``(B, Hkv, S, D)``.
        value: ``(B, Hkv, S, Dv)``.
        mask: Bool, broadcastable to ``(B, Hq, L, S)``; None: every pair is allowed.
        grad_output: Like ``actual``; if given, the gradients of ``query``, ``key`` and
            ``value`` through ``actual`` are checked too, and all three must require grad.
        factor: See ``tolerance``.
        **oracle: ``bias``, ``score_mod``, ``scale``, ``softcap``, ``sinks`` of ``dense_attention``.

    Raises:
        AssertionError: If a value is off by more than the tolerance or not finite, or a
            row without an allowed key is not exactly 0.
    """

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense_attention(q, k, v, mask=mask, **oracle)

    def trusted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if oracle.keys() <= {"scale"}:
            with sdpa_kernel(SDPBackend.MATH):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, **oracle)
        return dense_attention(q, k, v, mask=mask, dtype=actual.dtype, **oracle)

    inputs = (query, key, value)
    given = [actual.detach()]
    if grad_output is not None:
        given += torch.autograd.grad(actual, inputs, grad_output, retain_graph=True)
    wanted = _results(exact, inputs, torch.float64, grad_output)
    rivals = _results(trusted, inputs, actual.dtype, grad_output)
    gradient_size = max((float(gradient.abs().max()) for gradient in wanted[1:]), default=0.0)
    sizes = (float(value.detach().abs().max()), *[gradient_size] * 3)
    spread = _softmax_spread(query, key, oracle.get("scale"), actual.dtype)
    for name, got, want, rival, size in zip(_NAMES, given, wanted, rivals, sizes, strict=False):
        _assert_within(name, got, want, tolerance(want, actual.dtype, rival, magnitude=size * spread, factor=factor))
    if mask is not None:
        dead = ~mask.expand(*actual.shape[:3], key.shape[2]).any(dim=-1)
        if given[0][dead].count_nonzero():
            raise AssertionError("output must be exactly 0 in rows without an allowed key")


def _softmax_spread(query: Tensor, key: Tensor, scale: float | None, dtype: torch.dtype) -> float:
    """Relative error of ``exp(logit - lse)`` in roundings of ``dtype``: one, plus those of the largest logit.

    Kernels that recompute the weights from the log-sum-exp make it even where a softmax
    over one key is exactly 1. Logits are kept in float32 or better.
    """
    logits = dense_logits(query.detach(), key.detach(), scale)
    logit_dtype = dtype if torch.finfo(dtype).bits >= 32 else torch.float32
    return 1.0 + float(logits.abs().max()) * torch.finfo(logit_dtype).eps / torch.finfo(dtype).eps


def _results(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    grad_output: Tensor | None,
) -> list[Tensor]:
    """The output of ``attend`` on copies of ``inputs`` in ``dtype``, then their gradients if asked for."""
    q, k, v = (tensor.detach().to(dtype).requires_grad_(grad_output is not None) for tensor in inputs)
    output = attend(q, k, v)
    if grad_output is None:
        return [output]
    return [output.detach(), *torch.autograd.grad(output, (q, k, v), grad_output.to(output.dtype))]


def _assert_within(name: str, actual: Tensor, expected: Tensor, bound: float) -> None:
    if actual.shape != expected.shape:
        raise AssertionError(f"{name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    error = (actual.double() - expected).abs()
    bad = ~(error <= bound)  # a NaN is not within anything
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{name} differs from the oracle at {at}: got {actual[at]:.6g}, expected {expected[at]:.6g}; "
            f"{int(bad.sum())} of {bad.numel()} values are off by more than {bound:.3g}, at most {error.max():.3g}"
        )
