"""Answers of a small real model after slimming: dense, offloaded and dropped at 2.4x and 4x less memory, and controls.

    python3 -m benchmarks.decode.needle_decode --weights /path/to/SmolLM2-135M
    python3 -m benchmarks.decode.needle_decode --weights DIR --device cpu --quick
    python3 -m benchmarks.decode.needle_decode --weights DIR --tokens 8000

``--weights`` is a folder of a transformers checkpoint (or with one ``.gguf`` file, or with the shards
of ``benchmarks/quality``), ``--tokenizer`` another folder if the tokenizer lies elsewhere. ``--prepare
FILE`` writes the items, and ``--items FILE`` reads them where there is no tokenizer (their length counts then).
Longer contexts than 4K have a results file and figures of their own. Everything is written after each row.

An answer has three words. The first is predicted by the prompt's own pass, over all keys, in every
variant; the others only while decoding. An item counts if all three are right. The second question is
a new turn about another fact. Beside it stands how much of that fact the slimmed heads held when it was asked: what
is kept was chosen for the first question. Rows beyond 4x ask where dropping begins to lose.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode.needle_held import held_share, summary_of, words_in
from benchmarks.decode.needle_items import WORDS_PER_ANSWER, Items, make_items
from omnisparse_flex import OmniSparseCache, OmniSparseConfig, apply_omnisparse
from omnisparse_flex.cache.choose_keys import HeadChoice, choose_keys, ranked
from omnisparse_flex.cache.layer import MIN_TAIL_STEP
from omnisparse_flex.model.cache_argument import as_cache_argument
from omnisparse_flex.model.switches import DISABLE_VARIABLE

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
#: The length whose figures have the plain names.
TOKENS = 4096
#: Dense prefill: only the cache is under test.
RULES = OmniSparseConfig(sink_size=16, window_size=64)
RECALL = 0.95
#: Of one kept token in one head.
POSITION_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to hold the context.

    Attributes:
        name: In the results.
        ratio: Full cache over device memory, or None: all keys.
        keys: How a fetching head's keys are chosen: ``mass``, ``recent``, ``random`` or ``all``.
        offload: As in ``OmniSparseCache``.
    """

    name: str
    ratio: float | None = None
    keys: str = "mass"
    offload: bool = True


VARIANTS = (
    Variant("dense"),
    Variant("slim4x", 4.0),
    Variant("slim4x_dropped", 4.0, offload=False),
    Variant("slim2_4x", 2.4),
    Variant("slim2_4x_dropped", 2.4, offload=False),
    Variant("window_only", 4.0, keys="recent", offload=False),
    Variant("random", 4.0, keys="random", offload=False),
    Variant("full_recall", keys="all"),
    Variant("slim8x_dropped", 8.0, offload=False),
    Variant("slim16x_dropped", 16.0, offload=False),
)
#: What is claimed: figure -> variant, and which question.
FIGURES = {
    **{f"needle.accuracy.{name}": (name, "first") for name in ("dense", "slim2_4x", "slim4x", "window_only", "random")},
    "needle.second_turn.dense": ("dense", "second"),
    "needle.second_turn.offload": ("slim4x", "second"),
    "needle.second_turn.dropped": ("slim4x_dropped", "second"),
    "needle.second_turn.offload2_4x": ("slim2_4x", "second"),
    "needle.second_turn.dropped2_4x": ("slim2_4x_dropped", "second"),
}


