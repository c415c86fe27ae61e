"""A GPT of one's own, without transformers: the backend of ``torch.compile`` rewrites its attention.

Run it with ``python examples/plain_gpt.py``.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Causal attention and an MLP, as everybody writes them."""

    def __init__(self, width: int, heads: int) -> None:
        """``width`` is a multiple of ``heads``."""
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) to the same."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """Embeddings, blocks, logits."""

    def __init__(self, vocabulary: int = 256, width: int = 64, heads: int = 4, layers: int = 2, tokens: int = 1024):
        """For sequences of up to ``tokens`` tokens."""
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 (B, N) to logits (B, N, vocabulary)."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.blocks(x))


@torch.no_grad()
def run(inner: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Run the model densely, sparsely, and with a rule that keeps everything.

    Args:
        inner: What compiles the rewritten graphs.

    Returns:
        The three logits, (1, 1024, 256) each.
    """
    torch.manual_seed(0)
    model, ids = GPT().eval(), torch.randint(0, 256, (1, 1024))
    dense = model(ids)

    def compiled(**rules: object) -> nn.Module:
        options = {"config": {"sink_size": 16, "window_size": 64, **rules}, "min_seq_len": 0, "inner": inner}
        return torch.compile(model, backend="omnisparse", options=options)

    # min_seq_len=0: this sequence is too short to gain anything, and would stay dense.
    sparse = compiled(min_peak=0.5, target_recall=0.3)(ids)
    everything = compiled(budget=1024, lazy_threshold=None)(ids)
    for name, logits in (("half of the mass", sparse), ("every key", everything)):
        print(f"{name}: logits differ from dense by at most {(logits - dense).abs().max():.2g}")
    return dense, sparse, everything


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Compiling for a CPU would take longer than all the rest: "eager" runs the rewritten graph as it is.
    default = "auto" if torch.cuda.is_available() else "eager"
    parser.add_argument("--inner", default=default, help="compiler of the rewritten graphs (auto, eager, ...)")
    run(parser.parse_args().inner)
