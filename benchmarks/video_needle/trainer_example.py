"""The same task with transformers' own ``Trainer``: what a user would copy. OmniSparse is one line.

python3 -m benchmarks.video_needle.trainer_example --out runs/example --steps 200 --omnisparse '{"target_recall": 0.9}'
python3 -m benchmarks.video_needle.trainer_example --out runs/example --steps 200 --resume      # after an interruption
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.video_needle.backgrounds import load
from benchmarks.video_needle.data import IGNORE, batch_of, inputs, position_ids
from benchmarks.video_needle.model import make_model
from benchmarks.video_needle.scene import CELLS, STEPS
from omnisparse_flex import OmniSparseConfig, apply_omnisparse
from omnisparse_flex.errors import ConfigError


class Videos(torch.utils.data.Dataset):
    """Item i is video i of the training split, with its questions, as the stock model takes it."""

    def __init__(self, count: int, length: int, rounds: int = 2) -> None:
        self.count, self.steps, self.rounds = count, STEPS[length], rounds
        self.clips, self.positions = load(), position_ids(self.steps, rounds)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch = batch_of("train", index, 1, self.steps, self.rounds)[0]
        return inputs(batch, self.positions, self.clips, torch.float32) | {"labels": batch.answers}


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join videos: positions along their second axis, everything else along the first."""
    joined = {name: torch.cat([item[name] for item in items], 1 if name == "position_ids" else 0) for name in items[0]}
    # The tower looks at single frames: the videos of a batch are one long video to it.
    joined["video_grid_thw"] = joined["video_grid_thw"][:1].clone()
    joined["video_grid_thw"][0, 0] = len(joined["pixel_values_videos"]) // CELLS
    return joined


def answer_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross entropy at the question marks: the answer is read there, not at the next token."""
    loss = F.cross_entropy(outputs.logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss / ((labels != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch)


def train(options: argparse.Namespace, sizes: dict[str, int] | None = None) -> Any:
    """Build everything, train, return the ``Trainer``."""
    from transformers import Trainer, TrainingArguments

    class ExactTrainer(Trainer):
        """transformers renames the keys of Qwen2.5-VL when it saves, and its ``Trainer`` does not rename them back.

        Resumed with the stock class, such a model starts from fresh weights, with a warning.
        """

        def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
            saved = type(self.model).from_pretrained(checkpoint, dtype=torch.float32)
            self.model.load_state_dict(saved.state_dict())

    model = make_model(0, **(sizes or {}))
    if options.omnisparse is not None:
        apply_omnisparse(model, OmniSparseConfig.from_dict(options.omnisparse))  # the one line
    arguments = TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=1e-3,
        max_grad_norm=1.0,
        bf16=torch.cuda.is_available(),
        save_steps=options.save_steps,
        logging_steps=max(1, options.steps // 50),
        report_to=[],
        remove_unused_columns=False,
        label_names=["labels"],
        seed=0,
        disable_tqdm=True,
    )
    data = Videos(options.steps * options.batch, options.length)
    trainer = ExactTrainer(
        model=model, args=arguments, train_dataset=data, data_collator=collate, compute_loss_func=answer_loss
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    return trainer


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="videos of a step")
    parser.add_argument("--length", type=int, choices=sorted(STEPS), default=2048, help="visual tokens of a video")
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--omnisparse", type=json.loads, help="OmniSparseConfig fields as JSON; left out: dense")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and save the model."""
    try:
        trainer = train(parse(arguments))
    except ConfigError as error:
        print(f"trainer_example.py: {error}", file=sys.stderr)
        return 2
    trainer.save_model()
    return 0


if __name__ == "__main__":
    sys.exit(main())