def budgeted(
    variant: Variant, length: int, width: int, shares: list[tuple[int, int, int]]
) -> Callable[[Tensor, int], HeadChoice]:
    """A chooser that spends exactly the memory of ``variant``: lazy heads by recall, the others share what is left.

    Args:
        variant: What is asked for.
        length: Tokens of a full cache.
        width: Bytes of one token's key and value in one head.
        shares: Receives (layer, lazy heads, k) of each choice.
    """
    assert variant.ratio is not None
    generator = torch.Generator().manual_seed(0)
    # What a head may hold, its positions and the room for new tokens included.
    room = length / variant.ratio * width / (width + POSITION_BYTES) - MIN_TAIL_STEP

    def chooser(mass: Tensor, layer: int) -> HeadChoice:
        heads, count = mass.shape[1], mass.shape[2]
        base = length - count
        lazy = choose_keys(mass, RECALL).lazy if variant.keys == "mass" else ()
        spare = max(0, int(heads * (room - base)))
        fetching = tuple(h for h in range(heads) if h not in lazy)
        k = min(count, spare // max(1, len(fetching)))
        own = mass[:, list(fetching)]
        order = ranked(mass)[:, list(fetching)]  # pooling takes no empty tensor: all heads may be lazy
        if variant.keys == "random":
            order = torch.rand(own.shape, generator=generator).to(mass.device).argsort(-1)
        if variant.keys == "recent":
            order = torch.arange(count, device=mass.device).flip(0).expand_as(own)
        shares.append((layer, len(lazy), k))
        return HeadChoice(lazy, fetching, order[:, :, :k])

    return chooser


@torch.no_grad()
def run(model: Any, variant: Variant, items: Items, span: list[int]) -> tuple[Tensor, dict[str, Any]]:
    """Ask both questions of a batch of items.

    Returns:
        int64 (B, 2, WORDS_PER_ANSWER), the words said; and what the cache was like.
    """
    context = items.context
    prompt = torch.cat([context, items.first], 1).to(model.device)
    span[0] = context.shape[1]
    shares: list[tuple[int, int, int]] = []
    if variant.keys == "all":
        cache: Any = OmniSparseCache(model, visual_recall=1.0)
    elif variant.ratio is None:
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
    else:
        cache = OmniSparseCache(model, offload=variant.offload)
        width = 2 * model.config.head_dim * model.dtype.itemsize
        cache.store.chooser = budgeted(variant, prompt.shape[1], width, shares)
    words, facts = [], {}
    tokens = prompt
    for question in range(2):
        said = []
        for _ in range(WORDS_PER_ANSWER):
            logits = model(input_ids=tokens, **as_cache_argument(model.forward, cache), logits_to_keep=1).logits
            span[0] = 0
            tokens = logits[:, -1].argmax(-1, keepdim=True)
            said.append(tokens)
        words.append(torch.cat(said, 1))
        if question == 0:
            tokens = torch.cat([tokens, items.second.to(model.device)], 1)
            if variant.ratio is not None:
                report = cache.memory_report()
                facts = {"ratio": report.ratio, "host_ratio": report.host / report.full, "shares": shares[:]}
                places = [words_in(context, items.answers[:, i]) for i in range(2)]
                facts["held"] = torch.stack([held_share(cache.layers, x) for x in places], 1)
    return torch.stack(words, 1).cpu(), facts


def measure(
    model: Any, items: Items, batch: int, limit: float, done: Callable[[str, dict[str, Any]], None]
) -> dict[str, Any]:
    """Accuracy of every variant, and what their caches held.

    Args:
        model: The model; changed.
        items: All of them are asked in every row.
        batch: Items at a time.
        limit: Seconds after which no further row begins, if it would take as long as those before.
        done: Called after each row with its name and all results so far.
    """
    span = [0]
    # Uncompiled: the cache works the same, and no minute goes into graphs of 30 layers.
    os.environ[DISABLE_VARIABLE] = "1"
    apply_omnisparse(model, RULES, min_seq_len=1 << 30, visual_mask=lambda args, kwargs: first_tokens(kwargs, span[0]))
    count, start = items.context.shape[0], time.perf_counter()
    results: dict[str, Any] = {"items": count, "variants": {}}
    dense = torch.empty(0)
    for row, variant in enumerate(VARIANTS):
        if row and (row + 1) / row * (time.perf_counter() - start) > limit:
            print(f"no time for {variant.name} and what follows", flush=True)
            break
        said, facts = [], []
        for at in range(0, count, batch):
            fields = dataclasses.fields(items)
            words, fact = run(model, variant, Items(*(getattr(items, x.name)[at : at + batch] for x in fields)), span)
            said.append(words)
            facts.append(fact)
        dense = torch.cat(said) if row == 0 else dense
        results["variants"][variant.name] = summarise(torch.cat(said), items.answers, dense, facts)
        results["seconds"] = time.perf_counter() - start
        done(variant.name, results)
    return results


def first_tokens(kwargs: dict[str, Any], span: int) -> Tensor | None:
    """The context is "visual"; later calls say nothing, which means text."""
    ids = kwargs["input_ids"]
    if span == 0:
        return None
    return (torch.arange(ids.shape[1], device=ids.device) < span).expand(ids.shape)


def summarise(said: Tensor, answers: Tensor, dense: Tensor, facts: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of right answers with their standard errors, memory, and lazy heads and k* by layer."""
    right, count = said == answers, said.shape[0]
    both = right.all(2).float().mean(0)
    result: dict[str, Any] = {
        "first": both[0].item(),
        "second": both[1].item(),
        "standard_error": [(p * (1 - p) / count) ** 0.5 for p in both.tolist()],
        "same_tokens_as_dense": (said == dense).float().mean().item(),
        "words": right.float().mean(0).tolist(),
    }
    facts = [fact for fact in facts if fact]
    if facts:
        result["held"] = summary_of(torch.cat([fact["held"] for fact in facts]), right[:, 1].all(1))
        shares = torch.tensor([fact["shares"] for fact in facts], dtype=torch.float32)
        result |= {"ratio": sum(fact["ratio"] for fact in facts) / len(facts)}
        result |= {"host_share": sum(fact["host_ratio"] for fact in facts) / len(facts)}
        result |= {"lazy_heads": shares[:, :, 1].mean(0).tolist(), "k": shares[:, :, 2].mean(0).tolist()}
    return result


def load_model(folder: Path, device: str) -> Any:
    """The model in bfloat16 on a GPU, float32 elsewhere."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if list(folder.rglob("shard-*.safetensors")):
        from benchmarks.quality.weights import load_model as load_shards

        return load_shards(folder, device=device, dtype=dtype)
    gguf = next((file.name for file in folder.glob("*.gguf")), None)
    extra = {"gguf_file": gguf} if gguf else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra)
    return model.eval().requires_grad_(False).to(device)


def load_items(options: argparse.Namespace) -> Items:
    """From a file, or made with the tokenizer."""
    if options.items:
        return Items(**torch.load(options.items, weights_only=True))
    from transformers import AutoTokenizer

    folder = Path(options.tokenizer or options.weights)
    gguf = next((file.name for file in folder.glob("*.gguf")), None)
    tokenizer = AutoTokenizer.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {}))
    return make_items(tokenizer, options.tokens, options.count)


