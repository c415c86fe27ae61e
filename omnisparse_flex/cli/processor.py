"""A video as the model's own processor gives it to the model, for every model that has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from omnisparse_flex.cli import video
from omnisparse_flex.cli.loading import loaded
from omnisparse_flex.errors import ConfigError, require

#: What a directory holds beside the weights if the model has a processor.
FILES = ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json")
#: The question about a video if the user gives none: a few tokens beside thousands of visual ones.
PROMPT = "Describe the video."


def has_processor(model_dir: Path) -> bool:
    """Whether a directory holds a processor's settings."""
    return any((model_dir / name).is_file() for name in FILES)


def processed(model_dir: Path, clip: Path, prompt: str | None, max_frames: int) -> dict[str, Tensor]:
    """A video and a question as the model's own processor gives them to the model.

    Args:
        model_dir: Holds the processor's settings, and the tokenizer with its chat template.
        clip: A video file.
        prompt: The question; None: ``PROMPT``.
        max_frames: Most frames of the video.

    Returns:
        The model's keyword arguments, tensors alone.

    Raises:
        ConfigError: If the processor cannot be loaded, or does not take the video.
    """
    frames, seconds = video.read_frames(clip, max_frames)
    processor = _processor_of(model_dir)
    question = {"type": "text", "text": PROMPT if prompt is None else prompt}
    talk = [{"role": "user", "content": [{"type": "video"}, question]}]
    rule = "have a processor with a chat template that takes a video"
    require(getattr(processor, "chat_template", None) is not None, "model_dir", rule, type(processor).__name__)
    count = len(frames)
    # The frames are chosen: the processor is told when each was, not to choose again.
    fps = 1 / seconds if seconds > 0 else 1.0
    metadata = {"total_num_frames": count, "fps": fps, "frames_indices": list(range(count)), "duration": count / fps}
    try:
        text = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
        given = processor(
            text=[text],
            videos=[frames.permute(0, 3, 1, 2)],
            video_metadata=[metadata],
            do_sample_frames=False,
            return_tensors="pt",
        )
    except Exception as error:  # a processor may fail in any way, and not by our fault
        raise ConfigError(f"model_dir must {rule}, got {type(error).__name__}: {error}") from error
    return {name: value for name, value in given.items() if isinstance(value, Tensor)}


def _processor_of(model_dir: Path) -> Any:
    from transformers import AutoProcessor

    try:
        return loaded(lambda: AutoProcessor.from_pretrained(model_dir, local_files_only=True))
    except ConfigError as error:
        if isinstance(error.__cause__, ImportError):
            raise ConfigError(f"the model's own processor must be installed: {error.__cause__}") from error
        raise
