"""What a run of the tests took and gave, part by part: printed, written down, and held to budgets.

A part is a folder of tests/, or the files that lie in none. Time is that of all test processes together.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch

#: Seconds of each part, of 1,740 in all: fifteen minutes in two processes. Our choice, by what each part is worth.
BUDGETS = {
    "": 90, "attention": 220, "benchmarks": 100, "cache": 380, "calibration": 30, "cli": 30, "compilation": 30,
    "examples": 40, "fuzz": 60, "grid": 30, "kernels": 10, "masks": 120, "model": 440, "passes": 130, "testing": 30,
}  # fmt: skip
#: A part that is not named above.
OTHER = 60
#: A machine may be slow and shared: where the budgets are kept, a part fails that takes so many times its own.
FAR = 2.0
#: Set to a non-empty value, a run fails that is far over a budget; CI sets it.
KEPT = "OMNISPARSE_KEEP_BUDGETS"
OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")


def part_of(test: str) -> str:
    """The part of a test, by its pytest name: ``cache`` for ``tests/cache/test_x.py::test_y``."""
    folders = PurePosixPath(test.partition("::")[0]).parts[1:-1]
    return folders[0] if folders else ""


def seconds_of(reports: Iterable[Any]) -> dict[str, float]:
    """Seconds by part, from pytest's reports of set-ups, calls and tear-downs."""
    seconds: dict[str, float] = {}
    for report in reports:
        if hasattr(report, "duration"):
            part = part_of(report.nodeid)
            seconds[part] = seconds.get(part, 0.0) + report.duration
    return dict(sorted(seconds.items()))


def lines_of(seconds: Mapping[str, float]) -> list[str]:
    """One line a part, against its budget."""
    named = {part: f"tests/{part}" if part else "tests/*.py" for part in seconds}
    width = max((len(name) for name in named.values()), default=0)
    return [f"{named[p]:<{width}}  {took:5.0f} s of {BUDGETS.get(p, OTHER)}" for p, took in seconds.items()]


def far_over(seconds: Mapping[str, float]) -> list[str]:
    """Parts that take more than ``FAR`` times their budget."""
    return [part for part, took in seconds.items() if took > FAR * BUDGETS.get(part, OTHER)]


def results_of(stats: Mapping[str, list[Any]], began: float) -> dict[str, Any]:
    """A run as ``benchmarks.common.lanes`` takes it: outcomes, seconds, and what it ran on.

    Args:
        stats: Pytest's reports by outcome.
        began: When the run did, by ``time.time``.
    """
    from benchmarks.common.summary import commit, device_name

    reports = [report for kept in stats.values() for report in kept]
    flash = [report for report in stats.get("passed", ()) if "test_flash.py" in report.nodeid]
    return {
        "device": device_name(),
        "gpu": torch.cuda.is_available(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),  # this process may not have imported it
        "python": platform.python_version(),
        "commit": commit(),
        "minutes": round((time.time() - began) / 60, 1),
        "seconds": {part: round(took, 1) for part, took in seconds_of(reports).items()},
        "flash_passed": len(flash),
        **{outcome: len(stats.get(outcome, ())) for outcome in OUTCOMES},
    }


class SuiteTime:
    """The pytest plugin; of several processes only the one that reports has it."""

    def __init__(self, config: Any) -> None:
        """Start the clock."""
        self.config, self.began = config, time.time()

    def _stats(self) -> dict[str, list[Any]]:
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        return {} if reporter is None else reporter.stats

    def _seconds(self) -> dict[str, float]:
        return seconds_of(report for kept in self._stats().values() for report in kept)

    def pytest_sessionfinish(self, session: Any) -> None:
        """Write the results, and fail what is far over its budget where budgets are kept."""
        path = self.config.getoption("--results")
        if path:
            Path(path).write_text(json.dumps(results_of(self._stats(), self.began), indent=2) + "\n", "utf-8")
        if os.environ.get(KEPT) and far_over(self._seconds()) and not session.exitstatus:
            session.exitstatus = 1

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the parts, if there is more than one."""
        seconds = self._seconds()
        if len(seconds) < 2:
            return
        terminalreporter.section("time of each part, in all processes")
        for line in lines_of(seconds):
            terminalreporter.write_line(line)
        for part in far_over(seconds):
            terminalreporter.write_line(f"tests/{part} takes more than {FAR:g} times its budget", red=True)
