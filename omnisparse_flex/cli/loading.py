"""A model and its tokenizer from a directory on disk, without a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from omnisparse_flex.errors import ConfigError, require


def auto_class(model_dir: Path) -> tuple[Any, Any]:
    """The Auto class that takes the model, and its config.

    Raises:
        ConfigError: If transformers cannot read the directory, or the model generates no text.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    found = (model_dir / "config.json").is_file()
    require(found, "model_dir", "be a directory with a config.json", str(model_dir))
    config = guarded(lambda: AutoConfig.from_pretrained(model_dir, local_files_only=True))
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            return auto, config
    raise ConfigError(f"model must generate text, got {config.model_type!r} in {str(model_dir)!r}")


def load_model(auto: Any, model_dir: Path, device: torch.device) -> Any:
    """The model in eval mode; on a GPU in its own dtype."""
    # Half precision on a CPU is slow and inexact: it would measure the CPU, not the selection.
    dtype: Any = "auto" if device.type == "cuda" else torch.float32
    return guarded(lambda: auto.from_pretrained(model_dir, local_files_only=True, dtype=dtype)).eval().to(device)


def tokenizer_of(model_dir: Path) -> Any:
    """The tokenizer, or None where the directory holds none."""
    from transformers import AutoTokenizer

    if not any((model_dir / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    return guarded(lambda: AutoTokenizer.from_pretrained(model_dir, local_files_only=True))


def guarded(load: Callable[[], Any]) -> Any:
    """What transformers says of a broken directory, as the user's mistake that it is."""
    try:
        return load()
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model_dir must be loadable by transformers, got {type(error).__name__}: {error}") from error
