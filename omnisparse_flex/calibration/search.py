"""``calibrate``: from the recall that a user wants to the per-layer targets whose *true* recall reaches it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from omnisparse_flex.calibration.probe import Batch, Probe, longer, min_queries, prepared, require_length, run_batch
from omnisparse_flex.calibration.result import Calibration, LayerTarget
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.errors import ConfigError, require
from omnisparse_flex.model.compiled_module import CompiledDecoder, compiled_decoder_of
from omnisparse_flex.model.decoder_facts import head_shapes
from omnisparse_flex.model.switches import DISABLE_VARIABLE, is_disabled
from omnisparse_flex.stats import collect_stats

#: Share of the allowed loss that is kept in reserve: for 0.9, every head must reach 0.915 on the batches. Heads attend
#: to other keys in other texts, so a target that one text meets exactly is missed by some heads in another. The reserve
#: is proportional to the loss, so that the raised target stays under 1. Our choice, from a trial on nine layers of
#: SmolLM2; the record of benchmarks/smollm2/calibration_transfer.py is still to come.
RESERVE = 0.15
#: A layer that would keep more of its blocks is dense. Source: break-even with the fastest dense kernel is near 0.65 on
#: the CPU (benchmarks/results/prefill_cpu.json: 1.24 to 1.43 times faster at 0.5) as on the H200 with Triton.
MAX_DENSITY = 0.6
#: The search goes over u in [0, HIGHEST], target = 1 - 2**-u: even steps of the *loss*, as true recall answers to it.
HIGHEST = 10.0
#: Halvings of that range.
HALVINGS = 6
#: Rounds in which layers that fall short once all have their final targets are raised, each step twice the last.
REPAIRS = 4
#: The lowest target of a config: a layer with it keeps only its sinks, window and text.
LOWEST = 0.01


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    target_recall: float,
    *,
    config: OmniSparseConfig | None = None,
    progress: Callable[[str], None] | None = None,
) -> OmniSparseConfig:
    """Rules whose true recall meets ``target_recall`` in every layer and head, on data like ``batches``.

    Layers that cannot meet it, or would keep too much to pay, get 1.0 = dense; the report
    of a model that the config is applied to names them.

    Args:
        model: A transformers model or a plain module. One that ``apply_omnisparse`` changed is
            calibrated under its own rules and options; another is changed for the time being. It
            is left as it was, its own rules included.
        batches: Inputs like those to come: keyword arguments as a mapping, positional ones as a
            tuple or list, or one tensor. Kept in memory, and run about ten times.
        target_recall: Softmax mass that each head must truly keep, mean over sampled rows, in (0, 1).
        config: The rules to calibrate, for a model that is not changed yet; None: the default.
        progress: Called with a line of text before every round.

    Returns:
        The rules with one ``target_recall`` per layer, for ``apply_omnisparse(model, config)``.

    Raises:
        ConfigError: On a user's mistake, or if no batch is long enough for sparse attention.

    Source: PAPER "KV selection" keeps the recall of the *estimate*; how far that is from the truth is not
    said there. Our choice: measure the truth, and search for the target of each layer that gives it.
    """
    return run_calibration(model, batches, target_recall, config=config, progress=progress).config


@torch.no_grad()
def run_calibration(
    model: nn.Module,
    batches: Iterable[Batch],
    target_recall: float,
    *,
    config: OmniSparseConfig | None = None,
    progress: Callable[[str], None] | None = None,
) -> Calibration:
    """``calibrate``, with what was measured on the way; same arguments, same errors."""
    listed = _checked(model, batches, target_recall, config)
    changed = compiled_decoder_of(model) is not None
    with prepared(model, config, target_recall) as entry:
        require_length(entry, listed)
        if not head_shapes(getattr(entry.module, "config", None)):
            run_batch(model, entry, listed[0])  # only a graph tells how many heads a plain module has
        with collect_stats(model, exact=True) as stats:
            result = _search(Probe(model, entry, stats, listed, progress), target_recall)
        if changed:
            entry.backend.log.notes[f"calibrated for a recall of {target_recall}: {result.named_dense()}"] = None
    if len(result.dense) == len(result.layers):
        warnings.warn(f"omnisparse: calibration leaves every layer dense at a recall of {target_recall}", stacklevel=3)
    return result


def _checked(model: Any, batches: Any, target: Any, config: Any) -> list[Batch]:
    """Check all arguments, and return the batches as a list."""
    require(isinstance(model, nn.Module), "model", "be an nn.Module", type(model).__name__)
    real = isinstance(target, (int, float)) and not isinstance(target, bool)
    require(real and 0 < target < 1, "target_recall", "be in (0, 1)", target)
    require(config is None or isinstance(config, OmniSparseConfig), "config", "be an OmniSparseConfig or None", config)
    single = isinstance(batches, (Mapping, Tensor, str)) or not isinstance(batches, Iterable)
    require(not single, "batches", "be an iterable of batches", type(batches).__name__)
    entry = compiled_decoder_of(model)
    rule = "be left out for a model that apply_omnisparse changed: its own rules are calibrated"
    require(entry is None or config is None, "config", rule, config)
    rules = config or (OmniSparseConfig() if entry is None else entry.backend.config)
    require(isinstance(rules.budget, str), "budget", "follow target_recall to be calibrated", rules.budget)
    # A follower's recall would follow from its lead's target, which the search sets by the lead's recall alone.
    require(any(x < 1 for x in rules.recalls), "target_recall", "leave a layer sparse in the rules", rules.recalls)
    require(not is_disabled(), DISABLE_VARIABLE, "be unset or 0", "1")
    listed = list(batches)
    require(len(listed) > 0, "batches", "hold at least one batch", listed)
    for batch in listed:
        kinds = isinstance(batch, (Mapping, tuple, list, Tensor))
        require(kinds, "batches", "hold mappings, tuples, lists or tensors", type(batch).__name__)
    return listed


def _search(probe: Probe, target_recall: float) -> Calibration:
    """Bisect the targets of all layers at once, then repair them with all targets in place.

    The layers are searched together because a layer's input depends on what the layers below it kept. The repairs
    measure the config as it will be used.
    """
    reserve = 1 - (1 - target_recall) * (1 - RESERVE)
    best, _ = probe(_target(torch.full((probe.layers,), HIGHEST, dtype=torch.float64)))
    if not probe.sparse.any():
        reasons = {site.reason for site in probe.entry.backend.log.sites if site.reason}
        rule = longer(min_queries(probe.entry))
        raise ConfigError(f"batches must {rule}, got no layer that ran sparsely: {'; '.join(sorted(reasons))}")
    # Layers whose recall is NaN stay dense.
    able = probe.sparse & (best >= reserve)
    low, high = torch.zeros_like(best), torch.full_like(best, HIGHEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        recall, _ = probe(_target(middle, able))
        met = recall >= reserve
        low, high = torch.where(met, low, middle), torch.where(met, middle, high)
    step = HIGHEST / 2**HALVINGS
    for round_ in range(REPAIRS):
        recall, density = probe(_target(high, able))
        short = able & ~(recall >= reserve)
        if not short.any():
            break
        last = round_ == REPAIRS - 1
        high = torch.where(short, high + step * 2**round_, high)
        able = able & ~(short & ((high > HIGHEST) | last))
    return _result(probe, target_recall, reserve, _Found(_target(high), able, recall, density, best))


@dataclasses.dataclass(frozen=True, slots=True)
class _Found:
    """float64 or bool (layers,) each: the search's outcome."""

    targets: Tensor
    able: Tensor
    recall: Tensor
    density: Tensor
    best: Tensor


