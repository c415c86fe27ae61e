"""One model, its optimizer, its curves: everything of training but the command line."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnisparse_flex import OmniSparseConfig, apply_omnisparse
from omnisparse_flex.errors import require
from video_needle import checkpoint, evaluate, plot
from video_needle.backgrounds import load
from video_needle.data import IGNORE, Batch, batch_of, inputs, position_ids
from video_needle.model import count_parameters, make_model
from video_needle.scene import STEPS
from video_needle.schedule import Schedule
from video_needle.vocabulary import IDS, KINDS, TOLD

#: Steps between two progress lines, and whose means the history keeps.
LOG_EVERY = 20
#: Videos of the validation split that are asked about at the end, by length.
VALIDATION = {512: 256, 2048: 128, 8192: 48, 32768: 8}


def narration_loss(logits: Tensor, narration: Tensor) -> Tensor:
    """Mean over classes of words of how well each class is told apart, other words left aside.

    Args:
        logits: float32 (T, vocabulary).
        narration: int64 (T, classes), ids or -100.
    """
    losses = []
    for column, words in enumerate(TOLD):
        first = IDS[words[0]]
        wanted = narration[:, column]
        wanted = torch.where(wanted == IGNORE, IGNORE, wanted - first)
        losses.append(F.cross_entropy(logits[:, first : first + len(words)], wanted, ignore_index=IGNORE))
    # A batch may show no digit at all: the mean of nothing is NaN.
    return torch.stack(losses).nan_to_num(0.0).mean()


class StepData(torch.utils.data.Dataset):
    """Item ``step`` is that step's batch: loaders may run ahead, the data stays a function of the step."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __len__(self) -> int:
        return self.schedule.total

    def __getitem__(self, step: int) -> Batch:
        length = self.schedule.length_at(step)
        videos = self.schedule.tokens // length
        return batch_of("train", self.schedule.first_video(step), videos, STEPS[length], self.schedule.rounds)[0]


