"""Glyphs of 16 x 16 bits as grids of tokens, read from a font in GNU Unifont's .hex format.

Debian's package ``unifont`` has one (/usr/share/unifont/unifont.hex); it is not part of this repository.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SIDE = 16
DARK, LIGHT, START, OTHER = 0, 1, 2, 3
VOCAB = 4
#: Of the glyphs, one in so many is held out.
HELD_OUT = 16


def read(path: Path) -> Tensor:
    """Every distinct 16 x 16 glyph, int64 (glyphs, 256) of 0 and 1; in an order that depends on the file alone."""
    digits = SIDE * SIDE // 4
    rows = {line.partition(":")[2].strip() for line in path.read_text("ascii").splitlines()}
    wide = sorted(row for row in rows if len(row) == digits)
    if not wide:
        raise ValueError(f"no glyph of {SIDE} x {SIDE} bits in {path}")
    packed = np.frombuffer(bytes.fromhex("".join(wide)), dtype=np.uint8)
    bits = torch.from_numpy(np.unpackbits(packed).reshape(len(wide), SIDE * SIDE).astype(np.int64))
    return bits[torch.randperm(len(bits), generator=torch.Generator().manual_seed(0))]


def split(glyphs: Tensor) -> tuple[Tensor, Tensor]:
    """Training and held-out glyphs."""
    held_out = torch.arange(len(glyphs)) % HELD_OUT == 0
    return glyphs[~held_out], glyphs[held_out]


def batches(glyphs: Tensor, size: int, steps: int, seed: int):
    """``steps`` random batches (size, 256)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield glyphs[torch.randint(len(glyphs), (size,), generator=generator)]
