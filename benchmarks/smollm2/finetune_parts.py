"""Pieces of the fine-tuning experiment: the split of the texts, one training run, one look at held-out text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.video_needle.controls import match_density
from omnisparse_flex.errors import require
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from omnisparse_flex.stats import Stats

#: Share of each text, at its end, that no training sees.
HELD_OUT = 0.25
#: Length of the token runs whose repetition in training text is counted.
RUN = 32
#: Positions whose vocabulary-wide logits are in memory at once.
VOCABULARY_ROWS = 2048


def split(
    texts: dict[str, Tensor], tokens: int, most: int, further: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[Tensor], float]:
    """Training text, and windows of held-out text.

    Args:
        texts: int32 token ids by source.
        tokens: Length of a window.
        most: Most windows of a text.
        further: Token ids by source, for training alone.

    Returns:
        ``(training, windows, repeated)``: ids by source; int64 (tokens,) windows; share of the held-out runs of
        ``RUN`` tokens that training text holds too (manuals repeat themselves).

    Raises:
        ConfigError: If a text is too short for a window on either side.
    """
    training, held, windows = {name: ids.long() for name, ids in further.items()}, [], []
    for name, ids in texts.items():
        cut = len(ids) - max(tokens, int(HELD_OUT * len(ids)) // tokens * tokens)
        require(cut > tokens, "tokens", f"leave a training window of the text {name}", tokens)
        training[name] = ids[:cut].long()
        held.append(ids[cut:].long())
        windows += list(held[-1][: len(held[-1]) // tokens * tokens].split(tokens))[:most]
    known = torch.cat([_runs(ids) for ids in training.values()])
    own = torch.cat([_runs(ids) for ids in held])
    return training, windows, torch.isin(own, known).double().mean().item()


def _runs(ids: Tensor) -> Tensor:
    """A number for each run of ``RUN`` tokens, int64: the same for the same tokens, hardly ever for others."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (RUN,), generator=generator) | 1
    return torch.stack([factor * ids[i : len(ids) - RUN + 1 + i] for i, factor in enumerate(factors)]).sum(0)


def batch_of(training: dict[str, Tensor], tokens: int, step: int, size: int) -> Tensor:
    """Random windows of random texts, longer texts more often; a function of the step. int64 (size, tokens)."""
    generator = torch.Generator().manual_seed(step)
    names = sorted(training)
    weights = torch.tensor([float(len(training[name])) for name in names])
    rows = []
    for pick in torch.multinomial(weights, size, replacement=True, generator=generator).tolist():
        ids = training[names[pick]]
        start = int(torch.randint(len(ids) - tokens + 1, (), generator=generator))
        rows.append(ids[start : start + tokens])
    return torch.stack(rows)


class FineTuning:
    """AdamW with warm-up and cosine on one model; stops at a time, goes on from a file."""

    def __init__(self, model: nn.Module, steps: int, lr: float, rows: int) -> None:
        """Begin.

        Args:
            model: Float32 weights; computes in bfloat16 on a GPU.
            steps: Optimizer steps of the whole run.
            lr: Peak learning rate.
            rows: Windows of an optimizer step, one after the other.
        """
        self.model, self.steps, self.lr, self.rows = model, steps, lr, rows
        model.train().requires_grad_(True)
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=self.device.type == "cuda"
        )
        self.history: list[dict[str, float]] = []

    @property
    def done(self) -> int:
        """Optimizer steps so far."""
        return len(self.history)

    def run(
        self, training: dict[str, Tensor], tokens: int, deadline: float, after: Callable[[], None] = lambda: None
    ) -> bool:
        """Train; whether the run is complete at the deadline (``time.monotonic``). ``after`` is called after a step."""
        while self.done < self.steps and time.monotonic() < deadline:
            began = time.perf_counter()
            step = self.done
            warm = min(1.0, (step + 1) / max(1, self.steps // 20))
            rate = self.lr * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))
            self.optimizer.param_groups[0]["lr"] = rate
            loss = 0.0
            for row in batch_of(training, tokens, step, self.rows).to(self.device).split(1):
                part = loss_of(self.model, row).mean() / self.rows
                part.backward()
                loss += float(part.detach())
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            after()
            self.history.append({"loss": loss, "lr": rate, "seconds": time.perf_counter() - began})
            if self.done % 20 == 0 or self.done == 1:
                print(f"    step {self.done} of {self.steps}: loss {loss:.4f}", flush=True)
        return self.done >= self.steps

    def save(self, path: Path) -> None:
        """Everything that ``load`` needs; the optimizer only while the run is not complete."""
        path.parent.mkdir(parents=True, exist_ok=True)
        optimizer = self.optimizer.state_dict() if self.done < self.steps else None
        torch.save({"model": weights(self.model), "optimizer": optimizer, "history": self.history}, path)

    def load(self, path: Path) -> None:
        """Go on where ``save`` was called."""
        saved = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(saved["model"])
        if saved["optimizer"] is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
        self.history = saved["history"]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights, on the CPU."""
    return {name: x.detach().cpu().clone() for name, x in model.state_dict().items()}


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Negative log-likelihood of each token but the first.

    Args:
        model: A Llama model of transformers.
        ids: int64 (1, N).

    Returns:
        float32 (N - 1,), nats.
    """
    on_gpu = ids.device.type == "cuda"
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=on_gpu):
        hidden = model.model(ids, use_cache=False).last_hidden_state[0, :-1]
        parts = []
        for rows, wanted in zip(hidden.split(VOCABULARY_ROWS), ids[0, 1:].split(VOCABULARY_ROWS), strict=True):
            parts.append(F.cross_entropy(model.lm_head(rows).float(), wanted, reduction="none"))
    return torch.cat(parts)


@torch.no_grad()
def perplexity_parts(model: nn.Module, windows: list[Tensor]) -> list[float]:
    """Mean negative log-likelihood of each window, nats a token."""
    device = next(model.parameters()).device
    model.eval()
    return [float(loss_of(model, window[None].to(device)).mean()) for window in windows]


def target_for(model: nn.Module, stats: Stats, window: Tensor, density: float, dense_layers: int) -> float:
    """Set the target recall of the sparse layers so that one window is kept at a whole-model density.

    The targets are an input of the compiled graph: nothing is compiled again.

    Raises:
        ConfigError: If what is always kept is more than that.
    """
    least = density_at(model, stats, window, 1e-3, dense_layers)
    require(least <= density, "densities", f"be above what is always kept, {least:.3f}", density)
    # ``match_density`` keeps at least what is wanted; a target below it is what a budget allows.
    target = match_density(lambda x: density_at(model, stats, window, x, dense_layers), density, tries=9)
    target = max(1e-3, target - 2**-9)
    set_targets(model, target, dense_layers)
    return target


def density_at(model: nn.Module, stats: Stats, window: Tensor, target: float, dense_layers: int) -> float:
    """Whole-model density of one window under a target recall."""
    set_targets(model, target, dense_layers)
    perplexity_parts(model, [window])
    return stats.density


def set_targets(model: nn.Module, target: float, dense_layers: int) -> None:
    """Change the run-time targets of every layer that is not statically dense."""
    entry = compiled_decoder_of(model)
    assert entry is not None
    entry.state.recall[dense_layers:] = target