class Trainer:
    """One model, its optimizer and how far it is."""

    def __init__(
        self,
        schedule: Schedule,
        device: torch.device,
        omnisparse: dict[str, Any] | None = None,
        sizes: dict[str, int] | None = None,
        compile_layers: bool = False,
    ) -> None:
        """Build a fresh model.

        Args:
            schedule: The plan.
            device: Where to train.
            omnisparse: Fields of an ``OmniSparseConfig`` to train with, or None: dense.
            sizes: Arguments of ``make_config``; None: its defaults.
            compile_layers: Compile the decoder's layers (dense training on a GPU).
        """
        config = None if omnisparse is None else OmniSparseConfig.from_dict(omnisparse)
        require(config is None or not compile_layers, "compile", "be left out with --omnisparse", compile_layers)
        self.schedule, self.device, self.omnisparse, self.sizes = schedule, device, omnisparse, sizes or {}
        self.model = make_model(schedule.seed, **self.sizes).to(device).train()
        if config is not None:
            apply_omnisparse(self.model, config, min_seq_len=0)
        for layer in self.model.model.language_model.layers if compile_layers else ():
            layer.compile(dynamic=True)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=schedule.lr,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=device.type == "cuda",
        )
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.clips = load().to(device)
        self.positions: dict[int, Tensor] = {}

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Forward pass: loss of the answers, of the narration, and which questions of which kind were right."""
        if batch.steps not in self.positions:
            self.positions[batch.steps] = position_ids(batch.steps, self.schedule.rounds, self.device)
        on_gpu = self.device.type == "cuda"
        given = inputs(batch, self.positions[batch.steps], self.clips, torch.bfloat16 if on_gpu else torch.float32)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on_gpu):
            logits = self.model(**given, use_cache=False).logits.flatten(0, 1).float()
        answers = batch.answers.flatten()
        right = logits.detach().argmax(-1) == answers
        # The kinds double as an index; everything that is no question falls into a last bin.
        kinds = batch.kinds.flatten()
        bins = torch.where(kinds == IGNORE, len(KINDS), kinds)
        hits = torch.zeros(len(KINDS) + 1, device=logits.device).index_add_(0, bins, right.float())
        asked = torch.zeros_like(hits).index_add_(0, bins, torch.ones_like(right, dtype=torch.float32))
        tell = narration_loss(logits, batch.narration.flatten(0, 1))
        return F.cross_entropy(logits, answers, ignore_index=IGNORE), tell, hits[:-1], asked[:-1]

    def train_step(self, batch: Batch) -> Tensor:
        """One optimizer step.

        Returns:
            float32 (2 + 2 * kinds): both losses, right answers and questions by kind; still on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr_at(self.step)
        answer, tell, hits, asked = self.losses(batch.to(self.device))
        (answer + self.schedule.narration * tell).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return torch.cat([torch.stack([answer, tell]).detach(), hits, asked])

    def run(self, deadline: float, last_step: int, workers: int) -> None:
        """Train until a wall-clock time or a step, whichever comes first; print and keep the curves."""
        steps = range(self.step, min(last_step, self.schedule.total))
        loader = torch.utils.data.DataLoader(
            StepData(self.schedule),
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=self.device.type == "cuda",
        )
        rows: list[Tensor] = []
        since = started = time.monotonic()
        for batch in loader:
            rows.append(self.train_step(batch))
            if len(rows) == LOG_EVERY or self.step == steps.stop:
                means = torch.stack(rows).cpu()  # waits for the device
                now = time.monotonic()
                self._log(means, batch, now - since)
                rows, since = [], now
                if now > deadline:
                    break
        self.seconds += time.monotonic() - started

    def _log(self, rows: Tensor, batch: Batch, seconds: float) -> None:
        kinds = len(KINDS)
        accuracy = (rows[:, 2 : 2 + kinds].sum(0) / rows[:, 2 + kinds :].sum(0).clamp(min=1)).tolist()
        entry = {
            "step": self.step,
            "length": self.schedule.length_at(self.step - 1),
            "answer_loss": float(rows[:, 0].mean()),
            "narration_loss": float(rows[:, 1].mean()),
            "lr": self.schedule.lr_at(self.step - 1),
            "accuracy": dict(zip(KINDS, accuracy, strict=True)),
            "tokens_per_second": batch.input_ids.numel() * len(rows) / seconds,
        }
        self.history.append(entry)
        losses = f"answer {entry['answer_loss']:.3f} narration {entry['narration_loss']:.3f}"
        speed = f"{entry['tokens_per_second'] / 1e3:.0f}K tokens/s"
        print(f"step {self.step:5d} len {entry['length']:5d} {losses}", end="  ")
        print(evaluate.describe(entry["accuracy"]), "", speed, flush=True)

    def record(self) -> dict[str, Any]:
        """Everything about the run that is not a tensor."""
        import transformers

        return {
            "step": self.step,
            "schedule": self.schedule.to_dict(),
            "omnisparse": self.omnisparse,
            "sizes": self.sizes,
            "seconds": self.seconds,
            "parameters": count_parameters(self.model),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "history": self.history,
        }

    def save(self, directory: Path) -> None:
        """Write the checkpoint and the picture of the curves."""
        checkpoint.save(directory, self.model, self.optimizer, self.record())
        plot.curves(self.history, directory / "loss.png")

    def resume(self, directory: Path) -> None:
        """Go on where a checkpoint stopped.

        Raises:
            ConfigError: If it belongs to another plan, attention or model.
        """
        record = checkpoint.read_record(directory)
        for name, own in (
            ("schedule", self.schedule.to_dict()),
            ("omnisparse", self.omnisparse),
            ("sizes", self.sizes),
        ):
            require(record[name] == own, name, f"be the checkpoint's {record[name]}", own)
        checkpoint.load(directory, self.model, self.optimizer)
        self.step, self.history, self.seconds = record["step"], record["history"], record["seconds"]

    def validate(self) -> dict[str, dict[str, float]]:
        """Accuracy on unseen videos of every length that was trained, one question of each kind a video."""
        trained = sorted({self.schedule.length_at(step) for step in range(self.step)})
        found = {}
        for length in trained:
            batch = max(1, self.schedule.tokens // length)
            result = evaluate.evaluate(self.model, "val", length, VALIDATION[length], batch)
            found[str(length)] = evaluate.by_kind(result)
            print(f"validation {length}: {evaluate.describe(found[str(length)])}", flush=True)
        return found
