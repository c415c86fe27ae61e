"""``omnisparse-flex demo``: a trained model answers questions about a generated clip, dense and sparse."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import omnisparse_flex
from omnisparse_flex.errors import require

#: What is saved.
PICTURE = "omnisparse_masks.png"
ROOT = Path(omnisparse_flex.__path__[0]).resolve().parent
#: The trained model that a checkout may hold, and the task that draws its clips.
SHIPPED, TASK = ROOT / "models" / "video_needle", ROOT / "benchmarks" / "video_needle"


def shipped() -> Path | None:
    """The checkout's own trained model, if it has one and its task."""
    return SHIPPED if (SHIPPED / "config.json").is_file() and TASK.is_dir() else None


def run_demo(weights: Path | None, out: Path, *, quick: bool = False) -> dict[str, Any]:
    """Ask the model of a folder about a clip, print the answers, and save a picture of the block masks.

    Args:
        weights: A folder that ``benchmarks/video_needle/release.py`` wrote; None: the one that the checkout ships.
        out: Directory of ``PICTURE``; made when missing.
        quick: A shorter clip.

    Returns:
        The answers; see ``benchmarks/video_needle/ask.py``.

    Raises:
        ConfigError: If this is no checkout of the repository, or the folder does not fit.
    """
    require(TASK.is_dir(), "weights", "be used in a checkout of the repository, which draws the clip", str(ROOT))
    weights = shipped() if weights is None else weights
    require(weights is not None, "weights", "be given where the checkout ships no model", None)
    assert weights is not None
    require(weights.is_dir(), "weights", "be a folder", str(weights))
    out.mkdir(parents=True, exist_ok=True)
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    ask = importlib.import_module("benchmarks.video_needle.ask")
    told: dict[str, Any] = ask.run(weights, quick=quick, picture=out / PICTURE)
    return told
