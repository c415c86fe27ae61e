"""Run the demo and record its figures: python benchmarks/bench_demo.py [--out DIR]."""

from __future__ import annotations

import argparse
from pathlib import Path

SCRIPT = "benchmarks/bench_demo.py"
BASELINES = {
    "density": "dense causal attention FLOPs of the same prefill",
    "rel_error": "logits of all positions, dense plain SDPA, same seeded weights",
    "rel_error_random": "as demo.rel_error, random blocks at the same budgets",
}


def main() -> None:
    from summary import record

    from omnisparse_flex.demo import run_demo

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "scratch")
    figures = run_demo(parser.parse_args().out)
    for name, baseline in BASELINES.items():
        unit = "share, 0-1" if name == "density" else "norm ratio"
        record(f"demo.{name}", figures[name], unit=unit, baseline=baseline, device=figures["device"], script=SCRIPT)


if __name__ == "__main__":
    main()
