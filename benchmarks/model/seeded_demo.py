"""A Qwen2.5-VL with seeded, untrained weights watches a real clip, dense and sparse; ``bench_demo`` runs it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.model import seeded_weights as seeded
from benchmarks.model.random_blocks import RANDOM, random_switch
from benchmarks.model.seeded_tables import closeness, times
from omnisparse_flex.api import apply_omnisparse, remove_omnisparse, rewrite_report
from omnisparse_flex.calibration.progress import Progress
from omnisparse_flex.cli import compare, plot, video
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.model.cache_argument import as_cache_argument, cache_of
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from omnisparse_flex.model.hf import find_decoder
from omnisparse_flex.report import RewriteReport
from omnisparse_flex.stats import Stats, collect_stats

PICTURE, FIGURES = "omnisparse_masks.png", "omnisparse_stats.json"
PROMPT = "You are watching a short clip. Look closely at what moves and at what stays. "
QUESTION = " What does the big white rabbit do after it has left its burrow?"
#: Rules of the demo. Our choice: a target that the seeded attention can show something at.
CONFIG = OmniSparseConfig(target_recall=0.9, sink_size=64, window_size=256, lazy_threshold=0.05)
#: Dense below: far under the clip's length and far over a decoding step's. The demo shows the sparse
#: path; which length pays on a device is ``min_seq_len="auto"``'s business.
MIN_SEQ_LEN = 512
#: A length that no prompt reaches: compiled, but dense.
NEVER = 1 << 30
GENERATED = 8
#: Figures that the project claims, errors over all positions; benchmarks/model/bench_demo.py records them.
CLAIMED = ("density", "rel_error", "rel_error_random")
#: A target that asks for nothing beyond the always-kept keys.
NOTHING = 1e-6
#: The first 256 ids are the bytes of UTF-8 text: there is no tokenizer without a trained model.
VOCABULARY, VISION_START, VISION_END, VIDEO, IMAGE = 512, 508, 509, 510, 511


@dataclasses.dataclass(frozen=True, slots=True)
class Size:
    """How much the demo does.

    Attributes:
        frames: Frames of the clip.
        pixels: Most pixels of a frame.
        layers: Text decoder layers.
        repeats: Timed runs of each kind.
    """

    frames: int
    pixels: int
    layers: int
    repeats: int


#: 18 x 32 tokens from each pair of frames.
FULL = Size(frames=16, pixels=504 * 896, layers=3, repeats=3)
QUICK = Size(frames=24, pixels=252 * 448, layers=1, repeats=1)


def build_model(layers: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A small stock ``Qwen2_5_VLForConditionalGeneration`` with seeded weights.

    Args:
        layers: Text decoder layers.
        device: Where it goes.
        dtype: Its dtype.
        seed: Of the weights.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": layers,
        "num_attention_heads": 8, "num_key_value_heads": 2, "rope_parameters": rope,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    tower = {
        "depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 256,
        "window_size": 112, "fullatt_block_indexes": [2], "tokens_per_second": 2,
    }  # fmt: skip
    ids = {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=tower, video_token_id=VIDEO, image_token_id=IMAGE, **ids)  # type: ignore[arg-type]
    model = Qwen2_5_VLForConditionalGeneration(config)
    seeded.seed_weights(model, seed)
    return model.eval().to(device=device, dtype=dtype)


def build_inputs(frames: Tensor, frame_seconds: float, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The model's inputs: text, the clip, a question.

    Args:
        frames: uint8 (T, H, W, 3) of whole tokens.
        frame_seconds: Time between two frames.
        device: Where they go.
        dtype: Of the pixels.
    """
    pixels, grid = video.qwen_patches(frames)
    before, after = list(PROMPT.encode()), list(QUESTION.encode())
    clip = [VISION_START, *[VIDEO] * video.video_tokens(grid), VISION_END]
    ids = torch.tensor([before + clip + after], device=device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == VIDEO).int() * 2,
        "pixel_values_videos": pixels.to(device=device, dtype=dtype),
        "video_grid_thw": grid.to(device),
        "second_per_grid_ts": torch.tensor([frame_seconds * video.TEMPORAL_PATCH], device=device),
    }


def run_demo(out: Path, *, quick: bool = False) -> dict[str, Any]:
    """Run everything, print it, and save the picture and the figures.

    Args:
        out: Directory for ``PICTURE`` and ``FIGURES``; made when missing.
        quick: A smaller clip and model.

    Returns:
        The figures, as saved.
    """
    out.mkdir(parents=True, exist_ok=True)
    progress, size = Progress(), QUICK if quick else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with progress.step(f"decoding {video.demo_clip().name}"):
        frames, seconds = video.read_frames(video.demo_clip(), size.frames)
        inputs = build_inputs(video.resize_frames(frames, size.pixels), seconds, device, dtype)
    model = build_model(size.layers, device, dtype)
    visual, tokens = int((inputs["input_ids"] == VIDEO).sum()), inputs["input_ids"].shape[1]
    progress(f"Qwen2.5-VL, {size.layers} text layers, seeded weights (not trained), on {_name(device)} in {dtype}")
    progress(f"{tokens} tokens, {visual} of them visual, from {len(frames)} frames")
    figures, stats, report = _Trial(model, inputs, size, progress).run()
    versions = {"device": _name(device), "torch": torch.__version__}
    figures = {**versions, "tokens": tokens, "visual_tokens": visual, **figures}
    where = f"{tokens} tokens, {visual} of them Big Buck Bunny"
    title = f"OmniSparse block masks\n{where} · target recall {CONFIG.target_recall} · density {stats.density:.2f}"
    kv_heads = model.config.text_config.num_key_value_heads
    plot.save_masks(stats, tokens, kv_heads, out / PICTURE, title=title)
    figures["seconds"] = progress.seconds
    full = {**figures, "config": CONFIG.to_dict(), "stats": stats.to_dict(), "report": report.to_dict()}
    (out / FIGURES).write_text(json.dumps(full, indent=1), encoding="utf-8")
    print(f"\nAttention sites\n{report}\n\nWhat each layer kept\n{stats}\n\n{closeness(figures)}\n\n{times(figures)}\n")
    print("\n".join(f"demo.{name} {figures[name]:.4f}" for name in CLAIMED))
    progress(f"saved {out / PICTURE} and {out / FIGURES}")
    return full


