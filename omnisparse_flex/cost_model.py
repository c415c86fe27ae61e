"""What attention costs on a device, dense and sparse, and from which length on the sparse one pays.

The model is a sum of terms that are linear in their coefficients: pairs of the dense kernel, kept
pairs of the sparse one, tokens and block pairs of the selection by block means, and a constant per call; what other
estimators and tokens cost beyond that is a share of the dense call (``choice_share``). The
coefficients come with the package for measured devices (``costs.json``, made by
``benchmarks/prefill/fit_costs.py``) or from the user's own machine (``omnisparse-flex calibrate --speed``).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.errors import ConfigError
from omnisparse_flex.masks.blocks.select import BLOCK, COSTS

PACKAGED = Path(__file__).with_name("costs.json")
#: Environment variable: where the user's own coefficients lie instead of the cache directory.
FILE_VARIABLE = "OMNISPARSE_COSTS"
#: Share of the pairs that a rule without a fixed budget is expected to keep: nobody knows before the run.
#: Our choice: above what block selection at target 0.95 kept of SmolLM2 at 8K (0.30-0.45).
EXPECTED_SHARE = 0.5
#: The same for the peak rule. Our choice: above what it kept of SmolLM2 at 8K (0.22, ``peak_rule.json``).
PEAK_SHARE = 0.3
#: Lengths are compared in steps of this many tokens, up to the last.
STEP, LAST = 256, 1 << 20
#: Time of a choice of blocks beyond that of ``mean_pool``, as a share of a dense call's: the larger of 32K and 128K
#: tokens on an H200 (``benchmarks/results/scorers.json``); taken for every GPU. Our choice for ``sampled_rows``, whose
#: times are not recorded yet: what its exact rows take if every pair of blocks is a candidate.
ON_A_GPU = {"mean_pool": 0.0, "tile_pool": 0.05, "sampled_rows": 0.2}
#: Time of a choice of tokens: what it takes whoever is active, and what the scores of all queries take; the larger of
#: the same lengths, by ``one_pass`` (``benchmarks/results/token.json``).
TOKENS_ON_A_GPU = (0.24, 0.57)
#: The same in tensor code: on a CPU a call of 2K to 32K tokens never took less than this above a dense one
#: (``benchmarks/results/token_cpu.json``). A GPU runs it where no kernel fits; not measured there.
TENSOR_CODE = 1.4
#: Share of the queries that are expected to be active where some are lazy: nobody knows before the run.
EXPECTED_ACTIVE = 0.5
#: Time of a kept pair of tokens over that of a pair in blocks, in kernels that gather (same file).
GATHERED = 1.9


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Heads of an attention call; batch 1.

    Attributes:
        heads: Query heads.
        kv_heads: KV heads.
        head_dim: D.
    """

    heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128


def shape_of_config(config: Any) -> Shape | None:
    """The heads that a transformers config states, or None."""
    heads, kv_heads = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    dim = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // (heads or 1)
    return Shape(heads, kv_heads or heads, dim) if heads and dim else None


@dataclasses.dataclass(frozen=True, slots=True)
class Costs:
    """Coefficients of one device, in milliseconds per unit of ``sparse_terms``; at least 0.

    Attributes:
        dense: Per causal pair, head and head_dim of the dense kernel.
        dense_call: Per dense call.
        sparse: Per kept pair, head and head_dim.
        token: Per token, head and head_dim of the selection.
        block: Per pair of blocks and KV head of the selection.
        call: Per sparse call.
        shortest: Tokens of the shortest sample: nothing is claimed below it.
    """

    dense: float
    dense_call: float
    sparse: float
    token: float
    block: float
    call: float
    shortest: int = STEP

    def dense_ms(self, tokens: int, shape: Shape) -> float:
        """Milliseconds of one dense causal call."""
        return self.dense * causal_pairs(tokens, shape) + self.dense_call

    def sparse_ms(self, tokens: int, shape: Shape, share: float) -> float:
        """Milliseconds of one sparse call that keeps ``share`` of the pairs."""
        coefficients = (self.sparse, self.token, self.block, self.call)
        return sum(c * x for c, x in zip(coefficients, sparse_terms(tokens, shape, share), strict=True))

    def break_even(self, shape: Shape, config: OmniSparseConfig, device: str) -> int:
        """From how many tokens on sparse attention is not slower, up to ``LAST``; ``LAST``: never."""
        return _break_even(self, shape, config, device)

    def pays(self, tokens: int, shape: Shape, config: OmniSparseConfig, device: str) -> bool:
        """Whether sparse attention is expected not to be slower at this length."""
        share, dense = expected_share(tokens, config) * pair_cost(config), self.dense_ms(tokens, shape)
        return self.sparse_ms(tokens, shape, share) + choice_share(config, device) * dense <= dense


