"""Tiny models that generate grids of tokens, and what their tests share."""

from __future__ import annotations

import torch

from tests.helpers.tiny import cached, text_config

VOCAB, EOL, EOF, EOI, EOS, PAD = 40, 30, 31, 32, 2, 3
#: Rows, columns: a grid on which every window from 1 to 7 differs.
GRID = (4, 7)
#: Ids that stand for image tokens.
IMAGE = range(5, 30)


def small(**changes):
    fields = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": VOCAB, "max_position_embeddings": 512}
    return text_config(**fields | changes)


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**small(**changes)))


def emu3(**changes):
    from transformers import Emu3ForCausalLM, Emu3TextConfig

    return Emu3ForCausalLM(Emu3TextConfig(**small(**changes)))


def emu3_images(**changes):
    """The model with the picture decoder, whose vocabulary says which token ends a row."""
    from transformers import Emu3Config, Emu3ForConditionalGeneration

    names = {"<image>": 4, "<|extra_200|>": EOL, "<|extra_201|>": EOF, "<|image end|>": EOI}
    names |= {f"<|visual token {number:06d}|>": token for number, token in enumerate(IMAGE)}
    vq = {
        "codebook_size": len(IMAGE),
        "embed_dim": 32,
        "latent_channels": 32,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "hidden_size": 32,
        "num_attention_heads": 1,
        "temporal_downsample_factor": 1,
    }
    config = Emu3Config(vq_config=vq, text_config=small(**changes), vocabulary_map=names)
    return Emu3ForConditionalGeneration(config)


FAMILIES = {"emu3": (emu3, EOL), "emu3_images": (emu3_images, None), "llama": (llama, None)}


def build(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64, **changes):
    """(model, keyword arguments of zipar_generate), weights large enough that tokens vary."""
    torch.manual_seed(0)
    make, eol = FAMILIES[family]
    model = make(**changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    model = model.to(dtype)
    model.set_attn_implementation(attention)
    return model, {} if eol is None else {"eol_token_id": eol}


def has_ends(family: str) -> bool:
    return family != "llama"


def prompts(rows: int = 2, length: int = 5, padded: int = 0) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask``, the first row padded on the left."""
    ids = torch.randint(5, 30, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :padded], mask[0, :padded] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def structure(family: str, prompt: int, grid: tuple[int, int] = GRID):
    """What a user gives plain ``generate``: structure tokens where they belong, image tokens elsewhere."""
    rows, columns = grid
    tail = [EOF, EOI, EOS] if family == "emu3_images" else []
    line = columns + has_ends(family)

    def allowed(batch, ids):
        place = len(ids) - prompt
        if place >= rows * line:
            return [tail[place - rows * line]]
        return [EOL] if has_ends(family) and place % line == columns else list(IMAGE)

    return allowed, rows * line + len(tail)


class NoiseOfPlace:
    """Gumbel noise that depends on the place alone: greedy decoding then samples, in any order of steps."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, ids, scores):
        generator = torch.Generator().manual_seed(1000 * self.seed + ids.shape[1])
        return scores - torch.log(-torch.log(torch.rand(scores.shape, generator=generator, dtype=scores.dtype)))


def raster(family: str, model, inputs, grid=GRID, **arguments):
    """Plain ``generate``: one token a forward."""
    allowed, tokens = structure(family, inputs["input_ids"].shape[1], grid)
    return model.generate(
        **inputs,
        prefix_allowed_tokens_fn=allowed,
        do_sample=False,
        max_new_tokens=tokens,
        pad_token_id=PAD,
        **arguments,
    )


def count_forwards(model) -> list[int]:
    """Grows by the number of tokens at each call of the model."""
    calls: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return calls


__all__ = ["cached"]
