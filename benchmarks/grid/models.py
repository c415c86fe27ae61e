"""The decoders of the comparison, all of one size, trained on the same batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.grid.glyphs import DARK, SIDE, START, VOCAB, batches
from omnisparse_flex.grid import NeighborHeads, nar_loss, zipar_loss

GRID = (SIDE, SIDE)


@dataclass(frozen=True)
class Size:
    """A decoder, and its training."""

    layers: int
    width: int
    batch: int
    steps: int
    rate: float = 2e-3


def llama(size: Size, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.width // 16),
        bos_token_id=START,
        eos_token_id=None,
        pad_token_id=DARK,
    )
    return LlamaForCausalLM(config)


def with_start(glyphs: Tensor) -> Tensor:
    """(B, 1 + 256): every grid follows one start token."""
    return nn.functional.pad(glyphs, (1, 0), value=START)


def zipar_nats(model: LlamaForCausalLM, glyphs: Tensor, window: int | Tensor | None, reduction: str = "mean") -> Tensor:
    return zipar_loss(model, with_start(glyphs), GRID, window, eol=False, reduction=reduction)


def nar_nats(model: LlamaForCausalLM, heads: NeighborHeads, glyphs: Tensor, reduction: str = "mean") -> Tensor:
    condition = torch.full((len(glyphs), 1), START, device=glyphs.device)
    return nar_loss(model.model, heads, glyphs, condition, reduction)


def train(modules: nn.Module, loss: Callable[[Tensor], Tensor], glyphs: Tensor, size: Size, seed: int) -> None:
    """AdamW with a linear warm-up over a tenth of the steps and a cosine to 0."""
    optimizer = torch.optim.AdamW(modules.parameters(), lr=size.rate, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, size.rate, total_steps=size.steps, pct_start=0.1)
    for batch in batches(glyphs, size.batch, size.steps, seed):
        loss(batch).backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    modules.eval()


def raster_model(glyphs: Tensor, size: Size, seed: int, window: int | None) -> LlamaForCausalLM:
    """Trained in raster order (``window=16``), or under a window drawn anew for each batch (None)."""
    model = llama(size, seed).to(glyphs.device)
    train(model, lambda batch: zipar_nats(model, batch, window), glyphs, size, seed)
    return model


def nar_model(glyphs: Tensor, size: Size, seed: int) -> tuple[LlamaForCausalLM, NeighborHeads]:
    """The same decoder with a head for each axis."""
    model = llama(size, seed).to(glyphs.device)
    heads = NeighborHeads(model.model, 2, GRID)
    train(nn.ModuleList([model.model, heads]), lambda batch: nar_nats(model, heads, batch), glyphs, size, seed)
    return model, heads
