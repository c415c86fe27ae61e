"""A model and its tokenizer from a directory on disk, without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from omnisparse_flex.calibration.progress import Progress
from omnisparse_flex.errors import ConfigError, require


def auto_class(model_dir: Path) -> tuple[Any, Any]:
    """The Auto class that takes the model, and its config.

    Raises:
        ConfigError: If transformers cannot read the directory, or the model generates no text.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    has_config = (model_dir / "config.json").is_file()
    require(has_config, "model_dir", "be a directory with a config.json", str(model_dir))
    config = loaded(lambda: AutoConfig.from_pretrained(model_dir, local_files_only=True))
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            return auto, config
    raise ConfigError(f"model must generate text, got {config.model_type!r} in {str(model_dir)!r}")


def load_model(auto: Any, model_dir: Path, device: torch.device) -> Any:
    """The model in eval mode; on a GPU in its own dtype, on a CPU in float32."""
    # Half precision is slow and inexact on a CPU, so that a check would measure the CPU instead of the selection.
    dtype: Any = "auto" if device.type == "cuda" else torch.float32
    return loaded(lambda: auto.from_pretrained(model_dir, local_files_only=True, dtype=dtype)).eval().to(device)


def load_for_inputs(
    auto: Any, model_dir: Path, batches: Iterable[dict[str, Any]], progress: Progress
) -> tuple[Any, torch.device]:
    """The model on the GPU, or without one on the CPU, and its device; pixels of the batches get the model's dtype."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with progress.step(f"loading {model_dir}"):
        model = load_model(auto, model_dir, device)
    for batch in batches:
        for name in batch:
            if name.startswith("pixel_values"):
                batch[name] = batch[name].to(next(model.parameters()).dtype)
    return model, device


def tokenizer_of(model_dir: Path) -> Any:
    """The tokenizer, or None where the directory holds none."""
    from transformers import AutoTokenizer

    if not any((model_dir / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    return loaded(lambda: AutoTokenizer.from_pretrained(model_dir, local_files_only=True))


def loaded(load: Callable[[], Any]) -> Any:
    """Call ``load``; an error of transformers about the directory becomes a ``ConfigError``.

    Whatever the error is: a file that somebody else wrote may be wrong in any way.
    """
    try:
        return load()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ConfigError(f"model_dir must be loadable by transformers, got {type(error).__name__}: {error}") from error
