"""``omnisparse-flex check``: dense against sparse on the user's model and input, and one verdict."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnisparse_flex.api import apply_omnisparse, remove_omnisparse, rewrite_report
from omnisparse_flex.calibration.progress import Progress
from omnisparse_flex.cli import compare, plot, video
from omnisparse_flex.cli.loading import auto_class, load_for_inputs, loaded, tokenizer_of
from omnisparse_flex.cli.processor import has_processor, processed
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.config_schema import SCHEMA
from omnisparse_flex.errors import ConfigError, require
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from omnisparse_flex.model.hf import find_decoder
from omnisparse_flex.report import table
from omnisparse_flex.rules_file import load_rules
from omnisparse_flex.stats import Stats, collect_stats

#: Last positions whose next-token distributions are compared.
POSITIONS = 64
#: Smallest share of positions with the same most likely token for the verdict "safe". Our choice, as the next two.
SAFE_TOP1 = 0.95
#: Largest KL(dense || sparse) for "safe", in nats, mean over positions.
SAFE_KL = 0.05
#: Smallest mean true recall of any head for "safe".
SAFE_RECALL = 0.8
#: Smallest ratio of the times to the first token for "faster"; smaller ones are within the noise.
FASTER = 1.05
#: Most pixels of a video frame.
PIXELS = 504 * 896

VERDICTS = ("safe and faster", "safe but not faster at this length", "not safe")


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """The input of the model.

    Attributes:
        video: A video file, or None.
        prompt: The text, or None: seeded token ids.
        max_frames: Most frames of the video.
        tokens: Number of seeded token ids.
    """

    video: Path | None = None
    prompt: str | None = None
    max_frames: int = 64
    tokens: int = 4096


def config_from(source: str | None) -> OmniSparseConfig:
    """The rules from JSON text, or from a file with it.

    Raises:
        ConfigError: On unreadable JSON, unknown fields or invalid values.
    """
    if source is None:
        return OmniSparseConfig()
    inline = source.lstrip().startswith("{")
    require(inline or Path(source).exists(), "config", "be JSON text or an existing file", source)
    if not inline:
        return load_rules(source)
    try:
        fields = json.loads(source)
    except json.JSONDecodeError as error:
        raise ConfigError(f"config must be valid JSON, got {source!r} ({error})") from error
    # Text in a command is written for this version; a file without a schema, by the first one.
    return OmniSparseConfig.from_dict({"schema": SCHEMA, **fields} if inline and isinstance(fields, dict) else fields)


def explain_model(model_dir: Path, config: OmniSparseConfig) -> None:
    """Print the rewrite report of a model on disk, from its config alone.

    Args:
        model_dir: Holds ``config.json``.
        config: The rules.

    Raises:
        ConfigError: If transformers or this library cannot take the model.
    """
    auto, model_config = auto_class(model_dir)
    with torch.device("meta"):
        model = loaded(lambda: auto.from_config(model_config)).eval()
    apply_omnisparse(model, config, min_seq_len=0)
    print(f"{type(model).__name__}\n{rewrite_report(model)}")


def run_check(
    model_dir: Path,
    config: OmniSparseConfig,
    question: Question,
    *,
    min_seq_len: int | str,
    heatmap: Path | None = None,
) -> str:
    """Run the model densely and sparsely, print the comparison and the verdict.

    Args:
        model_dir: Holds ``config.json`` and weights.
        config: The rules.
        question: The input.
        min_seq_len: As in ``apply_omnisparse``.
        heatmap: Where a picture of true recall and density goes, or None.

    Returns:
        One of ``VERDICTS``.

    Raises:
        ConfigError: If the model cannot be loaded or taken, or the input does not suit it.
    """
    progress = Progress()
    auto, model_config = auto_class(model_dir)
    inputs = build_inputs(model_dir, model_config, question, progress)
    model, device = load_for_inputs(auto, model_dir, [inputs], progress)
    inputs = {name: x.to(device) for name, x in inputs.items()}
    dense, sparse, stats = _both_runs(model, inputs, config, min_seq_len, progress)
    if heatmap is not None:
        title = f"{model_dir.name}, {inputs['input_ids'].shape[1]} tokens"
        plot.save_heatmap(stats, heatmap, title=title, safe=SAFE_RECALL)
        print(f"picture: {heatmap}")
    return _judge(dense, sparse, stats)


def _both_runs(
    model: Any, inputs: dict[str, Any], config: OmniSparseConfig, min_seq_len: int | str, progress: Progress
) -> tuple[compare.Run, compare.Run, Stats]:
    """The dense and the sparse run, and the statistics of a second sparse one; the model is as before afterwards."""
    decoder, tokens = find_decoder(model), inputs["input_ids"].shape[1]
    positions = min(POSITIONS, tokens)
    with progress.step(f"dense prefill of {tokens} tokens, plain SDPA"):
        dense = compare.measure(model, decoder, inputs, positions)
    apply_omnisparse(model, config, min_seq_len=min_seq_len)
    entry = compiled_decoder_of(model)
    if entry is not None:
        entry.backend.compile_hook = progress.compile_hook("sparse")
    with progress.step("sparse prefill"):
        sparse = compare.measure(model, decoder, inputs, positions)
    with progress.step("sparse prefill with statistics"), collect_stats(model, exact=True) as stats:
        compare.last_logits(model, inputs, positions)
    print(f"\n{rewrite_report(model)}\n\n{stats}\n")
    remove_omnisparse(model)
    return dense, sparse, stats


def build_inputs(model_dir: Path, model_config: Any, question: Question, progress: Callable[[str], None]) -> Any:
    """Token ids of the prompt (or seeded ones), and the video's patches before them.

    Raises:
        ConfigError: On a video that the model cannot take or FFmpeg cannot decode.
    """
    if question.video is not None and not _cuts_patches_as_we_do(model_config):
        rule = "be left out unless model_dir holds the model's own processor, or the model is Qwen2-VL or Qwen2.5-VL"
        require(has_processor(model_dir), "video", rule, model_config.model_type)
        return processed(model_dir, question.video, question.prompt, question.max_frames)
    text = _text_ids(model_dir, model_config.get_text_config().vocab_size, question, progress)
    alone = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    return alone if question.video is None else _of_qwen(model_config, text, question.video, question.max_frames)


def _cuts_patches_as_we_do(model_config: Any) -> bool:
    tower: Any = getattr(model_config, "vision_config", None)
    sizes = [getattr(tower, name, None) for name in ("patch_size", "temporal_patch_size", "spatial_merge_size")]
    ours = sizes == [video.PATCH, video.TEMPORAL_PATCH, video.MERGE]
    return ours and model_config.model_type in ("qwen2_vl", "qwen2_5_vl")


def _of_qwen(model_config: Any, text: Tensor, clip: Path, max_frames: int) -> dict[str, Tensor]:
    """A video before the text for Qwen2-VL and Qwen2.5-VL, whose patches we cut ourselves: no torchvision needed."""
    tower, video_id = model_config.vision_config, model_config.video_token_id
    frames, seconds = video.read_frames(clip, max_frames)
    pixels, grid = video.qwen_patches(video.resize_frames(frames, PIXELS))
    inside = [video_id] * video.video_tokens(grid)
    span = [model_config.vision_start_token_id, *inside, model_config.vision_end_token_id]
    ids = torch.cat([torch.tensor([span]), text], dim=1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": ids.eq(video_id).int() * 2,
        "pixel_values_videos": pixels,
        "video_grid_thw": grid,
    }
    if hasattr(tower, "tokens_per_second"):  # Qwen2-VL numbers frames, Qwen2.5-VL seconds
        inputs["second_per_grid_ts"] = torch.tensor([seconds * video.TEMPORAL_PATCH])
    return inputs


def _text_ids(model_dir: Path, vocabulary: int, question: Question, progress: Callable[[str], None]) -> Tensor:
    tokenizer = None
    if question.prompt is not None:
        tokenizer = tokenizer_of(model_dir)
        if tokenizer is None:
            progress(f"no tokenizer in {model_dir}: seeded random token ids instead of the prompt")
    if tokenizer is not None:
        ids: Tensor = tokenizer(question.prompt, return_tensors="pt")["input_ids"]
        require(ids.numel() > 0, "prompt", "hold at least one token", question.prompt)
        return ids
    # Beside a video the text is a short question.
    count = question.tokens if question.video is None else min(question.tokens, POSITIONS)
    progress(f"the text is {count} seeded random token ids: the distances below are those of noise, not of your data")
    # The special tokens are at the end of a vocabulary.
    return torch.randint(0, max(vocabulary // 2, 1), (1, count), generator=torch.Generator().manual_seed(0))


def _judge(dense: compare.Run, sparse: compare.Run, stats: Stats) -> str:
    top1 = compare.top1_agreement(sparse.logits, dense.logits)
    kl, speed = compare.mean_kl(sparse.logits, dense.logits), dense.model_s / sparse.model_s
    heads = [(recall, layer.layer, h) for layer in stats.per_layer() for h, recall in enumerate(layer.true_recall)]
    worst, layer, head = min(heads, default=(1.0, -1, -1))
    rows = [
        ["", "dense", "sparse"],
        ["time to first token", f"{dense.model_s:.3f} s", f"{sparse.model_s:.3f} s ({speed:.2f}x)"],
        ["of it the text decoder", f"{dense.decoder_s:.3f} s", f"{sparse.decoder_s:.3f} s"],
        ["peak memory", _gib(dense.peak_bytes), _gib(sparse.peak_bytes)],
    ]
    print("\n".join(table(rows)))
    print(f"top-1 agreement over the last {len(dense.logits)} positions: {top1:.3f} (safe from {SAFE_TOP1})")
    print(f"KL(dense || sparse): {kl:.4f} nats (safe to {SAFE_KL})")
    where = f"layer {layer}, query head {head}" if heads else "no layer ran sparsely at this length"
    print(f"worst head's true recall: {worst:.3f} ({where}; safe from {SAFE_RECALL})")
    print(f"density of the whole model: {stats.density:.3f}")
    result = verdict(top1, kl, worst, min(speed, dense.decoder_s / sparse.decoder_s), stats.density)
    print(f"verdict: {result}")
    return result


def verdict(top1: float, kl: float, worst_recall: float, speed: float, density: float) -> str:
    """One of ``VERDICTS`` from the measures and the thresholds above.

    Args:
        top1: Share of positions with the same most likely token.
        kl: KL(dense || sparse) in nats.
        worst_recall: Of the worst head.
        speed: Of the whole model or of its decoder, the smaller: what beside the decoder was faster was so by chance.
        density: Of the whole model; from 1 on nothing was saved.
    """
    if not (top1 >= SAFE_TOP1 and kl <= SAFE_KL and worst_recall >= SAFE_RECALL):
        return VERDICTS[2]
    return VERDICTS[0] if speed >= FASTER and density < 1 else VERDICTS[1]


def _gib(size: int | None) -> str:
    return "not measured on a CPU" if size is None else f"{size / 2**30:.2f} GiB"