def _target(u: Tensor, able: Tensor | None = None) -> Tensor:
    """Targets of search positions; layers that are not able keep everything."""
    targets = (1 - 2.0**-u).clamp(min=LOWEST)
    return targets if able is None else torch.where(able, targets, 1.0)


def _result(probe: Probe, target_recall: float, reserve: float, outcome: _Found) -> Calibration:
    layers = []
    for layer in range(probe.layers):
        recall, density = float(outcome.recall[layer]), float(outcome.density[layer])
        reason = ""
        if not probe.sparse[layer]:
            reason = _skip_reason(probe.entry, layer)
        elif not outcome.best[layer] >= reserve:
            reason = f"its worst head reaches a true recall of {float(outcome.best[layer]):.3f} at the highest target"
        elif not outcome.able[layer]:
            reason = f"its worst head still fell short of {reserve:.3f} after {REPAIRS} rounds of raised targets"
        elif density > MAX_DENSITY:
            reason = f"it would keep {density:.2f} of its blocks, which does not pay"
        kept = LayerTarget(layer, round(float(outcome.targets[layer]), 6), recall, density)
        layers.append(kept if not reason else LayerTarget(layer, 1.0, 1.0, 1.0, reason))
    rules = dataclasses.replace(probe.entry.backend.config, target_recall=tuple(x.target for x in layers))
    return Calibration(rules, target_recall, reserve, tuple(layers))


def _skip_reason(entry: CompiledDecoder, layer: int) -> str:
    reasons = [site.reason for site in entry.backend.log.sites if site.layer == layer and site.reason]
    return reasons[-1] if reasons else "no attention site of it was found"
