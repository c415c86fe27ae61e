"""Checkpoints: weights and optimizer state in small safetensors shards, everything else in one JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnisparse_flex.errors import ConfigError, require

#: Largest shard; small files travel.
SHARD_BYTES = 14 * 2**20
STATE = "train.json"
#: The optimizers' moments (AdamW's two, Muon's one) are kept in half precision; see ``round_moments``.
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
Optimizers = Sequence[torch.optim.Optimizer]


def round_moments(optimizers: Optimizers) -> None:
    """Round the live moments to bfloat16 values: what is saved is then exactly what training goes on with.

    A checkpoint thus takes 6 to 8 bytes a parameter instead of 8 to 12, and an interrupted run goes on bit for bit.
    """
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for name in state.keys() & set(MOMENTS):
                state[name].copy_(state[name].to(torch.bfloat16))


def save(directory: Path, model: Any, optimizers: Optimizers, record: dict[str, Any], final: bool = False) -> None:
    """Write a checkpoint; its JSON comes last, so a directory with one is complete.

    Args:
        directory: Where; made if need be. An older checkpoint there is replaced.
        model: Its float32 parameters are kept exactly.
        optimizers: Their moments are rounded, in place too.
        record: JSON-ready: step, schedule, history, versions.
        final: Weights alone, in bfloat16: a third of the size, to be asked or begun with, not to be resumed.
    """
    from safetensors.torch import save_file

    round_moments(optimizers)
    states = {parameter: state for optimizer in optimizers for parameter, state in optimizer.state.items()}
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach().to(torch.bfloat16 if final else parameter.dtype)
        if final:
            continue
        for moment in states.get(parameter, {}).keys() & set(MOMENTS):
            tensors[f"{moment}.{name}"] = states[parameter][moment].to(torch.bfloat16)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / STATE).unlink(missing_ok=True)
    for old in directory.glob("state-*.safetensors"):
        old.unlink()
    shards = _shards(tensors)
    for i, shard in enumerate(shards):
        part = {name: x.contiguous().cpu() for name, x in shard.items()}
        save_file(part, directory / f"state-{i + 1}-of-{len(shards)}.safetensors")
    (directory / STATE).write_text(json.dumps({**record, "shards": len(shards), "final": final}, indent=1) + "\n")


def _shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, x in tensors.items():
        if size + x.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = x
        size += x.nbytes
    return shards


def read_record(directory: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        ConfigError: If there is none, or it is not complete.
    """
    path = directory / STATE
    require(path.is_file(), "checkpoint", f"be a directory with {STATE}", str(directory))
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"checkpoint must hold JSON in {STATE}, got {error}") from error
    found = len(list(directory.glob(f"state-*-of-{record.get('shards')}.safetensors")))
    require(found == record.get("shards"), "checkpoint", f"hold {record.get('shards')} shards", found)
    return record


def load(directory: Path, model: Any, optimizers: Optimizers = ()) -> dict[str, Any]:
    """Read a checkpoint into a model and, to go on with training, its optimizers.

    Returns:
        The record.

    Raises:
        ConfigError: If the checkpoint is missing, incomplete or of another model.
    """
    from safetensors.torch import load_file

    record = read_record(directory)
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("state-*.safetensors")):
        tensors |= load_file(path)
    named = dict(model.named_parameters())
    saved = {name.removeprefix("model."): tuple(x.shape) for name, x in tensors.items() if name.startswith("model.")}
    wanted = {name: tuple(parameter.shape) for name, parameter in named.items()}
    other = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    require(not other, "checkpoint", "be of this model's config", f"other parameters, e.g. {other[:3]}")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[f"model.{name}"])
    owners = {p: x for x in optimizers for group in x.param_groups for p in group["params"]}
    for name, parameter in named.items():
        moments = {m: tensors[f"{m}.{name}"] for m in MOMENTS if f"{m}.{name}" in tensors}
        if moments and parameter in owners:
            _restore(owners[parameter], parameter, record["step"], moments)
    return record


def _restore(optimizer: torch.optim.Optimizer, parameter: Tensor, step: int, moments: dict[str, Tensor]) -> None:
    state = {name: torch.empty_like(parameter, requires_grad=False).copy_(x) for name, x in moments.items()}
    if isinstance(optimizer, torch.optim.AdamW):
        fused = bool(optimizer.defaults.get("fused"))
        state["step"] = torch.tensor(float(step), device=parameter.device if fused else "cpu")
    optimizer.state[parameter] = state
