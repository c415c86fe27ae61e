"""Masks that a model makes before it calls its decoder: made anew inside the graph, where a pass can read them.

A model with images (Gemma 3, PaliGemma) or ``generate`` with a static cache asks for its masks outside the decoder.
They would reach the graph as tensors of queries × keys, of which nobody can tell the function of indices. So a mask of
ours carries how it was made, and the compiled decoder makes it once more.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Attribute of a mask tensor that holds its recipe.
RECIPE = "_omnisparse_recipe"


@dataclasses.dataclass(eq=False)
class Recipe:
    """How a mask was made: the arguments of ``mask_forward`` that are not read off the decoder's inputs.

    Attributes:
        make: ``mask_forward``.
        batch: Rows of the batch.
        queries: Number of queries.
        keys: Number of keys.
        q_offset: Position of query 0, a number or a tensor.
        kv_offset: Position of key 0.
        mask_function: transformers' function of (b, h, q, kv).
        padding: bool (B, S), keys that exist, or None.
        device: Where the mask lies.
    """

    make: Callable[..., Tensor | None]
    batch: int
    queries: int
    keys: int
    q_offset: Any
    kv_offset: int
    mask_function: Any
    padding: Tensor | None
    device: torch.device

    def mask(self) -> Tensor | None:
        """The mask, made by broadcasting and not by ``vmap``: of index functions the same."""
        return self.make(
            self.batch, self.queries, self.keys, self.q_offset, self.kv_offset, self.mask_function, self.padding,
            use_vmap=False, device=self.device,
        )  # fmt: skip


def is_index_function(function: Any) -> bool:
    """Whether a mask function is made of transformers' own parts alone, which are functions of indices."""
    if not isinstance(function, types.FunctionType) or not function.__module__.startswith("transformers."):
        return False
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    parts = [part for cell in cells for part in (cell if isinstance(cell, (tuple, list)) else (cell,))]
    return all(is_index_function(part) for part in parts if callable(part))


def taken(kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What stands for the masks among a decoder's arguments, and the other arguments.

    Args:
        kwargs: The call's; ``attention_mask`` may be a mask or a dict of masks by layer type.

    Returns:
        ``(None, kwargs)`` where no mask carries a recipe.
    """
    masks = kwargs.get("attention_mask")
    named = masks if isinstance(masks, dict) else {"": masks}
    if not any(hasattr(mask, RECIPE) for mask in named.values()):
        return None, kwargs
    rest = {name: value for name, value in kwargs.items() if name != "attention_mask"}
    recipes = {name: getattr(mask, RECIPE, mask) for name, mask in named.items()}
    return (recipes if isinstance(masks, dict) else recipes[""]), rest


def made(masks: Any) -> dict[str, Any]:
    """The decoder's argument for what ``taken`` took, or none."""
    if masks is None:
        return {}
    if isinstance(masks, dict):
        return {"attention_mask": {name: _mask_of(mask) for name, mask in masks.items()}}
    return {"attention_mask": _mask_of(masks)}


def _mask_of(mask: Any) -> Any:
    return mask.mask() if isinstance(mask, Recipe) else mask


def carry(mask: Tensor | None, recipe: Recipe) -> Tensor | None:
    """A mask that was made outside a graph, and how; as it is where it cannot be made by broadcasting."""
    if mask is not None and mask.dim() == 4 and is_index_function(recipe.mask_function):
        setattr(mask, RECIPE, recipe)
    return mask
