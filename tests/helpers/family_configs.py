"""A tiny config of every model type in transformers' mapping from images and text to text."""

from __future__ import annotations

from typing import Any

from omnisparse_flex.model.visual_mask import VISUAL_TOKEN_FIELDS

#: Vocabulary, and the visual placeholders in it.
VOCAB, IMAGE, VIDEO = 200, 190, 191
#: Sizes that any decoder's config may have.
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 16,
    "sliding_window": 100,
    "attention_chunk_size": 256,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "intermediate_size_mlp": 96,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 16,
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "conv_dim": 64,
    "block_dim": 64,
    "max_position_embeddings": 8192,
}
#: Sizes of a vision tower's.
TOWER = {
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 64,
    "projection_dim": 64,
    "head_dim": 16,
}
#: What holds a tower's sizes.
TOWERS = ("vision_config", "audio_config", "vq_config", "perceiver_config", "qformer_config", "projector_config")


#: What a type needs beside smaller sizes.
OWN: dict[str, dict[str, Any]] = {
    **{
        name: {"text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}}
        for name in ("glm4v", "glm46v", "glm_ocr", "glmga", "qwen2_vl", "qwen2_5_vl", "paddleocr_vl")
    },
    "glm4v_moe": {"text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}},
    "glm5_next": {"text_config": {"num_key_value_heads": 4}},
}


def tiny_config(model_type: str) -> Any:
    """The type's default config with every size cut down; raises what transformers raises."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    fields = _merged(_smaller(kind().to_dict(), TEXT), OWN.get(model_type, {}))
    for name in VISUAL_TOKEN_FIELDS:
        if name in fields:
            fields[name] = VIDEO if "video" in name else IMAGE
    return kind.from_dict(fields)


def _smaller(fields: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    layers = next((fields[name] for name in ("num_hidden_layers", "depth") if isinstance(fields.get(name), int)), 0)
    out: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "per_layer_config":
            continue  # made anew from the layer types
        if isinstance(value, dict) and name.endswith("config"):
            out[name] = _smaller(value, TOWER if name in TOWERS else sizes)
        elif name in sizes and isinstance(value, int) and not isinstance(value, bool):
            out[name] = sizes[name]
        elif isinstance(value, list) and layers > 2 and len(value) == layers:
            out[name] = _fewer(value)[-sizes["num_hidden_layers"] :]
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            out[name] = _rope(value)
        elif name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            out[name] = {"pad": 3, "bos": 1, "eos": 2}[name[:3]]
        elif name.endswith("_token_id") and isinstance(value, int) and value >= VOCAB:
            out[name] = VOCAB - 1 - sum(map(ord, name)) % 7
        else:
            out[name] = value
    return out


def _merged(fields: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    return fields | {k: _merged(fields[k], v) if isinstance(v, dict) else v for k, v in own.items()}


def _fewer(values: list[Any]) -> list[Any]:
    """Two of the values of a decoder's layers: full attention last, if any has it, and before it another kind."""
    last = "full_attention" if "full_attention" in values else values[-1]
    return [next((x for x in values if x != last), last), last]


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    inner = {name: _rope(x) if isinstance(x, dict) else x for name, x in value.items()}
    return inner | ({"mrope_section": [2, 3, 3]} if "mrope_section" in inner else {})
