"""transformers' side of a changed model: our attention and mask functions under one name, and the decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import omnisparse_flex.model.cache_ops  # noqa: F401  (defines operators that the attention function calls)
from omnisparse_flex.attention.logit_sinks import check_sinks
from omnisparse_flex.attention.marker import dense_attention
from omnisparse_flex.errors import ConfigError
from omnisparse_flex.model.outside_masks import Recipe, carry
from omnisparse_flex.model.run_state import RunState
from omnisparse_flex.model.switches import NAME, warn_if_not_applied
from omnisparse_flex.types import StateTensors


def is_transformers_model(model: nn.Module) -> bool:
    """Whether ``model`` is a transformers model; does not import transformers for others."""
    if not any(cls.__module__.startswith("transformers.") for cls in type(model).__mro__):
        return False
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def register() -> None:
    """Register our attention and mask functions with transformers; repeatable."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask_forward)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    omnisparse_cache: Any = None,
    omnisparse_state: RunState | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """A transformers attention function: one marker op, dense SDPA unless a pass rewrites it.

    Args:
        module: The attention module; ``layer_idx`` numbers its layer.
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        attention_mask: What ``mask_forward`` returned.
        scaling: Logit scale; None: 1 / sqrt(D).
        dropout: Probability; above 0 the call is dense, and the passes skip it.
        softcap: Soft cap of the logits, or None.
        is_causal: Overrides the module's own ``is_causal``.
        s_aux: (Hq,), the layer's logit sinks, or None.
        omnisparse_cache: The ``OmniSparseCache`` of this call, or None.
        omnisparse_state: Run-time state of this call; None outside calls that ``apply_omnisparse`` compiles.
        **kwargs: Ignored, except those that only plain SDPA can honour.

    Returns:
        (B, L, Hq, Dv) and no weights.
    """
    if omnisparse_state is None:
        warn_if_not_applied(getattr(module, "config", module))
    if kwargs.get("sinks") is not None:
        raise ConfigError("attention must name its logit sinks s_aux, one for each head, got another kind: sinks")
    if s_aux is not None:
        check_sinks(s_aux, query, "s_aux")
        _refuse_beside_sinks(softcap if dropout > 0 else None, **kwargs)
    special = s_aux is not None or bool(softcap)  # transformers' own function would ignore it
    if (dropout > 0 and not special) or kwargs.get("position_bias") is not None or kwargs.get("cache") is not None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = _expand_padding(attention_mask, query.shape[2])
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    padding = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
    mask = attention_mask if padding is None else None
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = getattr(module, "layer_idx", -1)
    if dropout > 0:
        cap = softcap or 0.0
        out = dense_attention(query, key, value, padding, mask, causal, scaling, layer, cap, s_aux, dropout)
        return out.transpose(1, 2).contiguous(), None
    if omnisparse_cache is not None:
        if mask is not None or not causal or softcap:
            raise ConfigError("attention must be plain and causal with OmniSparseCache, got another mask or a soft cap")
        if omnisparse_cache.mode == "decode":
            owner = omnisparse_cache.owner
            out = torch.ops.omnisparse.cache_attend(query, key, value, padding, s_aux, owner, layer, scaling)
            return out.transpose(1, 2).contiguous(), None
    state = _state_operands(omnisparse_state, layer)
    out = torch.ops.omnisparse.attn(
        query, key, value, padding, mask, causal, scaling, layer, softcap or 0.0, s_aux, *state
    )
    if omnisparse_cache is not None:
        torch.ops.omnisparse.cache_store(out, query, key, value, omnisparse_cache.owner, layer, scaling)
    return out.transpose(1, 2).contiguous(), None


def _state_operands(state: RunState | None, layer: int) -> tuple[Tensor | None, ...]:
    """What the marker takes of the call's state; a layer that runs outside every graph is noted."""
    if state is None:
        return StateTensors()
    if not torch.compiler.is_dynamo_compiling():
        state.eager.add(layer)
    return state.tensors


