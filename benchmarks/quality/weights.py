"""SmolLM2-135M from a GGUF file: packed into shards that travel, unpacked into a transformers model.

The shards keep the quantised bytes, so that the model is 98 MB instead of 270, and loading
them needs neither a network nor the ``gguf`` package.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

#: Tokens per quantisation block, bytes per block, of the two formats in the file.
BLOCK = 32
BLOCK_BYTES = {"Q4_1": 20, "Q8_0": 34}
CONFIG = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def pack(gguf_file: Path, folder: Path, shards: int = 2) -> list[Path]:
    """Write the model's quantised bytes as ``shards`` safetensors files of about equal size.

    Args:
        gguf_file: The model, of Q4_1, Q8_0 and F32 tensors.
        folder: Where ``shard-0.safetensors`` and so on go.
        shards: How many.

    Returns:
        The files.
    """
    from gguf import GGUFReader

    tensors: dict[str, Tensor] = {}
    for entry in GGUFReader(gguf_file).tensors:
        kind = entry.tensor_type.name
        data = torch.from_numpy(entry.data.copy())
        name = _hf_name(entry.name)
        if "q_proj" in name or "k_proj" in name:
            data = _unpermuted(data, CONFIG["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        tensors[f"{name}:{kind}"] = data.contiguous()
    total, files = sum(x.nbytes for x in tensors.values()), []
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    done = 0
    for name, data in tensors.items():
        parts[min(done * shards // total, shards - 1)][name] = data
        done += data.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    for index, part in enumerate(parts):
        files.append(folder / f"shard-{index}.safetensors")
        save_file(part, files[-1])
    return files


def load_model(folder: Path, *, device: str, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
    """The model, in eval mode, from the shards under ``folder`` (at any depth).

    Args:
        folder: Holds every ``shard-*.safetensors``.
        device: Where to.
        dtype: Of the weights.
        attention: ``attn_implementation``.

    Raises:
        FileNotFoundError: If there is no shard.
        RuntimeError: If a shard is missing (transformers' own, naming the weights).
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    files = sorted(Path(folder).rglob("shard-*.safetensors"))
    if not files:
        raise FileNotFoundError(f"folder must hold shard-*.safetensors, got {folder}")
    state = {}
    for file in files:
        for packed, data in load_file(file).items():
            name, _, kind = packed.partition(":")
            state[name] = unpack(data, kind).to(dtype)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(LlamaConfig(**CONFIG), attn_implementation=attention, dtype=dtype)
    model.to_empty(device=device)
    model.load_state_dict(state, strict=True)
    model.tie_weights()
    # to_empty leaves buffers that no checkpoint holds undefined: the rotary frequencies.
    rotary = type(model.model.rotary_emb)(model.config)
    model.model.rotary_emb = rotary.to(device)
    return model.eval().requires_grad_(False)


def unpack(data: Tensor, kind: str) -> Tensor:
    """Float32 weights of raw GGUF bytes: uint8 (rows, bytes), or already floats for ``F32``.

    Source: the block layouts of ggml: Q4_1 is scale, minimum (float16 each) and 16 bytes of which the low
    halves are values 0-15 and the high halves 16-31; Q8_0 is a scale and 32 int8.
    """
    if kind == "F32":
        return data.float()
    blocks = data.unflatten(-1, (-1, BLOCK_BYTES[kind]))
    scale = blocks[..., :2].contiguous().view(torch.float16).float()
    if kind == "Q8_0":
        return (scale * blocks[..., 2:].contiguous().view(torch.int8).float()).flatten(-2)
    low = blocks[..., 2:4].contiguous().view(torch.float16).float()
    codes = blocks[..., 4:]
    values = torch.cat([codes & 15, codes >> 4], dim=-1).float()
    return (scale * values + low).flatten(-2)


def _hf_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] != "blk":
        return f"{NAMES[parts[0]]}.{parts[-1]}"
    return f"model.layers.{parts[1]}.{NAMES[parts[2]]}.{parts[-1]}"


def _unpermuted(rows: Tensor, heads: int) -> Tensor:
    """GGUF interleaves the halves that rotary embedding pairs; transformers keeps them apart."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)
