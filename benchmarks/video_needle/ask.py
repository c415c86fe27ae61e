"""Questions about one generated clip, answered dense and sparse; ``omnisparse-flex demo`` runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.video_needle import release
from benchmarks.video_needle.backgrounds import load
from benchmarks.video_needle.data import IGNORE, Batch, batch_of, inputs, position_ids
from benchmarks.video_needle.scene import STEPS
from benchmarks.video_needle.vocabulary import WORDS
from omnisparse_flex import OmniSparseConfig, apply_omnisparse, collect_stats, remove_omnisparse
from omnisparse_flex.calibration.progress import Progress
from omnisparse_flex.cli.plot import save_masks
from omnisparse_flex.report import table

#: Visual tokens of the clip, and of the quick one. Which video: the first of the test split.
LENGTH, QUICK, VIDEO = 8192, 2048, 0
#: Rules where the model was trained without any: the defaults but for a window as narrow as the clip is short.
CONFIG = OmniSparseConfig(target_recall=0.9, budget="per_head", window_size=128)


def run(weights: Path, *, quick: bool = False, rounds: int = 2, picture: Path | None = None) -> dict[str, Any]:
    """Ask, print a table, count.

    Args:
        weights: A released folder.
        quick: A shorter clip.
        rounds: Questions of each kind.
        picture: Where a picture of the block masks goes, or None.

    Returns:
        ``questions``, ``truth``, ``dense``, ``sparse`` (lists of words), ``density``.

    Raises:
        ConfigError: If the folder is not usable; see ``release.load``.
    """
    progress, length = Progress(), QUICK if quick else LENGTH
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = release.load(weights).to(device)
    batch, _, (asked,) = batch_of("test", VIDEO, 1, STEPS[length], rounds)
    progress(f"a clip of {length} visual tokens, {len(asked)} questions; weights from {weights}")
    with progress.step("dense"):
        dense = answers(model, batch, rounds)
    trained = release.facts(weights)["omnisparse"]
    config = CONFIG if trained is None else OmniSparseConfig.from_dict(trained)
    apply_omnisparse(model, config, min_seq_len=0, dynamic=False)
    try:
        with progress.step("sparse (compiles first)"), collect_stats(model, maps=picture is not None) as stats:
            sparse = answers(model, batch, rounds)
    finally:
        remove_omnisparse(model)
    truth = [question.answer for question in asked]
    rows = [["question", "truth", "dense", "sparse"]]
    rows += [[q.text, t, d, s] for q, t, d, s in zip(asked, truth, dense, sparse, strict=True)]
    print("\n" + "\n".join(table(rows)))
    count = lambda said: sum(a == b for a, b in zip(said, truth, strict=True))  # noqa: E731
    progress(f"right: dense {count(dense)}, sparse {count(sparse)} of {len(truth)}, at density {stats.density:.3f}")
    if picture is not None:
        title = f"OmniSparse block masks\n{length} visual tokens of a generated clip · density {stats.density:.2f}"
        heads = model.config.get_text_config().num_attention_heads
        save_masks(stats, batch.answers.shape[1], heads, picture, title=title)
        progress(f"saved {picture}")
    told = {"questions": [question.text for question in asked], "truth": truth, "dense": dense, "sparse": sparse}
    return told | {"density": stats.density, "tokens": length}


@torch.no_grad()
def answers(model: Any, batch: Batch, rounds: int) -> list[str]:
    """The likeliest word at each question mark of a batch of one video."""
    device = next(model.parameters()).device
    positions = position_ids(batch.steps, rounds, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        logits: Tensor = model(**inputs(batch.to(device), positions, load().to(device), dtype), use_cache=False).logits
    said = logits[:, :, : len(WORDS)].argmax(-1).cpu()[batch.answers.cpu() != IGNORE]
    return [WORDS[i] for i in said.tolist()]
