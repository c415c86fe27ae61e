"""Every GPU benchmark, one process after the other, with what each took: ``make bench-gpu``.

    PYTHONPATH=$PWD python3 benchmarks/run_gpu.py --only prefill train
    PYTHONPATH=$PWD python3 benchmarks/run_gpu.py --quick --device cpu

A script that fails or takes too long does not stop the others. Each writes its own JSON and figures as it goes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Script:
    """One benchmark.

    Attributes:
        name: As ``--only`` takes it.
        file: In this folder.
        limit: Seconds after which it is stopped.
        quick: It has a ``--quick``.
        arguments: More arguments.
    """

    name: str
    file: str
    limit: float
    quick: bool = True
    arguments: tuple[str, ...] = ()


#: Cheap and telling ones first.
SCRIPTS = (
    Script("prefill", "bench_prefill.py", 260),
    Script("train", "bench_train.py", 180),
    Script("token", "bench_token.py", 180),
    Script("quality_speed", "bench_quality_speed.py", 300),
    Script("decode", "bench_decode.py", 120),
    Script("decode_model", "bench_decode_model.py", 240),
    Script("short", "bench_short.py", 240),
    Script("ttft", "bench_ttft.py", 600, arguments=("--hf",)),
    Script("compile", "bench_compile.py", 300, quick=False),
)


def command(script: Script, *, quick: bool, device: str) -> list[str]:
    """What is run."""
    flags = ["--quick"] if quick and script.quick else []
    return [sys.executable, str(ROOT / script.file), *flags, *([] if quick else script.arguments), "--device", device]


def run(script: Script, *, quick: bool, device: str) -> str:
    """``"ok"``, or what went wrong."""
    path = os.pathsep.join(filter(None, (str(ROOT.parent), os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            command(script, quick=quick, device=device), env={**os.environ, "PYTHONPATH": path}, timeout=script.limit
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {script.limit:.0f} s"
    return "ok" if done.returncode == 0 else f"failed with exit status {done.returncode}"


def main() -> int:
    """Run what is asked for; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[script.name for script in SCRIPTS], help="default: all")
    parser.add_argument("--quick", action="store_true", help="short cases; records nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    wanted = [s for s in SCRIPTS if (s.name in options.only if options.only else s.quick or not options.quick)]
    outcomes = []
    for number, script in enumerate(wanted, 1):
        start, place = time.perf_counter(), f"[{number}/{len(wanted)}] {script.name}"
        print(f"{place} (at most {script.limit:.0f} s)", flush=True)
        outcomes.append(run(script, quick=options.quick, device=options.device))
        print(f"{place}: {outcomes[-1]}, {time.perf_counter() - start:.0f} s", flush=True)
    return 0 if all(outcome == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
