"""Pixels of a batch of scenes: moving real backgrounds with the sprites painted on, cut into patches."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from benchmarks.video_needle.backgrounds import FRAMES, SIDE
from benchmarks.video_needle.scene import CELLS, GRID, Scene
from benchmarks.video_needle.sprites import CELL, PALETTE, atlas

#: Side of a frame in pixels, frames of a step, and numbers of a patch: channel, frame, row, column.
FRAME, STEP_FRAMES = GRID * CELL, 2
PATCH_SHAPE = (3, STEP_FRAMES, CELL, CELL)


def plan_backgrounds(scenes: list[Scene], clips: int) -> tuple[Tensor, Tensor]:
    """Which pixels of which clip each frame shows.

    A clip is played forth and back at some speed while the crop drifts; some are mirrored; every
    video has its own brightness and tint.

    Args:
        scenes: The videos, all of one length.
        clips: Number of clips to choose from.

    Returns:
        ``(crops, gains)``: int64 (videos, frames, 4) of clip frame, top, left and mirrored (0 or 1);
        float32 (videos, 3), factors of the channels.
    """
    time = np.arange(STEP_FRAMES * scenes[0].steps)
    crops = np.empty((len(scenes), len(time), 4), dtype=np.int64)
    gains = np.empty((len(scenes), 3), dtype=np.float32)
    for row, scene in enumerate(scenes):
        rng = np.random.default_rng(scene.background)
        clip, start, mirrored = int(rng.integers(clips)), int(rng.integers(FRAMES)), int(rng.integers(2))
        played = (start + (time * rng.uniform(0.1, 0.6)).astype(np.int64)) % (2 * FRAMES - 2)
        crops[row, :, 0] = clip * FRAMES + np.minimum(played, 2 * FRAMES - 2 - played)
        for axis in (1, 2):
            drift = np.sin(time * rng.uniform(0.005, 0.05) + rng.uniform(0, 2 * np.pi))
            crops[row, :, axis] = np.rint((SIDE - FRAME) / 2 * (1 + drift)).astype(np.int64)
        crops[row, :, 3] = mirrored
        gains[row] = rng.uniform(0.35, 0.85) * rng.uniform(0.8, 1.2, size=3)
    return torch.from_numpy(crops), torch.from_numpy(gains)


def render(crops: Tensor, gains: Tensor, sprites: Tensor, clips: Tensor, dtype: torch.dtype) -> Tensor:
    """Draw a batch on the device of ``clips``.

    Args:
        crops: (videos, frames, 4), as ``plan_backgrounds`` returns it.
        gains: (videos, 3).
        sprites: (sprites, 7), as ``place`` returns it.
        clips: uint8 (clips, FRAMES, SIDE, SIDE, 3).
        dtype: Of the result.

    Returns:
        (videos * steps * CELLS, 3 * 2 * CELL * CELL) in -1 … 1, the patches as Qwen2.5-VL's tower reads
        them: rows are time, row, column of the cell; columns are channel, frame, row, column of the pixel.
    """
    crops, gains, sprites = (x.to(clips.device, non_blocking=True) for x in (crops, gains, sprites))
    frame, top, left, mirrored = crops.unbind(-1)
    side = torch.arange(FRAME, device=clips.device)
    columns = torch.where(mirrored[..., None] > 0, FRAME - 1 - side, side) + left[..., None]
    lines = (frame[..., None] * SIDE + top[..., None] + side) * SIDE
    pixels = clips.reshape(-1, 3)[lines[..., None] + columns[..., None, :]]
    videos, frames = crops.shape[:2]
    pixels = pixels.to(dtype) * (gains / 127.5).to(dtype)[:, None, None, None] - 1
    cells = pixels.view(videos, frames // STEP_FRAMES, STEP_FRAMES, GRID, CELL, GRID, CELL, 3)
    patches = cells.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(-1, *PATCH_SHAPE)
    _paint(patches, sprites, frames // STEP_FRAMES)
    return patches.flatten(1)


@functools.cache
def _on(device: torch.device) -> tuple[Tensor, Tensor]:
    """Drawings and colours on a device: copied once, a copy in every step would wait for the step before."""
    return atlas().to(device), torch.tensor(PALETTE, dtype=torch.float32).to(device) / 127.5 - 1


def _paint(patches: Tensor, sprites: Tensor, steps: int) -> None:
    """Draw every sprite into its patch, in place."""
    video, step, cell, glyph, direction, phase, colour = sprites.unbind(1)
    where = (video * steps + step) * CELLS + cell
    phases = phase[:, None] + torch.arange(STEP_FRAMES, device=sprites.device)
    drawing = _on(sprites.device)[0][glyph[:, None], direction[:, None], phases][:, None]
    ink = _on(sprites.device)[1].to(patches.dtype)[colour][:, :, None, None, None]
    black = ink.new_full((), -1)
    patches[where] = torch.where(drawing == 1, ink, torch.where(drawing == 2, black, patches[where]))
