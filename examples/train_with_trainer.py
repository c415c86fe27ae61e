"""Fine-tuning with transformers' ``Trainer``: sparse attention is one line, and a callback leads the model into it.

A tiny Llama with random weights learns to count. On a CPU training runs without sparse kernels: the loss is
the same, the time is not what a GPU would show.

    python examples/train_with_trainer.py --out runs/example
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from omnisparse_flex import OmniSparseConfig, apply_omnisparse
from omnisparse_flex.warmup import RecallWarmup

VOCABULARY, TOKENS = 32, 320


class Counting(torch.utils.data.Dataset):
    """Sequences that count up from some number, in steps of 1, 2 or 3."""

    def __init__(self, count: int) -> None:
        """``count`` items."""
        self.count = count

    def __len__(self) -> int:
        """Number of items."""
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``labels``, int64 (TOKENS,)."""
        ids = (index + torch.arange(TOKENS) * (1 + index % 3)) % VOCABULARY
        return {"input_ids": ids, "labels": ids}


class Warmup(TrainerCallback):
    """Lowers the target recall from 1 to the config's while the model learns."""

    def __init__(self, steps: int) -> None:
        """Over so many steps."""
        self.steps = steps

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **rest: Any) -> None:
        """Start at a recall of 1."""
        self.recall = RecallWarmup(model, self.steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Go one step further."""
        self.recall.step()


def run(out: str, steps: int = 20) -> list[float]:
    """Train.

    Args:
        out: Folder for what ``Trainer`` writes.
        steps: Optimiser steps.

    Returns:
        The loss of every step.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TOKENS,
    )
    model = LlamaForCausalLM(config)
    apply_omnisparse(model, OmniSparseConfig(target_recall=0.9, window_size=32, sink_size=16), min_seq_len=0)

    arguments = TrainingArguments(
        output_dir=out,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Counting(4 * steps), callbacks=[Warmup(max(1, steps // 2))]
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=tempfile.gettempdir(), help="folder of the run")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    losses = run(options.out, options.steps)
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
