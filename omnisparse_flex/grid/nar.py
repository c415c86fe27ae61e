"""NAR: a grid of tokens generated shell by shell from its origin, and trained by one forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from omnisparse_flex.errors import require
from omnisparse_flex.grid.attention_mask import attention_of, in_form
from omnisparse_flex.grid.guidance import guided
from omnisparse_flex.grid.neighbor_heads import NeighborHeads
from omnisparse_flex.grid.slots import Slots, check_cache
from omnisparse_flex.masks._checks import check_int_map
from omnisparse_flex.masks.near_to_far import near_to_far, near_to_far_order
from omnisparse_flex.model.cache_argument import as_cache_argument
from omnisparse_flex.types import MaskMod

#: ``(raster places (M,), logits (B, M, V)) -> logits``.
Processor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class NAROutput:
    """What ``nar_generate`` returns.

    Attributes:
        tokens: int64 ``(B, frames * rows * columns)``, in raster order.
        forwards: Calls of the decoder: one for each shell.
    """

    tokens: Tensor
    forwards: int


def nar_logits(decoder: Any, heads: NeighborHeads, tokens: Tensor, condition: Tensor) -> Tensor:
    """The logits from which ``nar_generate`` draws each token of a given grid: one forward.

    Args:
        decoder: A decoder of transformers without its head, such as ``LlamaModel``. One with axes in its rotary
            embedding (Qwen2.5-VL's) gets a token's frame, row and column; any other its raster index.
        heads: The heads made for it.
        tokens: int64 ``(B, frames * rows * columns)``, in raster order.
        condition: int64 ``(B, P)``, ids of the decoder's embedding, at least one; causal, and does not see the grid.

    Returns:
        ``(B, frames * rows * columns, V)``, in raster order.

    Raises:
        ConfigError: If a shape does not fit, or the decoder's attention takes no mask.

    Source: NAR, arXiv 2503.10696, section 3. Our choice: tokens lie in shell order, in which FlexAttention skips
    up to half of the blocks; the result is the same.
    """
    prefix, size = _checked(decoder, heads, condition), torch.Size(heads.grid).numel()
    check_int_map("tokens", tokens, "(B, N)")
    expected = (len(condition), size)
    require(tuple(tokens.shape) == expected, "tokens", f"have the shape {expected}", tuple(tokens.shape))
    device = tokens.device
    order = near_to_far_order(*heads.grid, device=device)
    lies = torch.cat([torch.arange(prefix, device=device), prefix + order])
    mask_mod = near_to_far(prefix, *heads.grid, device, order="shells")
    attention = attention_of(decoder.config.get_text_config(decoder=True))
    mask = in_form(attention, mask_mod, 1, len(lies), len(lies), device, decoder.dtype)
    ids = torch.cat([condition, tokens], dim=1)[:, lies]
    positions = _positions(decoder, heads, prefix, device)[..., lies]
    states = _states(decoder, heads, ids, mask, positions, use_cache=False)
    sources = heads.sources(prefix, device)
    logits: Tensor = heads(states, torch.where(sources >= 0, lies.argsort()[sources], -1))
    return logits


def nar_loss(decoder: Any, heads: NeighborHeads, tokens: Tensor, condition: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of the mixed logits over every token of the grid.

    Args:
        decoder: As ``nar_logits`` takes it, like the next three.
        heads: The heads made for it.
        tokens: int64 ``(B, N)``.
        condition: int64 ``(B, P)``.
        reduction: ``"mean"``, or ``"none"`` for each token's.

    Returns:
        In nats: a scalar, or ``(B, N)``, whose sum is a grid's exact negative log-likelihood, for tokens of a shell
        are independent given the nearer shells.

    Raises:
        ConfigError: As ``nar_logits``, or for an unknown ``reduction``.

    Source: NAR, arXiv 2503.10696: one loss on the mixed logits, none for each head.
    """
    require(reduction in ("mean", "none"), "reduction", "be one of mean, none", reduction)
    logits = nar_logits(decoder, heads, tokens, condition)
    return F.cross_entropy(logits.movedim(-1, 1).float(), tokens, reduction=reduction)


@torch.no_grad()
def nar_generate(
    decoder: Any,
    heads: NeighborHeads,
    condition: Tensor,
    *,
    unconditional: Tensor | None = None,
    guidance_scale: float = 1.0,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    logits_processor: Processor | None = None,
    cache: Any = None,
) -> NAROutput:
    """Generate a grid in one forward for each shell: ``frames + rows + columns - 2``.

    Args:
        decoder: As ``nar_logits`` takes it.
        heads: The heads made for it.
        condition: int64 ``(B, P)``, as ``nar_logits`` takes it.
        unconditional: int64 ``(B, P)``, the same without a condition; both run in one batch.
        guidance_scale: Of ``unconditional``; 1: no guidance.
        do_sample: Draw from torch's generator, or take the most probable tokens.
        temperature: Divides the logits, above 0.
        top_k: Draw among so many symbols; None: all.
        logits_processor: ``(raster places (M,), logits (B, M, V)) -> logits``, after guidance.
        cache: An empty KV cache, dynamic or static; None: a DynamicCache.

    Returns:
        Tokens in raster order, and the number of forwards.

    Raises:
        ConfigError: If a shape does not fit, guidance lacks ``unconditional``, a number is out of its range, the
            cache is used or too small, or the decoder's attention takes no mask.

    Source: NAR, arXiv 2503.10696, section 3 (shells), guidance of the mixed logits. Our choice: keys lie in shell
    order in the cache, each with its own position; the last shell is never fed.
    """
    prefix, device = _checked(decoder, heads, condition), condition.device
    require(temperature > 0, "temperature", "be above 0", temperature)
    require(top_k is None or top_k > 0, "top_k", "be at least 1", top_k)
    rows = condition
    if guidance_scale != 1.0:
        shape = None if unconditional is None else tuple(unconditional.shape)
        require(shape == tuple(condition.shape), "unconditional", f"have the shape {tuple(condition.shape)}", shape)
        rows = torch.cat([condition, unconditional]) if unconditional is not None else condition
    shells = _Shells(decoder, heads, rows, cache)
    grid = condition.new_zeros(len(condition), torch.Size(heads.grid).numel())
    fed, ids = torch.arange(prefix, device=device), rows
    for places in shells.places:
        logits = shells.logits(fed, ids, places)
        logits = logits if guidance_scale == 1.0 else guided(logits, guidance_scale)
        logits = logits if logits_processor is None else logits_processor(places, logits)
        grid[:, places] = _picked(logits.float() / temperature, do_sample, top_k)
        fed, ids = prefix + places, grid[:, places].repeat(len(rows) // len(grid), 1)
    return NAROutput(grid, shells.forwards)


class _Shells:
    """A decoder that is fed one shell at a time."""

    def __init__(self, decoder: Any, heads: NeighborHeads, condition: Tensor, cache: Any) -> None:
        from transformers import DynamicCache

        self._decoder, self._heads, self._prefix = decoder, heads, condition.shape[1]
        config = decoder.config.get_text_config(decoder=True)
        self._attention, device = attention_of(config), condition.device
        self._cache = DynamicCache(config=config) if cache is None else cache
        order = near_to_far_order(*heads.grid, device=device)
        length, needed = check_cache(self._cache), self._prefix + len(order) - 1
        require(length is None or length >= needed, "cache", f"have at least {needed} slots", length)
        rank = sum(torch.meshgrid([torch.arange(extent) for extent in heads.grid], indexing="ij"))
        self.places: Sequence[Tensor] = order.split(torch.as_tensor(rank).flatten().bincount().tolist())
        self._slots = Slots(torch.ones_like(condition, dtype=torch.bool), len(order), self._cache)
        self._positions = _positions(decoder, heads, self._prefix, device)
        self._sources = heads.sources(self._prefix, device)
        self.forwards = 0

    def logits(self, fed: Tensor, ids: Tensor, places: Tensor) -> Tensor:
        """Feed ``ids`` ``(B, Q)`` at ``fed`` ``(Q,)`` of the sequence; mixed logits ``(B, M, V)`` of ``places``."""
        # All tokens of a shell have one place in the order of arrival: they see one another, and all before.
        rank = self._prefix + self.forwards
        seen: MaskMod = self._slots.prompt() if self.forwards == 0 else self._slots.add([rank] * len(fed))
        keys, dtype = self._slots.keys, self._decoder.dtype
        mask = in_form(self._attention, seen, len(ids), len(fed), keys, ids.device, dtype)
        cache = as_cache_argument(self._decoder.forward, self._cache)
        positions = self._positions[..., fed]
        states = _states(self._decoder, self._heads, ids, mask, positions, use_cache=True, **cache)
        self.forwards += 1
        local = torch.full((self._positions.shape[-1],), -1, device=ids.device)
        local[fed] = torch.arange(len(fed), device=ids.device)
        sources = self._sources[:, places]
        logits: Tensor = self._heads(states, torch.where(sources >= 0, local[sources], -1))
        return logits


def _checked(decoder: Any, heads: NeighborHeads, condition: Tensor) -> int:
    """Tokens of the condition."""
    attention_of(decoder.config.get_text_config(decoder=True))
    check_int_map("condition", condition, "(B, P)")
    require(condition.shape[1] > 0, "condition", "have at least one token", tuple(condition.shape))
    known = isinstance(heads, NeighborHeads)
    require(known, "heads", "be NeighborHeads", type(heads).__name__)
    return condition.shape[1]


def _positions(decoder: Any, heads: NeighborHeads, prefix: int, device: torch.device) -> Tensor:
    """int64 ``(1, P + N)``, or ``(3, 1, P + N)`` where the rotary embedding has axes: frame, row and column."""
    size = torch.Size(heads.grid).numel()
    rope = getattr(decoder.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    if "mrope_section" not in rope:
        return torch.arange(prefix + size, device=device)[None]
    axes = torch.meshgrid([torch.arange(extent, device=device) for extent in heads.grid], indexing="ij")
    grid = prefix + torch.stack([axis.flatten() for axis in axes])
    return torch.cat([torch.arange(prefix, device=device).expand(3, -1), grid], dim=1)[:, None]


def _states(
    decoder: Any, heads: NeighborHeads, ids: Tensor, mask: Tensor | BlockMask, positions: Tensor, **cache: Any
) -> list[Tensor]:
    """What the heads read of one forward."""
    positions = positions.expand(*positions.shape[:-2], len(ids), -1)
    output = decoder(
        input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True, return_dict=True, **cache
    )
    return heads.states(output.hidden_states)


def _picked(logits: Tensor, do_sample: bool, top_k: int | None) -> Tensor:
    """int64 ``(B, M)``."""
    if not do_sample:
        return logits.argmax(dim=-1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = torch.softmax(logits, dim=-1)
    return torch.stack([torch.multinomial(rows, 1)[:, 0] for rows in probabilities.unbind(dim=1)], dim=1)
