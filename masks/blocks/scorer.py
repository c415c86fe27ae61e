"""What a scorer takes and owes: the estimated mass of blocks; the budget and the choice are made from it elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Scorer(Protocol):
    """A function of this signature, traceable and without a tensor over queries x keys; ``SCORERS`` lists them."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        some: Tensor,
        *,
        scale: float,
        block: int,
        key_block: int,
        adjust: Callable[..., Tensor] | None,
        allowed: Callable[..., Tensor],
        live: Tensor | None = None,
    ) -> Tensor:
        """Estimated attention mass that each query block gives to each key block.

        Args:
            query: (B, Hq, L, D).
            key: (B, Hkv, S, D).
            some: bool (B or 1, Hq or 1, NQ, NK); blocks with no allowed pair get zero mass.
            scale: Logit scale.
            block: Tokens per query block.
            key_block: Tokens per key block.
            adjust: The model's own change of the logits (bias, soft cap), (..., B, Hq, NQ, NK) -> the same shape; at
                the positions ``q`` and ``kv`` where they are given, else over whole blocks; or None.
            allowed: The model's mask, ``(b, h, q, kv) -> bool`` over broadcastable indices.
            live: bool (B, S), keys that the mask leaves of the sequence; the others must not enter a mean. None: all.

        Returns:
            float32 (B, Hq, NQ, NK): the mean over the rows of logits that stand for a query block; a row sums to 1,
            or to 0 where nothing is allowed.
        """
