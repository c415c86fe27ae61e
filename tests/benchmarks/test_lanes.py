"""Runs of the suite as figures, and the README's line that is made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.common import lanes
from omnisparse_flex.versions import TESTED, release_of

CPU = {
    "device": "Some CPU, 2 cores", "gpu": False, "torch": "2.13.0+cpu", "transformers": "5.24.0", "python": "3.11.7",
    "commit": "abc1234", "minutes": 11.5, "seconds": {"": 100.0}, "flash_passed": 0,
    "passed": 1400, "failed": 1, "error": 2, "skipped": 30, "xfailed": 0, "xpassed": 0,
}  # fmt: skip
GPU = {**CPU, "device": "NVIDIA H200", "gpu": True, "torch": "2.11.0+cu130", "python": "3.12.3", "flash_passed": 12}


def test_a_run_takes_its_lanes_place_and_becomes_figures(tmp_path: Path) -> None:
    path, summary = tmp_path / "tests.json", tmp_path / "summary.json"
    for lane in (CPU, {**CPU, "transformers": "5.17.0"}, {**CPU, "failed": 0, "error": 0, "passed": 1403}, GPU):
        lanes.keep(lane, path=path, summary=summary)
    assert set(lanes.read(path)) == {"tf_5_24", "tf_5_17", "gpu_tf_5_24"}
    figures = {name: entry["value"] for name, entry in json.loads(summary.read_text()).items()}
    assert figures == {
        "tests.cpu_failed.tf_5_17": 3,
        "tests.cpu_failed.tf_5_24": 0,
        "tests.cpu_passed.tf_5_17": 1400,
        "tests.cpu_passed.tf_5_24": 1403,
        "tests.gpu_failed": 3,
        "tests.gpu_passed": 1400,
        "tests.flash_passed": 12,
    }
    entry = json.loads(summary.read_text())["tests.gpu_passed"]
    assert (entry["device"], entry["torch"], entry["commit"]) == ("NVIDIA H200", "2.11.0+cu130", "abc1234")


def test_the_line_tells_versions_and_outcomes() -> None:
    kept = {"tf_5_24": CPU, "tf_5_9": {**CPU, "transformers": "5.9.0", "failed": 0, "error": 0}, "gpu_tf_5_24": GPU}
    assert lanes.tested_line(kept) == (
        "Tested: torch 2.13.0 on CPU, Python 3.11, with transformers 5.9.0 (1,400 passed, 0 failed), "
        "5.24.0 (1,400 passed, 3 failed); torch 2.11.0+cu130 on NVIDIA H200, Python 3.12, with transformers 5.24.0 "
        "(1,400 passed, 3 failed)."
    )
    assert lanes.tested_line({}) == "Tested: no run of the whole suite is recorded."


def test_only_what_is_marked_is_rewritten() -> None:
    text = f"a\n{lanes.START}\nold\n{lanes.END}\nb\n"
    assert lanes.rewrite(text, {}) == f"a\n{lanes.START}\n{lanes.tested_line({})}\n{lanes.END}\nb\n"
    for wrong in ("", lanes.START, f"{lanes.END}{lanes.START}", f"{lanes.START}{text}"):
        with pytest.raises(ValueError, match="once each"):
            lanes.rewrite(wrong, {})


def test_the_readme_tells_what_is_recorded() -> None:
    text = lanes.README.read_text("utf-8")
    assert lanes.rewrite(text, lanes.read()) == text, "run python -m benchmarks.common.lanes"


def test_what_is_called_tested_was_recorded_and_passed() -> None:
    recorded = lanes.read()
    assert not [name for name, lane in recorded.items() if lanes.failures_of(lane)]
    found = {library: {lane[library].partition("+")[0] for lane in recorded.values()} for library in TESTED}
    for library, tested in TESTED.items():
        oldest, newest = release_of(tested.oldest), release_of(tested.newest)
        outside = [version for version in found[library] if not oldest <= release_of(version) <= newest]
        assert not outside, f"{library} {outside} was tested: say so in omnisparse_flex/versions.py"
    if recorded:
        assert set(TESTED["transformers"]) <= found["transformers"] and TESTED["torch"].newest in found["torch"]
    if any(lane["gpu"] for lane in recorded.values()):
        assert TESTED["torch"].oldest in found["torch"]


# The time of the suite.


class Report:
    def __init__(self, nodeid: str, duration: float) -> None:
        self.nodeid, self.duration = nodeid, duration


def test_parts_are_folders() -> None:
    from tests.helpers.suite_time import BUDGETS, part_of, seconds_of

    reports = [Report("tests/cache/test_a.py::test_b[x/y]", 1.5), Report("tests/cache/deep/test_c.py::test_d", 2)]
    assert seconds_of([*reports, Report("tests/test_a.py::test_b", 3), object()]) == {"": 3, "cache": 3.5}
    folders = {path.name for path in (lanes.ROOT / "tests").iterdir() if any(path.glob("**/test_*.py"))}
    assert set(BUDGETS) - {""} <= folders and sum(BUDGETS.values()) == 1740
    assert part_of("tests/attention/tokens/test_a.py::test_b") == "attention"


@pytest.mark.parametrize(("kept", "took", "status"), [("1", 25, 1), ("1", 15, 0), ("", 25, 0)])
def test_a_part_that_is_far_over_its_budget_fails(monkeypatch, tmp_path, kept: str, took: int, status: int) -> None:
    from types import SimpleNamespace

    from tests.helpers.suite_time import KEPT, SuiteTime

    monkeypatch.setenv(KEPT, kept)
    path = tmp_path / "results.json"
    stats = {"passed": [Report("tests/kernels/test_a.py::test_b", took)], "": [Report("tests/test_c.py::d", 1)]}
    reporter = SimpleNamespace(stats=stats)
    config = SimpleNamespace(
        pluginmanager=SimpleNamespace(get_plugin=lambda name: reporter), getoption=lambda name: str(path)
    )
    session = SimpleNamespace(exitstatus=0)
    SuiteTime(config).pytest_sessionfinish(session)
    assert session.exitstatus == status
    found = json.loads(path.read_text())
    assert found["passed"] == 1 and found["seconds"] == {"": 1, "kernels": took} and set(CPU) == set(found)
