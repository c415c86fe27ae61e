"""``omnisparse-flex calibrate``: rules for the user's model, measured on the user's text or video."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnisparse_flex.api import apply_omnisparse
from omnisparse_flex.calibration.device_speed import measure_costs
from omnisparse_flex.calibration.probe import probed_rules
from omnisparse_flex.calibration.progress import Progress
from omnisparse_flex.calibration.search import run_calibration
from omnisparse_flex.cli import check
from omnisparse_flex.cli.loading import auto_class, load_for_inputs, tokenizer_of
from omnisparse_flex.cli.processor import PROMPT
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.cost_model import LAST, Costs, costs_of, user_file, write
from omnisparse_flex.errors import ConfigError, require
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from omnisparse_flex.model.decoder_facts import head_shapes


@dataclasses.dataclass(frozen=True, slots=True)
class Material:
    """What the model is calibrated on: a text or a video.

    Attributes:
        text: A UTF-8 text file, or None.
        video: A video file, or None.
        tokens: Length of a window of the text.
        windows: Most windows of the text.
        max_frames: Most frames of the video.
    """

    text: Path | None = None
    video: Path | None = None
    tokens: int = 8192
    windows: int = 4
    max_frames: int = 64


def run_calibrate(
    model_dir: Path,
    rules: OmniSparseConfig,
    target_recall: float,
    material: Material,
    out: Path,
    *,
    min_seq_len: int | str,
) -> OmniSparseConfig:
    """Calibrate a model on disk, print the layers, write the rules as JSON.

    Args:
        model_dir: Holds ``config.json`` and weights.
        rules: All other rules: scoring, budget, sinks and so on.
        target_recall: True recall wanted of every head, in (0, 1).
        material: The text or video.
        out: Where the JSON goes; ``check --config`` and ``OmniSparseConfig.from_dict`` read it.
        min_seq_len: As in ``apply_omnisparse``.

    Returns:
        The rules that were written.

    Raises:
        ConfigError: If the model cannot be loaded or taken, or the material does not suit it.
    """
    # Checked before the weights are loaded.
    require(0 < target_recall < 1, "target_recall", "be in (0, 1)", target_recall)
    progress = Progress()
    auto, model_config = auto_class(model_dir)
    batches = build_batches(model_dir, model_config, material, progress)
    model, _ = load_for_inputs(auto, model_dir, batches, progress)
    apply_omnisparse(model, probed_rules(rules, target_recall), min_seq_len=min_seq_len)
    entry = compiled_decoder_of(model)
    assert entry is not None
    entry.backend.compile_hook = progress.compile_hook("sparse")
    result = run_calibration(model, batches, target_recall, progress=progress)
    out.write_text(json.dumps(result.config.to_dict(), indent=2) + "\n", encoding="utf-8")
    print(f"\n{result}\n\nrules: {out}")
    return result.config


def run_speed(model_dir: Path, rules: OmniSparseConfig) -> Costs:
    """Measure this machine with the model's head shape, and remember it for all later runs.

    Args:
        model_dir: Holds ``config.json``; no weights are read.
        rules: What the break-even is printed for.

    Returns:
        The costs that were written to ``cost.user_file()``.

    Raises:
        ConfigError: If the directory holds no model config, or the file of costs is broken.
    """
    progress = Progress()
    config = auto_class(model_dir)[1].get_text_config()
    shapes = head_shapes(config)
    require(bool(shapes), "model", "state its attention heads", type(config).__name__)
    shape = shapes[-1]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    costs_of(name)  # a broken file should not cost the measurement
    costs = measure_costs(shape, device, progress)
    write(name, costs, user_file())
    shortest = costs.break_even(shape, rules, name)
    verdict = f"sparse from {shortest} queries on" if shortest < LAST else "sparse never pays with these rules"
    print(f"\n{name}, {shape.heads}/{shape.kv_heads} heads of {shape.head_dim}: {verdict}\ncosts: {user_file()}")
    return costs


def build_batches(
    model_dir: Path, model_config: Any, material: Material, progress: Callable[[str], None]
) -> list[dict[str, Tensor]]:
    """The video as one input, or the text as evenly spread windows.

    Raises:
        ConfigError: On a text that the model's tokenizer is missing for, or that is empty or unreadable.
    """
    if material.video is not None:
        question = check.Question(material.video, PROMPT, material.max_frames)
        return [dict(check.build_inputs(model_dir, model_config, question, progress))]
    require(material.text is not None and material.text.is_file(), "text", "be an existing file", str(material.text))
    assert material.text is not None
    tokenizer = tokenizer_of(model_dir)
    require(tokenizer is not None, "model_dir", "hold a tokenizer to read a text", str(model_dir))
    try:
        text = material.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"text must be UTF-8, got {str(material.text)!r} ({error.reason})") from error
    ids: Tensor = tokenizer(text, return_tensors="pt")["input_ids"]
    require(ids.numel() > 0, "text", "hold at least one token", str(material.text))
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", material.tokens)
    tokens = min(material.tokens, longest, ids.shape[1])
    count = min(material.windows, max(1, ids.shape[1] // tokens))
    starts = [(ids.shape[1] - tokens) * i // max(count - 1, 1) for i in range(count)]
    progress(f"{count} windows of {tokens} tokens from {ids.shape[1]}")
    return [{"input_ids": ids[:, start : start + tokens].long()} for start in starts]
