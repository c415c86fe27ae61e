"""Run a model under one recall target per layer, and read the true recall and density."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from omnisparse_flex.api import apply_omnisparse, remove_omnisparse
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.errors import ConfigError
from omnisparse_flex.model.compiled_module import CompiledDecoder, compiled_decoder_of
from omnisparse_flex.model.decoder_facts import head_shapes
from omnisparse_flex.stats import Stats

Batch = Mapping[str, Any] | tuple[Any, ...] | list[Any] | Tensor


@contextlib.contextmanager
def prepared(model: nn.Module, config: OmniSparseConfig | None, target: float) -> Iterator[CompiledDecoder]:
    """Change the model and set it to eval mode; restore it afterwards, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    installed = compiled_decoder_of(model)
    if installed is None:
        apply_omnisparse(model, probed_rules(config or OmniSparseConfig(), target))
    entry = compiled_decoder_of(model)
    assert entry is not None
    recall, visual = entry.state.recall, entry.state.visual
    try:
        model.eval()
        yield entry
    finally:
        entry.state.recall, entry.state.visual = recall, visual
        for module, training in modes:
            module.training = training
        if installed is None:
            remove_omnisparse(model)


def probed_rules(rules: OmniSparseConfig, target: float) -> OmniSparseConfig:
    """Rules for probing: dense layers stay dense, the others read their target at run time."""
    probed = tuple(1.0 if recall == 1 else target for recall in rules.recalls)
    return dataclasses.replace(rules, target_recall=probed if len(probed) > 1 else probed[0])


def require_length(entry: CompiledDecoder, batches: list[Batch]) -> None:
    """Refuse, before anything is compiled, batches that are known to be too short to run sparsely."""
    lengths = [
        max((batch[name].shape[1] for name in ("input_ids", "inputs_embeds") if batch.get(name) is not None), default=0)
        for batch in batches
        if isinstance(batch, Mapping)
    ]
    are_known = len(lengths) == len(batches) and all(lengths)
    shortest = min_queries(entry)
    if are_known and (shortest is None or max(lengths) < shortest):
        raise ConfigError(f"batches must {longer(shortest)}, got at most {max(lengths)}")


def min_queries(entry: CompiledDecoder) -> int | None:
    """Queries below which the module stays dense; None: it always does."""
    shapes = head_shapes(getattr(entry.module, "config", None))
    return entry.backend.min_queries(device_of(entry), shapes[-1] if shapes else None)


def longer(shortest: int | None) -> str:
    """The rule that too short batches break."""
    if shortest is None:
        return "run with min_seq_len = 0 (an option of apply_omnisparse), because these rules pay at no length"
    return f"hold at least min_seq_len = {shortest} tokens (an option of apply_omnisparse)"


def device_of(entry: CompiledDecoder) -> torch.device:
    """Where the module's parameters are."""
    parameter = next(entry.module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def run_batch(model: nn.Module, entry: CompiledDecoder, batch: Batch) -> None:
    """One forward on the model's device."""
    device = device_of(entry)

    def moved(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else x

    if isinstance(batch, Tensor):
        model(moved(batch))
        return
    if not isinstance(batch, Mapping):
        model(*(moved(x) for x in batch))
        return
    inputs = {name: moved(x) for name, x in batch.items()}
    if "labels" not in inputs and "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs.setdefault("logits_to_keep", 1)  # the logits of a long text would need more memory than the model
    model(**inputs)


class Probe:
    """Runs all batches under one target per layer, and reads the true recall and density.

    Attributes:
        layers: Number of layers.
        sparse: bool (layers,), those that ran sparsely in some batch; known after the first call.
    """

    def __init__(
        self,
        model: nn.Module,
        entry: CompiledDecoder,
        stats: Stats,
        batches: list[Batch],
        progress: Callable[[str], None] | None,
    ) -> None:
        self.model, self.entry, self.stats, self.batches = model, entry, stats, batches
        self.progress = progress or (lambda line: None)
        self.layers = stats.layers
        self.rounds = 0
        self.sparse = torch.zeros(self.layers, dtype=torch.bool)

    def __call__(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Run.

        Args:
            targets: float64 (layers,), from 1 on a layer keeps every block of its active rows.

        Returns:
            float64 (layers,) each: true mean recall of the worst head, and density; means over batches.
        """
        self.rounds += 1
        self.progress(f"calibration round {self.rounds}, {len(self.batches)} batches")
        # Compiled code reads the targets by reference, so a probe compiles nothing. Rows beyond the layers are unused.
        recall = torch.ones_like(self.entry.state.recall)
        recall[: self.layers] = targets.to(recall)
        self.entry.state.recall = recall
        worst, density, ran = (torch.zeros(self.layers, dtype=torch.float64) for _ in range(3))
        recalls: dict[int, Tensor] = {}
        for batch in self.batches:
            self.stats.raw.zero_()
            run_batch(self.model, self.entry, batch)
            for measured in self.stats.per_layer():
                heads = torch.tensor(measured.true_recall, dtype=torch.float64)
                recalls[measured.layer] = recalls.get(measured.layer, 0) + heads
                density[measured.layer] += measured.density
                ran[measured.layer] += 1
        for layer, total in recalls.items():
            worst[layer] = (total / ran[layer]).min()
        self.sparse = ran > 0
        return worst, density / ran.clamp(min=1)
