"""Muon for the matrices, AdamW for the rest: look-ups form in half of AdamW's steps (results/video_probe.json)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

#: Muon's learning rate over AdamW's.
MATRIX_RATE = 10.0
#: Coefficients and number of the Newton-Schulz steps. Source: Keller Jordan's Muon, as in ``torch.optim.Muon``.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


class Muon(torch.optim.Optimizer):
    """``torch.optim.Muon`` with Nesterov momentum, all matrices of one shape at once: far fewer kernels."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for (rows, columns), same in shapes.items():
                grads = [parameter.grad for parameter in same]
                for parameter in same:
                    if "momentum_buffer" not in self.state[parameter]:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                buffers = [self.state[parameter]["momentum_buffer"] for parameter in same]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                ahead = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))
                update = orthogonalised(ahead).to(ahead.dtype)
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                update *= group["lr"] * max(1.0, rows / columns) ** 0.5  # the rate may be a tensor
                torch._foreach_sub_(same, list(update.unbind(0)))


def orthogonalised(matrices: Tensor) -> Tensor:
    """Each matrix with its singular values pushed towards 1.

    Args:
        matrices: (count, rows, columns).

    Returns:
        bfloat16 of the same shape; singular values within about 0.7 ... 1.2.
    """
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def make_optimizers(model: nn.Module, lr: float, device: torch.device) -> list[torch.optim.Optimizer]:
    """AdamW for embeddings, norms, biases and the patch embedding; Muon for every other matrix.

    On a GPU their steps can be recorded: rates are tensors there.

    Args:
        model: Its parameters.
        lr: AdamW's; ``set_rate`` changes both.
        device: Where the parameters are.
    """
    gpu = device.type == "cuda"
    rates = [torch.tensor(x, device=device) if gpu else x for x in (lr, MATRIX_RATE * lr)]
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name}
    rest = [p for name, p in model.named_parameters() if name not in matrices]
    chosen = [p for name, p in model.named_parameters() if name in matrices]
    return [
        torch.optim.AdamW(rest, lr=rates[0], betas=(0.9, 0.98), weight_decay=0.01, fused=gpu, capturable=gpu),
        Muon(chosen, lr=rates[1]),
    ]


def set_rate(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """Give AdamW this learning rate and Muon its multiple."""
    for optimizer, factor in zip(optimizers, (1.0, MATRIX_RATE), strict=True):
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(factor * lr)
            else:
                group["lr"] = factor * lr
