"""A small model with a slim cache: its rules, prompts, and one fixed choice of keys."""

from __future__ import annotations

import torch

from omnisparse_flex import OmniSparseConfig, apply_omnisparse
from omnisparse_flex.cache.choose_keys import HeadChoice
from tests.helpers.tiny import VIDEO, build, cached

#: Dense prefill, so that only the cache differs from the model as it was.
RULES = OmniSparseConfig(target_recall=0.9, sink_size=4, window_size=8)

DENSE = 1 << 20


def is_visual(args, kwargs):
    """For models without visual tokens of their own: by id, for as long as ids are given."""
    ids = kwargs.get("input_ids")
    return None if ids is None else ids == VIDEO


class Recorder:
    """An inner compiler that runs eagerly and keeps the cache operators of each graph."""

    def __init__(self) -> None:
        self.graphs = []

    def __call__(self, graph_module, inputs):
        names = [str(node.target).removesuffix(".default").rsplit(".", 1)[-1] for node in graph_module.graph.nodes]
        self.graphs.append(tuple(name for name in names if name == "attn" or name.startswith("cache_")))
        return graph_module.forward


def changed(name, device, inner="eager", **changes):
    model = build(name, device, **changes)
    mask = is_visual if name in ("llama", "gpt_oss") else None
    return apply_omnisparse(model, RULES, min_seq_len=DENSE, inner=inner, visual_mask=mask)


def prompt(device, lengths=(70,), seed: int = 0, spans=((15, 45),)):
    """Text around runs of video tokens, left-padded."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(10, 180, (len(lengths), longest), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : longest - length] = 0
        for start, stop in spans:
            ids[row, longest - length + start : longest - length + stop] = VIDEO
    ids[mask == 0] = 3
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def half_lazy(mass, layer):
    """Every second head lazy, the others with a third of the droppable keys."""
    heads, count = mass.shape[1], mass.shape[2]
    lazy = tuple(h for h in range(heads) if h % 2 == layer % 2)
    fetching = tuple(h for h in range(heads) if h not in lazy)
    order = mass.sort(-1, descending=True).indices
    return HeadChoice(lazy, fetching, order[:, list(fetching), : count // 3])


def generate(model, inputs, cache=None, *, new=10, seed=0, **mode):
    torch.manual_seed(seed)
    return model.generate(**inputs, **cached(cache), max_new_tokens=new, min_new_tokens=new, **mode)


def longer(inputs, tokens, device, seed):
    """The conversation so far and a further question."""
    question = prompt(device, (9,) * tokens.shape[0], seed, spans=())["input_ids"]
    ids = torch.cat([tokens, question], 1)
    grown = torch.ones_like(ids)
    grown[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    return {"input_ids": ids, "attention_mask": grown}


def steps(model, inputs, cache, **keywords):
    """Tokens and the logits of each step."""
    out = generate(model, inputs, cache, return_dict_in_generate=True, output_logits=True, **keywords)
    return out.sequences, torch.stack(out.logits, 1)
