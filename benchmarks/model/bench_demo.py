"""Run the seeded demo and record its figures: python -m benchmarks.model.bench_demo [--out DIR]."""

from __future__ import annotations

import argparse
from pathlib import Path

#: Figure of the demo -> (unit, what it is measured against).
CLAIMS = {
    "density": ("share, 0-1", "dense causal attention FLOPs of the same prefill"),
    "rel_error": ("norm ratio", "logits of all positions, dense plain SDPA, same seeded weights"),
    "rel_error_random": ("norm ratio", "as demo.rel_error, random blocks at the same budgets"),
    "rel_error_question": ("norm ratio", "logits of the question's positions, dense plain SDPA"),
    "rel_error_question_random": ("norm ratio", "as demo.rel_error_question, random blocks at the same budgets"),
    "speedup_model": ("x", "time to the first token, the faster of plain and compiled dense SDPA"),
    "speedup_decoder": ("x", "the same, decoder alone"),
}


def main() -> None:
    """Run the demo once and write what it claims into the summary."""
    from benchmarks.common.summary import record
    from benchmarks.model.seeded_demo import run_demo

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "scratch")
    figures = run_demo(parser.parse_args().out)
    for name, (unit, baseline) in CLAIMS.items():
        record(f"demo.{name}", figures[name], unit=unit, baseline=baseline, device=figures["device"], script=__file__)


if __name__ == "__main__":
    main()
