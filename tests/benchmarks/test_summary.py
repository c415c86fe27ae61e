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


FIGURES, HEADLINE, END = "<!-- figures:start -->", "<!-- headline:start -->", "<!-- figures:end -->"


def test_readme_table(summary: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, readme = tmp_path / "summary.json", tmp_path / "README.md"
    put(summary, figures, "b.speed", 5.4321, device="H200")
    put(summary, figures, "a.count", 12345, unit="tests", baseline="")
    readme.write_text(f"# Title\n\n{FIGURES}\nold\n{END}\n\ntail\n")
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


def test_a_figure_stands_in_one_table(summary: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    for name in ("video.a", "train.b", "train_other.c"):
        put(summary, path, name, 1)
    named = "<!-- figures:start video. train. -->"
    text = summary.rewrite(f"{named}\n{END}\nbetween\n{FIGURES}\nold\n{END}\n", summary.read(path))
    first, _, second = text.partition("between")
    assert named in first, "the mark must survive"
    assert ("`video.a`" in first, "`train.b`" in first, "`train_other.c`" in first) == (True, True, False)
    assert ("`video.a`" in second, "`train.b`" in second, "`train_other.c`" in second) == (False, False, True)


def rows_of(summary: ModuleType, figures: dict) -> dict[str, list[str]]:
    """The first table as length -> cells."""
    lines = [line for line in summary.headline(figures).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in [cells[0], *cells[2:]]}


def test_the_first_table_says_what_was_not_measured(summary: ModuleType, tmp_path: Path) -> None:
    path, empty = tmp_path / "summary.json", "not measured"
    assert {cell for row in list(rows_of(summary, {}).values())[1:] for cell in row} == {empty}
    for name, value in (("dense_s", 9.14), ("s", 3.17), ("speedup", 2.881), ("gib", 28.0), ("density", 0.0387)):
        put(summary, path, f"ttft.{name}.128k", value, baseline="dense SDPA; much more", device="H200")
    put(summary, path, "peak.ppl_delta_pct.128k", 1.0)
    figures = summary.read(path)
    rows = rows_of(summary, figures)
    assert set(rows["32K"]) == {empty}
    # One of the two numbers of a cell is no cell, and the quality of other rules has no place here.
    assert rows["128K"] == ["9.14 s", "3.17 s (**2.9x**)", empty, empty, "0.039", empty]
    assert "H200" in summary.headline(figures) and "dense SDPA." in summary.headline(figures)


def test_the_default_rules_come_first_in_every_row(summary: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    put(summary, path, "ttft.dense_s.32k", 7)
    put(summary, path, "ttft.speedup.32k", 3)
    for name, value in (("ttft.default.s.128k", 2), ("ttft.default.speedup.128k", 4), ("peak.ppl_delta_pct.8k", 0.9)):
        put(summary, path, name, value)
    put(summary, path, "peak.density.8k", 0.3)
    rows = rows_of(summary, summary.read(path))
    assert set(rows["32K"]) == {"not measured"}, "another rule's time must not stand beside the default's"
    assert rows["128K"][1] == "2.00 s (**4.0x**)"
    assert rows["8K"][-2:] == ["not measured", "0.9 % perplexity"]


def test_kept_pages_are_as_generated(summary: ModuleType) -> None:
    assert summary.main(["--readme", "--check"]) == 0, "run benchmarks/common/summary.py --readme"


@pytest.mark.parametrize("text", ["", "{start}", "{end} {start}", "{start}\n{start}\n{end}", "{headline}\n{end}"])
def test_readme_without_proper_markers_is_refused(summary: ModuleType, text: str) -> None:
    with pytest.raises(ValueError, match="each with a start and an end"):
        summary.rewrite(text.format(start=FIGURES, end=END, headline=HEADLINE), {})


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
