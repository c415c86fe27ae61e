"""Why a decode step is not recorded: the reasons that ``rewrite_report`` gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from omnisparse_flex.cache.step_inputs import FlatCall, same_inputs, weights_of

if TYPE_CHECKING:
    from omnisparse_flex.model.compiled_module import CompiledDecoder

#: Types of arguments and results that a recorded step may hold as they are.
CONSTANTS = (bool, int, float, str, type(None), torch.dtype)
DRAFTS = "drafts of several tokens are verified at once"
NO_KERNEL = "the decode kernel does not run here (head size, data type, or no Triton)"
SEVERAL_GRAPHS = "the decoder does not run as one compiled graph"
MOVING_INPUTS = "what it reads lies elsewhere with every token (beam search, changing shapes)"


def note(decoder: CompiledDecoder, reason: str) -> None:
    """Write the reason into the model's report."""
    decoder.backend.log.notes[f"decode steps are not recorded as CUDA graphs: {reason}"] = None


def reason_of_call(call: FlatCall, kwargs: dict[str, Any], device: torch.device | None) -> str:
    """Why no step with arguments like these is recorded, or "".

    Args:
        call: The call.
        kwargs: The decoder's keyword arguments.
        device: Where the cache lies.
    """
    if call.decoder.state.collects:
        return "statistics are collected"
    if kwargs.get("attention_mask") is not None:
        return "a mask is needed: the prompt has padding, or position_ids were not given"
    if not all(isinstance(x, (Tensor, *CONSTANTS)) or x is call.cache for x in call.leaves):
        return "an argument is neither a tensor nor a constant"
    if any(isinstance(x, Tensor) and x.device != device for x in call.leaves):
        return "an argument lies on another device"  # a number that the host reads would be recorded as it is
    return ""


def reason_of_inputs(before: list[Any], now: list[Any], device: torch.device | None) -> str:
    """Why a graph that read these inputs in two consecutive steps is not recorded, or "".

    Args:
        before: The inputs of the first step, as ``FlatCall.read`` returns them.
        now: The inputs of the second step.
        device: Where the cache lies.
    """
    tensors = [x for ref in weights_of(now) if (x := ref()) is not None]
    if not same_inputs(before, now):
        return "the graph computes with a number or tensor that changes"
    if any(is_traceable_wrapper_subclass(x) for x in tensors):
        return "a weight is a tensor subclass, whose parts could move unseen"
    if any(x.device != device for x in tensors):
        return "the decoder lies on several devices"
    return ""


def reason_of_result(outputs: Any) -> str:
    """Why a recorded step with these outputs is not replayed, or ""."""
    if all(isinstance(x, (Tensor, *CONSTANTS)) for x in outputs):
        return ""
    return "the decoder's graph returns more than tensors and constants"
