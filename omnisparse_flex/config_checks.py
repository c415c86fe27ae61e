"""What the fields of ``OmniSparseConfig`` are unless told, and which of them go together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from omnisparse_flex.errors import ConfigError, require

#: A default that depends on the other fields: construction puts a value in its place.
AUTO: Any = "auto"
#: What it is for ``budget="peak"``. Our choice: on SmolLM2 narrow blocks and a narrow window keep the fewest keys for
#: what they lose (``benchmarks/results/side_by_side.json``).
OF_PEAKS = {"target_recall": 0.6, "key_block": 64, "window_size": 128}
#: The same for rules that count mass or a fixed number, as they were before the peak rule.
OF_COUNTS = {"target_recall": 0.98, "key_block": 128, "window_size": 256}
#: What ``min_peak`` is unless told.
MIN_PEAK = 0.1
#: Made here: Dynamo, which traces a config's construction, formats no number that it made a symbol of.
MIN_PEAK_RULE = f'be left at {MIN_PEAK} without budget="peak", which alone reads it'
LAZY_RULE = 'be left out for budget="peak", where a query block whose rows peak nowhere fetches nothing'
GQA_CHOICES = ("group", "head")
#: Fewest coordinates of a head that tensor cores multiply.
LEAST_DIMS = 16


def resolve(config: Any) -> None:
    """Values for the fields that are left to the rule, so that ``to_dict`` and ``replace`` see no ``AUTO``."""
    if config.budget == AUTO:
        asked = config.max_kv_budget is not None or config.lazy_threshold != AUTO
        counts = asked or config.granularity == "token" or config.scoring not in (AUTO, "sampled_rows")
        object.__setattr__(config, "budget", "per_head" if counts else "peak")
    for name, value in (OF_PEAKS if config.budget == "peak" else OF_COUNTS).items():
        if getattr(config, name) == AUTO:
            object.__setattr__(config, name, value)


def check_together(config: Any) -> None:
    """Refuse fields that do not go together."""
    _check_peak(config)
    _check_scoring_dims(config)
    _check_gqa_choice(config)


def _check_peak(config: Any) -> None:
    """Normalise ``min_peak``, and refuse what the peak rule does not read, or what is read by it alone."""
    if isinstance(config.min_peak, Sequence) and not isinstance(config.min_peak, str):
        object.__setattr__(config, "min_peak", tuple(config.min_peak))
        require(len(config.peaks) > 0, "min_peak", "hold one value per layer", config.min_peak)
    for peak in config.peaks:
        require(is_real(peak) and 0 <= peak < 1, "min_peak", "be in [0, 1)", config.min_peak)
    if config.budget == "peak":
        require(config.scorer == "sampled_rows", "scoring", 'be "sampled_rows" for budget="peak"', config.scoring)
        require(config.max_kv_budget is None, "max_kv_budget", 'be None for budget="peak"', config.max_kv_budget)
        require(config.lazy_threshold == AUTO, "lazy_threshold", LAZY_RULE, config.lazy_threshold)
        return
    require(config.scorer != "sampled_rows", "budget", 'be "peak" for scoring="sampled_rows"', config.budget)
    require(config.min_peak == MIN_PEAK, "min_peak", MIN_PEAK_RULE, config.min_peak)


def _check_scoring_dims(config: Any) -> None:
    """Refuse widths that no kernel multiplies, and estimators without them."""
    if config.scoring_dims is None:
        return
    count("scoring_dims", config.scoring_dims, minimum=LEAST_DIMS)
    require(config.scoring_dims.bit_count() == 1, "scoring_dims", "be a power of 2", config.scoring_dims)
    require(config.scorer == "one_pass", "scoring_dims", 'be None without scoring="one_pass"', config.scoring_dims)


def _check_gqa_choice(config: Any) -> None:
    """Refuse heads that choose where they always or never do."""
    one_of("gqa_choice", config.gqa_choice, GQA_CHOICES)
    if config.gqa_choice == "group":
        return
    rule = 'be "group" at block granularity, where each query head always chooses'
    require(config.granularity == "token", "gqa_choice", rule, config.gqa_choice)
    rule = 'be "group" for the flattest head\'s budget, which needs all members of a group at once'
    require(config.budget != "flattest_head", "gqa_choice", rule, config.gqa_choice)


def is_real(value: object) -> bool:
    """Whether a value is a finite number and no bool; comparisons, for Dynamo knows no ``isfinite`` of a symbol."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def one_of(name: str, value: object, known: Sequence[str]) -> None:
    """Refuse a value that is none of ``known``."""
    if value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def count(name: str, value: object, minimum: int) -> None:
    """Refuse what is no int of at least ``minimum``."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    require(ok, name, f"be an int of at least {minimum}", value)