class _Trial:
    """The runs of one model on one input."""

    def __init__(self, model: Any, inputs: dict[str, Any], size: Size, progress: Progress) -> None:
        self.model, self.inputs, self.size, self.progress = model, inputs, size, progress
        self.decoder: nn.Module = find_decoder(model)
        self.positions = inputs["input_ids"].shape[1]

    def run(self) -> tuple[dict[str, Any], Stats, RewriteReport]:
        """All of it; figures by name, the sparse statistics, the report."""
        with self.progress.step("dense prefill, plain SDPA"):
            plain = self._measure()
        with self.progress.step(f"dense: generating {GENERATED} tokens"):
            dense_tokens = greedy(self.model, self.inputs, GENERATED, self.positions)
        with self.progress.step("dense prefill, compiled"):
            compiled = self._apply("dense", NEVER)._measure()
        with self.progress.step("sparse prefill"):
            sparse = self._apply("sparse")._measure()
        with self.progress.step(f"sparse: generating {GENERATED} tokens"):
            sparse_tokens = greedy(self.model, self.inputs, GENERATED, self.positions)
        with self.progress.step("sparse prefill with statistics"), random_switch():
            logits, stats = self._recorded()
        with self.progress.step("controls: random blocks at the same budgets, always-kept keys only"):
            random_logits, random = self._recorded(lambda target: target + RANDOM)
            local_logits, local = self._recorded(lambda target: target * 0 + NOTHING)
        report = rewrite_report(self.model)
        remove_omnisparse(self.model)
        exact = plain.logits
        figures = {
            **_closeness("", logits, exact, stats),
            **_closeness("_random", random_logits, exact, random),
            **_closeness("_always_kept", local_logits, exact, local),
            **_times(plain, compiled, sparse),
            "generated_dense": dense_tokens,
            "generated_sparse": sparse_tokens,
        }
        return figures, stats, report

    def _apply(self, what: str, min_seq_len: int = MIN_SEQ_LEN) -> _Trial:
        apply_omnisparse(self.model, CONFIG, min_seq_len=min_seq_len)
        entry = compiled_decoder_of(self.model)
        if entry is not None:
            entry.backend.compile_hook = self.progress.compile_hook(what)
        return self

    def _measure(self) -> compare.Run:
        return compare.measure(self.model, self.decoder, self.inputs, self.positions, self.size.repeats)

    def _recorded(self, change: Callable[[Tensor], Tensor] = torch.clone) -> tuple[Tensor, Stats]:
        """Logits and statistics of one prefill, with the layers' targets changed for its length."""
        entry = compiled_decoder_of(self.model)
        assert entry is not None
        targets = entry.state.recall
        entry.state.recall = change(targets)
        try:
            with collect_stats(self.model, exact=True, maps=True) as stats:
                return compare.last_logits(self.model, self.inputs, self.positions), stats
        finally:
            entry.state.recall = targets


def _closeness(suffix: str, logits: Tensor, exact: Tensor, stats: Stats) -> dict[str, float]:
    """Distances over every position, and over the question's alone: few, and the hardest to select for."""
    asked = slice(-len(QUESTION.encode()), None)
    figures = {
        "density": stats.density,
        "true_recall": _mean_recall(stats),
        "rel_error": compare.relative_error(logits, exact),
        "rel_error_question": compare.relative_error(logits[asked], exact[asked]),
        "top1": compare.top1_agreement(logits, exact),
    }
    return {name + suffix: value for name, value in figures.items()}


def _times(plain: compare.Run, compiled: compare.Run, sparse: compare.Run) -> dict[str, float]:
    seconds = {
        f"{part}_s_{name}": getattr(run, f"{part}_s")
        for name, run in (("dense_plain", plain), ("dense_compiled", compiled), ("sparse", sparse))
        for part in ("model", "decoder")
    }
    speed = {
        f"speedup_{part}": min(seconds[f"{part}_s_dense_plain"], seconds[f"{part}_s_dense_compiled"])
        / seconds[f"{part}_s_sparse"]
        for part in ("model", "decoder")
    }
    return {**seconds, **speed}


def _mean_recall(stats: Stats) -> float:
    recalls = [recall for layer in stats.per_layer() for recall in layer.true_recall]
    return sum(recalls) / max(len(recalls), 1)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


@torch.no_grad()
def greedy(model: nn.Module, inputs: compare.Inputs, tokens: int, positions: int) -> list[int]:
    """Greedily generated token ids of the first batch row; the end token does not stop it.

    The steps of ``generate``, but from the prefill that ``measure`` runs: ``generate`` hands the
    decoder other position tensors, and that would be one more graph to compile.

    Args:
        model: A causal language model of transformers.
        inputs: Its keyword arguments: one row without padding.
        tokens: How many.
        positions: As in ``measure``, so that the graph is the same.
    """
    output = compare.prefill(model, inputs, positions)
    found: list[int] = []
    for _ in range(tokens):
        found.append(int(output.logits[0, -1].argmax()))
        step = torch.tensor([found[-1:]], device=output.logits.device)
        output = model(input_ids=step, **as_cache_argument(model.forward, cache_of(output)), use_cache=True)
    return found
