"""ZipAR on a small model: fewer forwards for an image, what they cost in likelihood, and what training wins back.

Run it with ``python examples/zipar.py``.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from omnisparse_flex.grid import zipar_generate, zipar_loss

ROWS = COLUMNS = 8
DARK, LIGHT, START = 0, 1, 2
WINDOWS = (8, 4, 2, 1)


def pictures(count: int, seed: int) -> Tensor:
    """Rectangles on a dark ground, as token ids after a start token: int64 (count, 1 + 64)."""
    generator = torch.Generator().manual_seed(seed)
    top, left = torch.randint(0, 5, (2, count, 1, 1), generator=generator)
    height, width = torch.randint(2, 5, (2, count, 1, 1), generator=generator)
    row, column = torch.arange(ROWS)[:, None], torch.arange(COLUMNS)
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
    return torch.nn.functional.pad(inside.flatten(1).long(), (1, 0), value=START)


def trained(window: int | None, steps: int) -> LlamaForCausalLM:
    """A model trained in raster order (``window=COLUMNS``), or under a random window at each step (None)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=START,
        eos_token_id=None,
        pad_token_id=DARK,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(steps):
        zipar_loss(model, pictures(32, seed=step), (ROWS, COLUMNS), window, eol=False).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def measured(model: LlamaForCausalLM, window: int) -> tuple[int, float, Tensor]:
    """Forwards of one generation, bits per pixel of unseen pictures, and four generated ones, (4, 8, 8)."""
    output = model.generate(
        torch.full((4, 1), START),
        attention_mask=torch.ones(4, 1),
        custom_generate=zipar_generate,
        grid=(ROWS, COLUMNS),
        window=window,
        do_sample=True,
        suppress_tokens=[START],
        max_new_tokens=ROWS * COLUMNS,
        return_dict_in_generate=True,
    )
    nats = zipar_loss(model, pictures(128, seed=10_000), (ROWS, COLUMNS), window, eol=False)
    return output.forwards, nats.item() / math.log(2), output.sequences[:, 1:].view(4, ROWS, COLUMNS)


def run(steps: int = 250) -> dict[str, list[tuple[int, float, Tensor]]]:
    """Train both models and measure each under every window.

    Args:
        steps: Of training, for each model.

    Returns:
        For ``"raster"`` and ``"random windows"``, what ``measured`` returns for each of ``WINDOWS``.
    """
    found = {}
    for name, window in (("raster", COLUMNS), ("random windows", None)):
        model = trained(window, steps)
        found[name] = [measured(model, window) for window in WINDOWS]
    print("window  forwards  bits per pixel of a model trained in raster order / under random windows")
    for window, raster, random in zip(WINDOWS, *found.values(), strict=True):
        print(f"{window:6}  {raster[0]:8}  {raster[1]:.3f} / {random[1]:.3f}")
    for line in zip(*found["random windows"][1][2], strict=True):
        print("   ".join("".join(" #"[int(pixel)] for pixel in row) for row in line))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250, help="training steps of each model")
    run(parser.parse_args().steps)
