"""``apply_omnisparse`` and what goes with it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from omnisparse_flex.backend import Backend
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.errors import ConfigError, require
from omnisparse_flex.model import hf
from omnisparse_flex.model.compiled_module import CompiledDecoder, check_visual, compiled_decoder_of
from omnisparse_flex.model.decoder_facts import head_shapes, refuse_several_devices
from omnisparse_flex.model.dry_run import explain
from omnisparse_flex.model.install import Undo, VisualMaskArgument, install_in_transformers
from omnisparse_flex.model.promises import layer_recalls
from omnisparse_flex.model.switches import NAME, expected_call
from omnisparse_flex.model.user_compile import REPLACED, own_call, refuse_compiled, was_replaced
from omnisparse_flex.model.wrappers import refuse_wrapped, unwrap
from omnisparse_flex.report import RewriteReport
from omnisparse_flex.rules_file import load_rules
from omnisparse_flex.seams import check_transformers
from omnisparse_flex.versions import TESTED, newer_than_tested


def apply_omnisparse(
    model: nn.Module,
    config: OmniSparseConfig | str | os.PathLike[str] | None = None,
    *,
    kernel: str = "auto",
    min_seq_len: int | str = "auto",
    visual_mask: VisualMaskArgument = None,
    inner: str | Callable[..., Any] = "auto",
    dynamic: bool | None = None,
) -> nn.Module:
    """Give a model OmniSparse attention, in training and in inference.

    Only the text decoder of a transformers model is compiled; vision towers stay as they
    are. ``state_dict``, ``save_pretrained``, ``generate``, ``Trainer`` and hooks go on working.

    Args:
        model: A transformers model, alone or inside PEFT's or DistributedDataParallel's wrapper, or any
            ``nn.Module`` that computes attention with ``F.scaled_dot_product_attention``, ``flex_attention``
            or matmul - softmax - matmul.
        config: Selection rules; None: ``OmniSparseConfig()``. A path: rules that ``rules_file.save_rules`` or
            ``omnisparse-flex calibrate`` wrote, a file or the model's directory. A new call replaces the old rules.
        kernel: Of block granularity: ``"triton"``, ``"flash"`` (needs flash-attn-4; sites that it does not
            take, graphs for several lengths and masks that read tensors among them, run on Triton, and the
            report says why) or ``"auto"``: FLASH where it is installed and takes the site, else Triton.
        min_seq_len: Queries below which attention stays dense; ``"auto"``: the break-even of the
            device, heads and rules by a cost model (``cost.py``; ``calibrate --speed`` fits it to your
            machine). 0 switches every dense fallback off, decoding included.
        visual_mask: Which tokens may be dropped: bool (B, N), or a callable ``(args, kwargs)``
            of the module's inputs that returns one (or None: all). By default the model config's
            image and video token ids; prompts without them: every token is eligible. Of the other
            tokens, runs of fewer than 128 between two that may be dropped (timestamps) may be dropped too.
        inner: What compiles the rewritten graph: ``"inductor"``, ``"aot_eager"``, ``"eager"`` or
            a Dynamo backend of your own; ``"auto"``: Inductor, but aot_eager for CPU graphs that
            need gradients. Only Inductor's kernels skip blocks; elsewhere the mask carries them.
        dynamic: As in ``torch.compile``.

    Returns:
        The same object.

    Raises:
        ConfigError: On a user's mistake, before anything is changed or compiled.
    """
    require(isinstance(model, nn.Module), "model", "be an nn.Module", type(model).__name__)
    require(dynamic in (None, True, False), "dynamic", "be None, True or False", dynamic)
    base = unwrap(model)
    is_hf = hf.is_transformers_model(base)
    if is_hf:
        check_transformers()
    if isinstance(config, (str, os.PathLike)):
        config = load_rules(config)
    config = OmniSparseConfig() if config is None else config
    backend = Backend(config, min_seq_len=min_seq_len, kernel=kernel, inner=inner, static=dynamic is False)
    refuse_compiled(model)
    refuse_wrapped(base)
    if isinstance(visual_mask, Tensor) or not callable(visual_mask):
        check_visual(visual_mask, None, None)
    decoder = _checked_decoder(base, config) if is_hf else base

    remove_omnisparse(base)
    undo = Undo()
    try:
        entry = CompiledDecoder(decoder, backend, dynamic, forwards_kwargs=is_hf)
        entry.undo = undo
        if is_hf:
            install_in_transformers(base, decoder, entry, undo, visual_mask)
        elif visual_mask is not None:
            entry.visual_mask = lambda a, k: check_visual(
                visual_mask(a, k) if callable(visual_mask) else visual_mask, None, None
            )
        undo.hooks.append(decoder.register_forward_pre_hook(own_call))
        decoder._compiled_call_impl = entry
    except BaseException:
        undo()
        raise
    return model


def remove_omnisparse(model: nn.Module) -> nn.Module:
    """Take ``apply_omnisparse`` back: the model is what it was, bit for bit.

    Args:
        model: Any module; one that was never changed is returned as it is.

    Returns:
        The same object.
    """
    entry = compiled_decoder_of(model)
    if entry is not None:
        entry.undo()
        entry.module._compiled_call_impl = None
    return model


def rewrite_report(model: nn.Module) -> RewriteReport:
    """Every attention site of a model: rewritten, or skipped with the reason.

    Before the first run of a transformers model the sites come from a trace without
    weights; a plain module lists its sites once it has run.

    Args:
        model: A model that ``apply_omnisparse`` changed.

    Returns:
        The report; prints as a table.

    Raises:
        ConfigError: If the model was never changed, or lost its compile when it was copied.
    """
    entry = compiled_decoder_of(model)
    if entry is None and was_replaced(model):
        raise ConfigError(f"model must keep what apply_omnisparse installed, got a part whose {REPLACED}")
    is_hf = hf.is_transformers_model(unwrap(model))
    copied = is_hf and any(c._attn_implementation_internal == NAME for c in hf.attention_configs(model))
    rule = "be the object that apply_omnisparse changed (a deep copy or unpickled model loses its compile)"
    require(entry is not None, "model", rule if copied else "be changed by apply_omnisparse", type(model).__name__)
    assert entry is not None
    report = entry.backend.log.report()
    report = report if report.compiled else explain(entry)
    libraries = ["torch", *(["transformers"] if is_hf else [])]
    recall = layer_recalls(entry.state.promises)  # the one place that waits for the device
    return dataclasses.replace(report, notes=(*newer_than_tested(*libraries), *report.notes), recall=recall)


@contextlib.contextmanager
def dense(model: nn.Module) -> Iterator[nn.Module]:
    """Run a changed model densely for a while: same weights, same code, plain SDPA.

    Args:
        model: A model that ``apply_omnisparse`` changed.

    Yields:
        The model.
    """
    entry = compiled_decoder_of(model)
    require(entry is not None, "model", "be changed by apply_omnisparse", type(model).__name__)
    assert entry is not None
    entry.module._compiled_call_impl = None
    try:
        with expected_call():
            yield model
    finally:
        entry.module._compiled_call_impl = entry


def _checked_decoder(model: Any, config: OmniSparseConfig) -> nn.Module:
    """The decoder of a transformers model, if it can be changed and the rules fit it.

    Raises:
        ConfigError: Unless they do.
    """
    decoder: Any = hf.find_decoder(model)
    rule = f"read its attention's name where transformers {TESTED['transformers']} does"
    require(bool(hf.attention_configs(decoder)), "model", rule, type(decoder).__name__)
    refuse_several_devices(decoder)
    config.check_layers(hf.layer_count(decoder))
    for shape in head_shapes(decoder.config):
        config.check_head_dim(shape.head_dim)
    module: nn.Module = decoder
    return module
