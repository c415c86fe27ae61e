"""One model, its optimizer, its curves: everything of training but the command line."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.video_needle import checkpoint, evaluate, plot
from benchmarks.video_needle.backgrounds import load
from benchmarks.video_needle.data import Batch, batch_of, position_ids
from benchmarks.video_needle.losses import count_hits, task_losses
from benchmarks.video_needle.model import count_parameters, embed, frame_layout, make_model
from benchmarks.video_needle.optimizer import make_optimizers, set_rate
from benchmarks.video_needle.recorded_step import Recorder
from benchmarks.video_needle.render import render
from benchmarks.video_needle.scene import CELLS, STEPS
from benchmarks.video_needle.schedule import Schedule
from benchmarks.video_needle.vocabulary import KINDS
from omnisparse_flex import OmniSparseConfig, apply_omnisparse
from omnisparse_flex.errors import require

#: Steps between two progress lines, and whose means the history keeps.
LOG_EVERY = 20
#: Seconds of training between two looks at held-out videos, and how many of them.
CHECK_EVERY, CHECKED = 15.0, 32
#: Videos of the validation split that are asked about at the end, by length.
VALIDATION = {512: 256, 2048: 128, 8192: 48, 32768: 8}


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
    """One model, its optimizers and how far it is."""

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
            apply_omnisparse(self.model, config, min_seq_len=0, dynamic=False)
        for layer in self.model.model.language_model.layers if compile_layers else ():
            layer.compile(dynamic=True)
        self.optimizers = make_optimizers(self.model, schedule.lr, device)
        self.weights = torch.tensor([1.0, schedule.narration, schedule.recall], device=device)
        self.tapped: list[Tensor] = []
        layers = self.model.model.language_model.layers
        require(schedule.early < len(layers), "early", f"be under {len(layers)}", schedule.early)
        if schedule.early:
            layers[schedule.early - 1].register_forward_hook(self._tap)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.held_out: list[dict[str, Any]] = []
        self.before: dict[str, Any] | None = None
        self.clips = load().to(device)
        self.layouts: dict[tuple[int, int], tuple[Tensor, dict[str, Any]]] = {}
        self.update = Recorder(self._update) if device.type == "cuda" else self._update

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses as ``task_losses`` returns them, and hits as ``count_hits`` does."""
        return self._forward(*self.tensors(batch))

    def tensors(self, batch: Batch) -> tuple[Tensor, ...]:
        """What a step is computed from, in shapes that repeat: ids, labels and the drawn pixels."""
        batch = batch.to(self.device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        pixels = render(batch.crops, batch.gains, batch.sprites, self.clips, dtype)
        return batch.input_ids, batch.answers, batch.narration, batch.kinds, pixels

    def _forward(
        self, ids: Tensor, answers: Tensor, narration: Tensor, kinds: Tensor, pixels: Tensor
    ) -> tuple[Tensor, Tensor]:
        frames = len(pixels) // CELLS
        positions, layout = self._layout(frames // len(ids), frames)
        text = 2 + len(pixels) // len(ids)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            given: dict[str, Any] = embed(self.model, ids, pixels, layout)
            if self.omnisparse is None:
                # While a step is recorded the stock class would make a causal mask that it else leaves to SDPA.
                given["attention_mask"] = {"full_attention": None}
            logits = self.model(**given, position_ids=positions.expand(3, len(ids), -1), use_cache=False).logits.float()
            early = [self._read(state) for state in self.tapped]
        if self.schedule.early and not early:
            warnings.warn("the compiled decoder hides the early layer: narration counts at the end alone", stacklevel=2)
        self.tapped.clear()
        return task_losses(logits, answers, narration, text, early), count_hits(logits, answers, kinds, text)

    def _layout(self, steps: int, frames: int) -> tuple[Tensor, dict[str, Any]]:
        """Positions of a video of ``steps`` and the tower's layout of a batch of ``frames``."""
        if (steps, frames) not in self.layouts:
            positions = position_ids(steps, self.schedule.rounds, self.device)
            self.layouts[steps, frames] = positions, frame_layout(self.model, frames, self.device)
        return self.layouts[steps, frames]

    def _tap(self, _module: nn.Module, _given: tuple[Any, ...], state: Tensor) -> None:
        self.tapped.clear()  # an evaluation may have left one
        self.tapped.append(state)

    def _read(self, state: Tensor) -> Tensor:
        """Logits of a state between layers: what could be told if it were the last."""
        return self.model.lm_head(self.model.model.language_model.norm(state)).float()

    def train_step(self, batch: Batch) -> Tensor:
        """One optimizer step.

        Returns:
            float32 (3 + 2 * kinds): the losses, right answers and questions by kind; still on the device.
        """
        set_rate(self.optimizers, self.schedule.lr_at(self.step))
        self.step += 1
        return self.update(*self.tensors(batch))

    def _update(self, *tensors: Tensor) -> Tensor:
        losses, hits = self._forward(*tensors)
        (losses @ self.weights).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return torch.cat([losses.detach(), hits.flatten()])

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
        since = started = checked = time.monotonic()
        waited = 0.0
        ready = since
        for batch in loader:
            waited += time.monotonic() - ready
            rows.append(self.train_step(batch))
            if len(rows) == LOG_EVERY or self.step == steps.stop:
                means = torch.stack(rows).cpu()  # waits for the device
                now = time.monotonic()
                self._log(means, batch, now - since, waited)
                if now - checked > CHECK_EVERY or now > deadline or self.step == steps.stop:
                    self._check(batch.steps * CELLS, self.seconds + now - started)
                    checked = time.monotonic()
                rows, since, waited = [], time.monotonic(), 0.0
                if now > deadline:
                    break
            ready = time.monotonic()
        self.seconds += time.monotonic() - started

    def _check(self, length: int, seconds: float) -> None:
        """Accuracy on videos of the validation split, with the graphs that training has compiled."""
        videos = self.schedule.tokens // length
        found = torch.zeros(2, len(KINDS), device=self.device)
        for first in range(0, max(CHECKED, videos), videos):
            batch = batch_of("val", first, videos, STEPS[length], self.schedule.rounds)[0]
            found += self.forward(batch.to(self.device))[1]
        accuracy = dict(zip(KINDS, (found[0] / found[1].clamp(min=1)).tolist(), strict=True))
        self.held_out.append({"step": self.step, "seconds": seconds, "length": length, "accuracy": accuracy})
        print(f"held out {length}: {evaluate.describe(accuracy)}  ({seconds:.0f} s)", flush=True)

    def _log(self, rows: Tensor, batch: Batch, seconds: float, waited: float) -> None:
        right, asked = rows[:, 3:].sum(0).view(2, len(KINDS))
        accuracy = (right / asked.clamp(min=1)).tolist()
        entry = {
            "step": self.step,
            "length": self.schedule.length_at(self.step - 1),
            "answer_loss": float(rows[:, 0].mean()),
            "narration_loss": float(rows[:, 1].mean()),
            "recall_loss": float(rows[:, 2].mean()),
            "lr": self.schedule.lr_at(self.step - 1),
            "accuracy": dict(zip(KINDS, accuracy, strict=True)),
            "tokens_per_second": batch.input_ids.numel() * len(rows) / seconds,
            "waited_for_data": waited / seconds,
        }
        self.history.append(entry)
        losses = "  ".join(f"{name} {entry[name + '_loss']:.3f}" for name in ("answer", "narration", "recall"))
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
            "held_out": self.held_out,
            "before": self.before,
        }

    def begin_with(self, directory: Path) -> None:
        """A new run from a checkpoint's weights; its record stays with this run's."""
        self.before = checkpoint.load(directory, self.model) | {"directory": directory.name}

    def save(self, directory: Path, final: bool = False) -> None:
        """Write the checkpoint, ``final`` as ``checkpoint.save`` says, and the picture of the curves."""
        checkpoint.save(directory, self.model, self.optimizers, self.record(), final)
        plot.curves(self.history, directory / "loss.png")

    def resume(self, directory: Path) -> None:
        """Go on where a checkpoint stopped.

        Raises:
            ConfigError: If it belongs to another plan, attention or model.
        """
        record = checkpoint.read_record(directory)
        require(not record.get("final"), "resume", "name a checkpoint with its optimizers' moments", str(directory))
        for name, own in (
            ("schedule", self.schedule.to_dict()),
            ("omnisparse", self.omnisparse),
            ("sizes", self.sizes),
        ):
            require(record[name] == own, name, f"be the checkpoint's {record[name]}", own)
        checkpoint.load(directory, self.model, self.optimizers)
        if isinstance(self.update, Recorder):
            self.update.forget()  # the moments are other tensors now
        self.step, self.seconds = record["step"], record["seconds"]
        self.history, self.held_out, self.before = record["history"], record["held_out"], record["before"]

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
