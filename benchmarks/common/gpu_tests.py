"""The whole test suite on a CUDA machine, and its outcome as two figures.

python3 -m benchmarks.common.gpu_tests                 # run and record
python -m benchmarks.common.gpu_tests --log benchmarks/results/gpu_tests.log ...  # record a kept run

A kept run may hold a second one, of files whose tests failed and were mended since, after a line ``again: FILE ...``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import lanes
from benchmarks.common.summary import record

ROOT = Path(__file__).resolve().parents[2]
LOG = ROOT / "benchmarks" / "results" / "gpu_tests.log"
#: What a bare checkout on a lent machine cannot run: building wheels, and git's own facts.
LEFT_OUT = ("tests/test_packaging.py", "tests/benchmarks/test_summary.py")


def run(results: Path) -> str:
    """Run pytest over everything, GPU tests included; returns its last lines.

    Args:
        results: Where outcomes, times and versions are written, for ``benchmarks.common.lanes``.
    """
    command = [sys.executable, "-m", "pytest", "tests", "-q", "-m", "gpu or not gpu", "-p", "no:benchmark"]
    command += [f"--ignore={path}" for path in LEFT_OUT] + ["--tb=short", "--show-capture=no", f"--results={results}"]
    # Tests compile more than they compute; each process compiles in processes of its own.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    command += ["-n", str(max(1, cores // 2)), "--dist", "worksteal"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    kept = re.compile(r"(FAILED|ERROR|SKIPPED|.* in [\d.]+s)")
    return "\n".join(line for line in done.stdout.splitlines() if kept.match(line))


def count(log: str, outcome: str) -> int:
    """The number before ``outcome`` in pytest's closing line, 0 if it is not there."""
    found = re.findall(rf"(\d+) {outcome}", log)
    return int(found[-1]) if found else 0


def outcome(log: str) -> tuple[int, int, tuple[str, ...]]:
    """Tests that passed and failed, and the files that were run again, whose second outcome is the one that counts.

    Raises:
        ValueError: If a file was not run again as a whole, as far as can be seen: fewer tests passed than had failed.
    """
    first, _, rest = log.partition("\nagain: ")
    files, _, second = rest.partition("\n")
    again = tuple(files.split())
    mended = [name for name in re.findall(r"^FAILED (\S+?)::", first, flags=re.M) if name in again]
    if len(mended) > count(second, "passed") + count(second, "failed"):
        raise ValueError(f"log must hold a second run of {again}, got {second!r}")
    broken = count(second, "failed")
    return count(first, "passed") + len(mended) - broken, count(first, "failed") - len(mended) + broken, again


def record_log(log: str, options: argparse.Namespace) -> int:
    """Record a kept run's two figures; returns how many tests failed."""
    passed, failed, again = outcome(log)
    told = 'pytest -m "gpu or not gpu"; skips are named in the log'
    if again:
        told += f"; {len(again)} files again after their tests were mended"
    where = {"device": options.device, "torch_version": options.torch, "tree": options.commit}
    for name, value in (("passed", passed), ("failed", failed)):
        record(f"tests.gpu_{name}", value, unit="tests", baseline=told, script=__file__, **where)
    return failed


def main() -> int:
    """Run or read, then record ``tests.gpu_passed`` and ``tests.gpu_failed``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, help="a kept run's last lines, instead of running")
    parser.add_argument("--device", help="where the kept run ran")
    parser.add_argument("--torch", help="torch of the kept run")
    parser.add_argument("--commit", help="tree of the kept run")
    options = parser.parse_args()
    if options.log:
        log = options.log.read_text()
        failed = record_log(log, options)
    else:
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "results.json"
            log = run(results)
            lane = json.loads(results.read_text("utf-8"))
        LOG.write_text(log)
        lanes.keep(lane)
        failed = lanes.failures_of(lane)
    print(log)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
