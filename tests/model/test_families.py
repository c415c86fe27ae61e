"""The ten families that are used most: sparse, right in both turns, and as ``docs/families.md`` says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.helpers.families import Row, examine

DOCS = Path(__file__).parent.parent.parent / "docs"
TEN = (
    "gemma3",
    "glm4v",
    "internvl",
    "llava_next_video",
    "llava_onevision",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
    "video_llama_3",
)


def make_families():
    spec = importlib.util.spec_from_file_location("make_families", DOCS / "make_families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", TEN)
def test_family(family):
    row = examine(family)
    assert row.faults == [] and row.says == [], row
    assert row.sparse == 2 and not row.dense, row
    assert row.seen > 1000 * max(row.error, row.second), "the oracle tells right from wrong"
    assert row.density < 0.9
    assert f"| {family} | 2 of 2 | {row.density:.2f} |" in (DOCS / "families.md").read_text()


def test_what_is_a_fault():
    fine = {"sparse": 2, "density": 0.8, "error": 1e-7, "second": 1e-7, "noise": 1e-7}
    assert Row("x", **fine).faults == []
    assert Row("x", **fine | {"second": 0.1}).faults == ["second turn off by 1.0e-01"]
    assert Row("x", **fine | {"error": float("nan")}).faults == ["first turn off by nan"]
    assert Row("x", **fine | {"density": 1.0}).faults == ["nothing is dropped"]
    assert Row("x").faults == ["no site, no word"]
    assert Row("x", says=["refused: by name"]).faults == [] and Row("x", dense=["a reason"]).faults == []


def test_the_page_is_made_of_the_results():
    import json

    make = make_families()
    results = json.loads(make.RESULTS.read_text())
    assert make.page(results["rows"], results["versions"]) == (DOCS / "families.md").read_text("utf-8")
    assert results["figures"] == make.figures(results["rows"]) and results["figures"]["silent_faults"] == 0
