"""One model family after the other: is it sparse, is it right, and what does it say where it is not?"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import torch

from omnisparse_flex import ConfigError, OmniSparseCache, apply_omnisparse, collect_stats, rewrite_report
from omnisparse_flex.model import hf
from omnisparse_flex.model.cache_argument import cache_of
from tests.helpers.family_configs import IMAGE, tiny_config
from tests.helpers.planted import RULES, distance, mask_of, visual_of, wrongs
from tests.helpers.tiny import cached

#: Models whose parameters are more are not made tiny by smaller sizes alone: they are left out.
LARGEST = 100_000_000
#: Tokens of an image, and of the second turn.
SPAN, TURN = 256, 150
#: What dense attention itself loses in float32 is allowed so many times.
FACTOR = 20


@dataclasses.dataclass
class Row:
    """What became of a family.

    Attributes:
        family: transformers' model type.
        model: The class.
        sparse: Attention sites that were rewritten.
        dense: Sites that were not, each reason once.
        graphs: Graphs of the first forward.
        density: Of the first forward, under rules that keep text and a query's own block; None: nothing was sparse.
        error: Distance of the logits to the oracle's in the first turn, relative.
        second: The same in the second turn, over the model's own cache.
        noise: What dense attention loses in float32.
        seen: The smallest distance of an outcome that is wrong in a named way.
        gradients: Distance of the decoder's gradients to the oracle's, or None: not asked for.
        slim: "yes", or why the family takes no ``OmniSparseCache``.
        says: Warnings, and why it was refused or left out.
    """

    family: str
    model: str = ""
    sparse: int = 0
    dense: list[str] = dataclasses.field(default_factory=list)
    graphs: int = 0
    density: float | None = None
    error: float | None = None
    second: float | None = None
    noise: float = 0.0
    seen: float | None = None
    gradients: float | None = None
    slim: str = ""
    says: list[str] = dataclasses.field(default_factory=list)

    @property
    def tolerance(self) -> float:
        """Up to where an error is rounding."""
        return max(FACTOR * self.noise, 1e-5)

    @property
    def faults(self) -> list[str]:
        """What is wrong, or dense without a word."""
        measured = {"first turn": self.error, "second turn": self.second, "gradients": self.gradients}
        wrong = [f"{name} off by {x:.1e}" for name, x in measured.items() if x is not None and not x <= self.tolerance]
        if self.density is not None and self.density >= 1 and not self.dense and not self.says:
            wrong.append("nothing is dropped")
        if not self.sparse and not self.dense and not self.says:
            wrong.append("no site, no word")
        return wrong


def families() -> list[str]:
    """The model types of the mapping, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def build(family: str) -> Any:
    """A tiny model; raises what transformers raises, or ``ConfigError`` if it is not tiny."""
    from transformers import AutoModelForImageTextToText

    config = tiny_config(family)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForImageTextToText.from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ConfigError(f"too large when its sizes are cut: {size / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # Dynamo captures it, and it runs in float64
    return model


def prompt() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of two rows of unlike layout, and those of a second turn."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 180, (2, SPAN + 220), generator=generator)
    for row, start in zip(ids, (20, 140), strict=True):
        row[start : start + SPAN] = IMAGE
    return ids, torch.randint(10, 180, (2, TURN), generator=generator)


def oracle(model: Any, kept: torch.Tensor | None) -> Any:
    """The same model in float64; its decoder attends within its own mask and ``kept``, bool (B, 1, N, N) or None."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        logits = torch.tanh(logits / softcap) * softcap if softcap else logits
        rows, columns = logits.shape[2:]
        mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        mask = mask if attention_mask is None else attention_mask[..., :columns]
        mask = mask if kept is None else mask & kept[:, :, columns - rows : columns, :columns]
        logits = logits.masked_fill(~mask, float("-inf"))
        if s_aux is not None:
            logits = torch.cat([logits, s_aux.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
        weights = logits.softmax(-1).nan_to_num(0.0)[..., :columns]
        return (weights @ value).transpose(1, 2).contiguous(), None

    def mask(*args, **kwargs):
        return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    AttentionInterface.register("families_oracle", attend)
    AttentionMaskInterface.register("families_oracle", mask)
    twin = copy.deepcopy(model).double()
    for config in hf.attention_configs(hf.find_decoder(twin)):
        config._attn_implementation_internal = "families_oracle"
    return twin


def two_turns(model: Any, ids: torch.Tensor, turn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of both turns; the second one over the cache that the model made."""
    with torch.no_grad():
        first = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        return first.logits, model(input_ids=turn, **cached(cache_of(first))).logits


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the decoder's weights under the sum of squares of the logits."""
    model.zero_grad()
    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.double().pow(2).mean().backward()
    named = hf.find_decoder(model).named_parameters()
    return {name: p.grad.double() for name, p in named if p.grad is not None and p.grad.abs().max() > 0}


def examine(family: str, *, train: bool = False) -> Row:
    """Run a family densely, by the oracle and sparsely; never raises."""
    row = Row(family)
    ids, turn = prompt()
    visual = visual_of(torch.cat([ids, turn], 1))
    step = "no tiny model by smaller sizes alone"
    try:
        model = build(family)
        row.model, step = type(model).__name__, "dense attention does not run on ids without pixels"
        dense = two_turns(model, ids, turn)
    except Exception as error:
        row.says.append(f"{step}: {type(error).__name__}: {_line(error)}")
        return row
    try:
        _compare(row, model, ids, turn, visual, dense)
        if train and row.sparse:
            expected = gradients(oracle(model, mask_of(visual, causal=False)), ids)
            trained = apply_omnisparse(copy.deepcopy(model), RULES, min_seq_len=0, inner="aot_eager")
            row.gradients = distance(gradients(trained, ids), expected)
    except ConfigError as error:
        row.says.append(f"refused: {error}")
    except Exception as error:
        row.error = float("nan")
        row.says.append(f"failed: {type(error).__name__}: {_line(error)}")
    return row


def _compare(row: Row, model: Any, ids: Any, turn: Any, visual: Any, dense: Any) -> None:
    sparse = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        apply_omnisparse(sparse, RULES, min_seq_len=0, inner="eager", dynamic=True)
        with collect_stats(sparse) as stats, torch.no_grad():
            sparse(input_ids=ids, attention_mask=torch.ones_like(ids))
        row.graphs = rewrite_report(sparse).graphs
        actual = two_turns(sparse, ids, turn)
    report = rewrite_report(sparse)
    row.sparse, row.dense = len(report.rewritten), sorted({site.reason for site in report.skipped})
    row.says += sorted({str(w.message) for w in said if "omnisparse" in str(w.message)})
    row.density = stats.density if stats.per_layer() else None
    exact = two_turns(oracle(model, None), ids, turn)
    row.noise = max(distance(x, y) for x, y in zip(dense, exact, strict=True))
    if not row.sparse:
        return
    right = two_turns(oracle(model, mask_of(visual, causal=False)), ids, turn)
    row.error, row.second = (distance(x, y) for x, y in zip(actual, right, strict=True))
    lost = wrongs(visual, ids.shape[1])["the first turn's text is dropped"]
    row.seen = min(distance(x, y) for x, y in zip(two_turns(oracle(model, lost), ids, turn), right, strict=True))
    row.slim = _slim(sparse, ids)


def _slim(model: Any, ids: torch.Tensor) -> str:
    try:
        cache = OmniSparseCache(model, offload=False)
        with torch.no_grad():
            model(input_ids=ids, **cached(cache))
            model(input_ids=ids[:, -1:], **cached(cache))
    except ConfigError as error:
        return str(error)
    return "yes"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
