"""Argument checks that the mask factories share; each raises ``ConfigError`` in the house wording."""

from __future__ import annotations

import torch
from torch import Tensor

from omnisparse_flex.errors import ConfigError

INT_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def describe(value: object) -> str:
    """What an error message says of ``value``: tensors by dtype and shape, the rest by ``repr``."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return repr(value)


def is_int(value: object) -> bool:
    """Whether ``value`` is an int (a symbolic one too), bool excluded."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_count(name: str, value: int, minimum: int) -> None:
    """Refuse anything but an int of at least ``minimum``.

    Raises:
        ConfigError: ``{name} must be an int of at least {minimum}, got {value}``.
    """
    if not is_int(value) or value < minimum:
        raise ConfigError(f"{name} must be an int of at least {minimum}, got {describe(value)}")


def check_bool_map(name: str, value: Tensor, shape: str) -> None:
    """Refuse anything but a 2-D bool tensor; ``shape`` is how the message names its axes.

    Raises:
        ConfigError: ``{name} must be a bool tensor of shape {shape}, got {value}``.
    """
    if not isinstance(value, Tensor) or value.dim() != 2 or value.dtype != torch.bool:
        raise ConfigError(f"{name} must be a bool tensor of shape {shape}, got {describe(value)}")


def check_int_map(name: str, value: Tensor, shape: str) -> None:
    """Refuse anything but a 2-D int tensor; ``shape`` is how the message names its axes.

    Raises:
        ConfigError: ``{name} must be an int tensor of shape {shape}, got {value}``.
    """
    if not isinstance(value, Tensor) or value.dim() != 2 or value.dtype not in INT_DTYPES:
        raise ConfigError(f"{name} must be an int tensor of shape {shape}, got {describe(value)}")
