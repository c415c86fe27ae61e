"""The benchmark of what is always kept where text stands before every frame."""

from __future__ import annotations

import json

import pytest

from benchmarks.common import summary
from benchmarks.model import bench_layout


def test_a_prompt_is_laid_out_as_described():
    visual = bench_layout.interleaved(6, 2, tokens=92)[0].tolist()
    assert not any(visual[:22]) and all(visual[22:28]) and not any(visual[28:30]) and not any(visual[-40:])


@pytest.mark.parametrize("frame", bench_layout.FRAMES)
def test_timestamps_keep_no_blocks(frame):
    """The bound of the project, at 8K tokens, where sinks and window alone are more than at 32K."""
    found = bench_layout.shares(bench_layout.interleaved(frame, 10, tokens=8192))
    assert found["near"] <= found["always_kept"] <= found["near"] + 0.01 < found["every_text_block"]
    assert bench_layout.shares(bench_layout.interleaved(frame, 10))["always_kept"] <= 0.08


def test_long_runs_before_frames_keep_theirs():
    found = bench_layout.shares(bench_layout.interleaved(256, 128, tokens=4096))
    assert found["always_kept"] == pytest.approx(found["every_text_block"], abs=0.02)


def test_it_writes_rows_and_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_layout, "RESULTS", tmp_path / "layout.json")
    monkeypatch.setattr(bench_layout, "TOKENS", 2048)
    recorded = []
    monkeypatch.setattr(summary, "record", lambda name, value, **about: recorded.append(name))
    assert bench_layout.main([]) == 0 and not recorded
    assert bench_layout.main(["--record"]) == 0
    assert recorded == [f"layout.always_kept.{frame}" for frame in bench_layout.FRAMES]
    rows = json.loads((tmp_path / "layout.json").read_text())["rows"]
    assert len(rows) == len(bench_layout.FRAMES) * len(bench_layout.STAMPS)
