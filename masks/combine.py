"""Masks from masks: what all allow, what any allows."""

from __future__ import annotations

from torch import Tensor

from omnisparse_flex.errors import ConfigError
from omnisparse_flex.masks._checks import describe
from omnisparse_flex.types import MaskMod


def intersect(*mods: MaskMod) -> MaskMod:
    """Pairs that every one of ``mods`` allows.

    Args:
        *mods: One ``mask_mod`` or more.

    Returns:
        A ``mask_mod`` named ``a_and_b``.

    Raises:
        ConfigError: If there is none, or one is not callable.
    """
    _check_mods(mods)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        allowed = mods[0](b, h, q_idx, kv_idx)
        for mod in mods[1:]:
            allowed = allowed & mod(b, h, q_idx, kv_idx)
        return allowed

    mask_mod.__name__ = "_and_".join(_name(mod) for mod in mods)
    return mask_mod


def union(*mods: MaskMod) -> MaskMod:
    """Pairs that at least one of ``mods`` allows.

    Args:
        *mods: One ``mask_mod`` or more.

    Returns:
        A ``mask_mod`` named ``a_or_b``.

    Raises:
        ConfigError: If there is none, or one is not callable.
    """
    _check_mods(mods)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        allowed = mods[0](b, h, q_idx, kv_idx)
        for mod in mods[1:]:
            allowed = allowed | mod(b, h, q_idx, kv_idx)
        return allowed

    mask_mod.__name__ = "_or_".join(_name(mod) for mod in mods)
    return mask_mod


def _check_mods(mods: tuple[MaskMod, ...]) -> None:
    if not mods:
        raise ConfigError("mods must hold at least one mask_mod, got ()")
    for mod in mods:
        if not callable(mod):
            raise ConfigError(f"mods must be callables (b, h, q_idx, kv_idx) -> bool tensor, got {describe(mod)}")


def _name(mod: MaskMod) -> str:
    # Partials and callable objects have no __name__.
    return getattr(mod, "__name__", type(mod).__name__)
