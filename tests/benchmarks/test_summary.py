"""The figures' file and the README table made from it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "common" / "summary.py"


@pytest.fixture(scope="module")
def summary() -> ModuleType:
    spec = importlib.util.spec_from_file_location("summary", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def put(summary: ModuleType, path: Path, name: str, value: float, **changes: object) -> dict:
    return summary.record(name, value, **{"unit": "x", "baseline": "dense", "script": SCRIPT, "path": path} | changes)


def test_an_entry_holds_what_the_issue_asks_for(summary: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "new" / "summary.json"
    put(summary, path, "a.b", 2.5)
    entry = json.loads(path.read_text())["a.b"]
    assert set(entry) == set(summary.FIELDS)
    assert (entry["value"], entry["unit"], entry["baseline"]) == (2.5, "x", "dense")
    assert entry["torch"] == torch.__version__
    assert entry["script"] == "benchmarks/common/summary.py"
    assert entry["device"] == summary.device_name()
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?|unknown", entry["commit"])


def test_merging_keeps_the_others_and_sorts(summary: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    put(summary, path, "b", 1)
    put(summary, path, "a", 2, device="a GPU")
    put(summary, path, "b", 3)
    figures = json.loads(path.read_text())
    assert list(figures) == ["a", "b"]
    assert figures["b"]["value"] == 3
    assert figures["a"]["device"] == "a GPU"
    assert list(tmp_path.iterdir()) == [path], "a temporary file was left behind"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "3", None, True, torch.ones(())])
def test_only_finite_numbers_are_recorded(summary: ModuleType, tmp_path: Path, value: object) -> None:
    path = tmp_path / "summary.json"
    put(summary, path, "a", 1)
    before = path.read_text()
    with pytest.raises(ValueError, match="must be a finite number"):
        put(summary, path, "a", value)
    assert path.read_text() == before


@pytest.mark.parametrize(("name", "unit"), [("", "x"), ("a", ""), (" ", "x")])
def test_names_and_units_are_needed(summary: ModuleType, tmp_path: Path, name: str, unit: str) -> None:
    with pytest.raises(ValueError, match="non-empty string"):
        put(summary, tmp_path / "summary.json", name, 1, unit=unit)


def test_a_failed_write_leaves_the_old_file(summary: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    put(summary, path, "a", 1)
    with pytest.raises(TypeError):
        summary.write_json({"a": object()}, path)
    assert json.loads(path.read_text())["a"]["value"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_readme_table(summary: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, readme = tmp_path / "summary.json", tmp_path / "README.md"
    put(summary, figures, "b.speed", 5.4321, device="H200")
    put(summary, figures, "a.count", 12345, unit="tests", baseline="")
    readme.write_text(f"# Title\n\n{summary.START}\nold\n{summary.END}\n\ntail\n")
    options = ["--readme", "--file", str(readme), "--summary", str(figures)]
    assert summary.main([*options, "--check"]) == 1, "the check must see that the table is old"
    assert summary.main(options) == 0
    text = readme.read_text()
    assert "old" not in text
    assert text.startswith("# Title\n\n") and text.endswith("\n\ntail\n")
    assert "| `b.speed` | 5.43 x | dense | H200 |" in text
    assert text.index("12,345 tests") < text.index("b.speed")
    assert summary.main([*options, "--check"]) == 0
    assert summary.main(options) == 0
    assert readme.read_text() == text, "a second run must change nothing"
    assert summary.main(["--summary", str(figures)]) == 0
    assert "b.speed" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{start}", "{end} {start}", "{start}{start}{end}"])
def test_readme_without_proper_markers_is_refused(summary: ModuleType, text: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        summary.rewrite(text.format(start=summary.START, end=summary.END), {})


def test_every_kept_figure_is_complete(summary: ModuleType) -> None:
    for name, entry in summary.read().items():
        assert set(entry) == set(summary.FIELDS), name
        assert (ROOT / entry["script"]).is_file(), f"{name} was measured by no script of ours"


@pytest.fixture(scope="module")
def gpu_tests() -> ModuleType:
    return importlib.import_module("benchmarks.common.gpu_tests")


FIRST = "FAILED tests/test_a.py::test_x\nFAILED tests/test_b.py::test_y[1]\n2 failed, 8 passed, 1 skipped in 9.00s"


@pytest.mark.parametrize(
    ("log", "passed", "failed"),
    [
        (FIRST, 8, 2),
        (f"{FIRST}\nagain: tests/test_a.py tests/test_b.py\n5 passed in 2.00s", 10, 0),
        (f"{FIRST}\nagain: tests/test_a.py\n3 passed in 2.00s", 9, 1),
        (
            f"{FIRST}\nagain: tests/test_a.py tests/test_b.py\nFAILED tests/test_b.py::test_y[1]\n1 failed, 4 passed",
            9,
            1,
        ),
    ],
)
def test_a_second_run_of_mended_files_counts(gpu_tests: ModuleType, log: str, passed: int, failed: int) -> None:
    assert gpu_tests.outcome(log)[:2] == (passed, failed)


def test_a_second_run_without_an_end_is_refused(gpu_tests: ModuleType) -> None:
    with pytest.raises(ValueError, match="second run"):
        gpu_tests.outcome(f"{FIRST}\nagain: tests/test_a.py\n")