@functools.cache  # all layers of a model ask the same
def _break_even(costs: Costs, shape: Shape, config: OmniSparseConfig, device: str) -> int:
    length = LAST
    while length - STEP >= costs.shortest and costs.pays(length - STEP, shape, config, device):
        length -= STEP
    return length


def choice_share(config: OmniSparseConfig, device: str) -> float:
    """Time of the choice, beyond that of block means, as a share of a dense call's.

    Args:
        config: The rules.
        device: ``"cpu"``, or the name of a GPU.

    Returns:
        At least 0; of blocks on a CPU the share of the products.
    """
    if config.granularity == "block":
        return COSTS[config.scorer] if device == "cpu" else ON_A_GPU[config.scorer]
    if device == "cpu":
        return TENSOR_CODE
    anyway, scores = TOKENS_ON_A_GPU
    return anyway + scores * (1.0 if config.lazy_below is None else EXPECTED_ACTIVE)


def pair_cost(config: OmniSparseConfig) -> float:
    """Time of a kept pair over that of one in blocks."""
    return GATHERED if config.granularity == "token" else 1.0


def expected_share(tokens: int, config: OmniSparseConfig) -> float:
    """Kept share of the causal pairs that a rule is expected to need, 0-1.

    A fixed budget says it; otherwise it is ``EXPECTED_SHARE`` (``PEAK_SHARE``), or less where ``max_kv_budget`` allows no more.
    """
    if isinstance(config.budget, int):
        return _share(tokens, config.budget, config)
    expected = PEAK_SHARE if config.budget == "peak" else EXPECTED_SHARE
    if config.max_kv_budget is None:
        return expected
    return min(expected, _share(tokens, config.max_kv_budget, config))


def _share(tokens: int, budget: int, config: OmniSparseConfig) -> float:
    """Kept share of the block pairs if every row keeps ``budget`` tokens beside sinks and window."""
    blocks = -(-tokens // BLOCK)
    # The selection's own keys, sinks and window, all rounded up to blocks; the diagonal block is half empty.
    kept = -(-budget // BLOCK) + -(-config.sink_size // BLOCK) + -(-config.window_size // BLOCK) + 1
    if kept >= blocks:
        return 1.0
    return (kept * (kept + 1) / 2 + (blocks - kept) * kept) / (blocks * (blocks + 1) / 2)


def costs_of(device: str) -> Costs | None:
    """The coefficients of a device, the user's own before the packaged ones; None: never measured.

    Args:
        device: ``torch.cuda.get_device_name()``, or ``"cpu"``.
    """
    for path in (user_file(), PACKAGED):
        # Not ``Path.exists``: it raises where somebody else's home cannot be looked into.
        found = _read(path, path.stat().st_mtime_ns if os.access(path, os.R_OK) else 0)
        if device in found:
            return found[device]
    return None


def user_file() -> Path:
    """Where the user's own coefficients lie."""
    if named := os.environ.get(FILE_VARIABLE):
        return Path(named)
    # Not ``Path.home``: it raises for a user whom the system does not know, as in many containers.
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "omnisparse_flex" / "costs.json"


def write(device: str, costs: Costs, path: Path) -> None:
    """Put a device's coefficients into a file; other devices' stay."""
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**known, device: dataclasses.asdict(costs)}, indent=2, sort_keys=True) + "\n")


@functools.cache
def _read(path: Path, version: int) -> dict[str, Costs]:
    if version == 0:
        return {}
    try:
        return {name: Costs(**fields) for name, fields in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} must hold coefficients by device name (delete it to start over): {error}") from error


def causal_pairs(tokens: int, shape: Shape) -> float:
    """Causal pairs of tokens times query heads and head_dim."""
    return tokens * (tokens + 1) / 2 * shape.heads * shape.head_dim


def sparse_terms(tokens: int, shape: Shape, share: float) -> tuple[float, float, float, float]:
    """What ``sparse``, ``token``, ``block`` and ``call`` multiply."""
    selected = tokens * (shape.heads + shape.kv_heads) * shape.head_dim
    return causal_pairs(tokens, shape) * share, float(selected), (tokens / BLOCK) ** 2 * shape.kv_heads, 1.0
