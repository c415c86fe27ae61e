"""The glyph comparison: its data, and a run of two steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.grid import compare_glyphs, glyphs, models


@pytest.fixture
def font(tmp_path: Path) -> Path:
    """A narrow glyph, which is left out, a repeated one, and 32 of random bits."""
    generator = torch.Generator().manual_seed(0)
    wide = ["".join(f"{n:X}" for n in torch.randint(0, 16, (64,), generator=generator)) for _ in range(32)]
    lines = [f"{number:04X}:{row}" for number, row in enumerate(["0" * 32, *wide, wide[0]])]
    path = tmp_path / "font.hex"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_glyphs_are_read_once_and_split(font: Path, tmp_path: Path) -> None:
    read = glyphs.read(font)
    assert read.shape == (32, 256) and read.unique().tolist() == [0, 1]
    first = int(font.read_text().splitlines()[1].partition(":")[2], 16)
    assert [int(bit) for bit in f"{first:0256b}"] in read.tolist()
    training, held_out = glyphs.split(read)
    assert len(training) == 30 and len(held_out) == 2
    empty = tmp_path / "empty.hex"
    empty.write_text("0000:00\n")
    with pytest.raises(ValueError, match="no glyph of 16 x 16 bits"):
        glyphs.read(empty)


def test_a_run_of_two_steps_counts_and_measures(font: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_glyphs, "WINDOWS", (16, 8, 2))
    monkeypatch.setattr(compare_glyphs, "DRAWN", 1)
    training, held_out = glyphs.split(glyphs.read(font))
    size = models.Size(2, 16, 2, 2)
    rows = compare_glyphs.measure(training, held_out, size, seed=0)
    assert [rows[f"raster.window_{window}"]["forwards"] for window in (16, 8, 2)] == [256, 136, 46]
    assert rows["nar"]["forwards"] == 31
    assert all(0 < row["bits"] < 4 for name, row in rows.items() if not name.endswith("adaptive"))
    assert 31 <= rows["raster.adaptive"]["forwards"] <= 256
    found = compare_glyphs.figures([rows, rows], size)
    assert found["nar.forwards.image"][0] == 31 and found["zipar.forwards_saved_pct"][0] == 46.9
    assert "nar" in compare_glyphs.table([rows])