def _refuse_beside_sinks(softcap: float | None, position_bias: Any = None, cache: Any = None, **kwargs: Any) -> None:
    """Refuse what only transformers' own function can compute, and without sinks.

    Raises:
        ConfigError: By name.
    """
    for name, value in (("softcap (with dropout)", softcap), ("position_bias", position_bias), ("cache", cache)):
        if value is not None:
            raise ConfigError(f"attention must not have both s_aux and {name}, got {type(value).__name__}")


def mask_forward(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """A transformers mask function: the 2-D padding where the mask is plain causal, else the 4-D mask.

    Returns:
        bool (B, S) or None: causality with (or without) padding. bool (B, 1, L, S): any
        other mask, to be lifted from the graph.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    plain = mask_function is None or mask_function is causal_mask_function
    # A static cache has more keys than tokens so far: S - L is then not the query's position.
    growing = isinstance(q_offset, (int, torch.SymInt)) and kv_offset == 0
    if plain and growing and not use_vmap and kv_length == q_offset + q_length:
        if attention_mask is None:
            return None
        return attention_mask[:, :kv_length].to(torch.bool)
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    function = causal_mask_function if mask_function is None else mask_function
    mask: Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, function, attention_mask, use_vmap=use_vmap, **kwargs
    )
    if torch.compiler.is_dynamo_compiling():
        return mask
    device = kwargs.get("device", torch.device("cpu"))
    return carry(
        mask,
        Recipe(mask_forward, batch_size, q_length, kv_length, q_offset, kv_offset, function, attention_mask, device),
    )


def _expand_padding(padding: Tensor, q_len: int) -> Tensor:
    """Padding with lower-right causality as the bool (B, 1, L, S) that plain SDPA needs."""
    kv_len = padding.shape[1]
    rows = torch.arange(q_len, device=padding.device)[:, None] + (kv_len - q_len)
    causal = torch.arange(kv_len, device=padding.device) <= rows
    return causal[None, None] & padding[:, None, None, :]


def find_decoder(model: Any) -> nn.Module:
    """The text decoder of a transformers model; vision towers are left alone.

    Raises:
        ConfigError: If there is none, or if its attention exists only as eager code.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError(f"model must be decoder-only, got the encoder-decoder {type(model).__name__}")
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    # A multi-modal model's get_decoder may return the model around the text part.
    decoder = getattr(decoder, "language_model", decoder)
    if not any(hasattr(module, "layer_idx") for module in decoder.modules()):
        raise ConfigError(f"model must have attention layers, got {type(model).__name__} without any")
    if _is_encoder(decoder):
        raise ConfigError(f"model must be a decoder, got the encoder {type(decoder).__name__}: tokens see later ones")
    if not (getattr(decoder, "_supports_sdpa", False) or _lacks_sdpa_for_its_logits(decoder)):
        raise ConfigError(f"model must support sdpa attention, got {type(decoder).__name__} with eager attention only")
    if not decoder._can_set_attn_implementation():
        raise ConfigError(f"model must use transformers' attention interface, got {type(decoder).__name__}")
    module: nn.Module = decoder
    return module


def _is_encoder(decoder: Any) -> bool:
    """Whether a config that tells decoders from encoders (BERT's kind) says that it is none, and its attention too."""
    causal = [x.is_causal for x in decoder.modules() if hasattr(x, "layer_idx") and hasattr(x, "is_causal")]
    return not getattr(decoder.config, "is_decoder", True) and bool(causal) and not any(causal)


def _lacks_sdpa_for_its_logits(decoder: Any) -> bool:
    """Whether logit sinks or a soft cap keep transformers from SDPA, and the decoder could run flex attention instead.

    Gemma 2 is one of these in transformers 5.24, not in 5.17.
    """
    if not getattr(decoder, "_supports_flex_attn", False):
        return False
    sinks = (getattr(module, "sinks", None) for module in decoder.modules() if hasattr(module, "layer_idx"))
    return bool(getattr(decoder.config, "attn_logit_softcapping", None)) or any(x is not None for x in sinks)


def layer_count(decoder: Any) -> int:
    """Number of layers that the decoder's config states."""
    return int(decoder.config.num_hidden_layers)


def attention_configs(decoder: nn.Module) -> list[Any]:
    """The distinct config objects that the decoder's modules read their attention name from."""
    found: dict[int, Any] = {}
    for module in decoder.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())