def line(name: str, results: dict[str, Any]) -> str:
    """A row as text."""
    row = results["variants"][name]
    memory = f"{row['ratio']:.2f}x less memory" if "ratio" in row else "full cache"
    lazy = row.get("lazy_heads", [])
    heads = f", {sum(lazy) / len(lazy):.2f} lazy heads a layer" if lazy else ""
    same = f"{row['same_tokens_as_dense']:.3f} of the tokens of dense"
    text = f"[{results['seconds']:4.0f} s] {name:16s} first {row['first']:.3f}, second {row['second']:.3f}, {same}; "
    if "held" in row:
        held = row["held"]
        split = ", ".join(f"{share:.2f} where {answer}" for answer, share in held["second_fact_if"].items())
        heads += (
            f"; of the words held when the second question comes: first fact {held['first_fact']:.2f}, "
            f"second {held['second_fact']:.2f} ({split}), all of it in {held['heads_with_all_of_it']:.2f} of the heads"
        )
    return text + memory + heads


def keep(name: str, results: dict[str, Any], tokens: int) -> None:
    """Write the JSON, and the figures of one row."""
    from benchmarks.common import summary

    suffix = "" if tokens == TOKENS else f".{round(tokens / 1024)}k"
    shape = f"{tokens} tokens, {results['items']} items, SmolLM2-135M"
    versions = {"torch": torch.__version__, "device": summary.device_name()}
    content = {**results, **versions, "tokens": tokens, "recall": RECALL}
    summary.write_json(content, RESULTS / f"needle_decode{suffix.replace('.', '_')}.json")
    for figure, (variant, question) in FIGURES.items():
        if variant != name:
            continue
        row = results["variants"][name]
        memory = f"{row.get('ratio', 1.0):.2f}x less device memory"
        what = "second question, another fact" if question == "second" else "exact three-word answers"
        summary.record(
            figure + suffix, round(row[question], 4), unit="share, 0-1", baseline=f"{shape}; {what}; {memory}",
            script=__file__,
        )  # fmt: skip


def main() -> int:
    """Prepare items, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--items", type=Path)
    parser.add_argument("--prepare", type=Path)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="at most 8000: the model has 8192 positions")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--limit", type=float, default=140.0, help="seconds")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a few short items; records nothing")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.count, options.batch = 600, 4, 2
    if options.prepare:
        items = load_items(options)
        torch.save({field.name: getattr(items, field.name) for field in dataclasses.fields(items)}, options.prepare)
        print(json.dumps({field.name: list(getattr(items, field.name).shape) for field in dataclasses.fields(items)}))
        return 0
    items = load_items(options)
    claims = items.context.shape[0] >= 200 and options.device == "cuda" and not options.quick
    tokens = items.context.shape[1] + items.first.shape[1]

    def done(name: str, results: dict[str, Any]) -> None:
        print(line(name, results), flush=True)
        if claims:
            keep(name, results, tokens)

    measure(load_model(options.weights, options.device), items, options.batch, options.limit, done)
    if not claims:
        print("fewer than 200 items, or no GPU: no figure recorded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
