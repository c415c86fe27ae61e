"""What the choice of keys costs beyond that by block means, which the cost model was fitted with."""

from __future__ import annotations

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.select import COSTS

#: Time of a choice of blocks beyond that of ``mean_pool``, as a share of a dense call's: the larger of 32K and 128K
#: tokens on an H200 (``benchmarks/results/scorers.json``); taken for every GPU.
ON_A_GPU = {"mean_pool": 0.0, "tile_pool": 0.05, "antidiagonal": 0.12, "probe": 3.2}
#: Time of a choice of tokens: what it takes whoever is active, and what the scores of all queries take; the larger of
#: the same lengths (``benchmarks/results/token.json``).
TOKENS_ON_A_GPU = (0.24, 0.57)
#: The same on a CPU, in tensor code: with 256 tokens of budget a call took 3.2 to 6.5 times a dense one at 2K to 8K
#: tokens (8/2 heads of 64, two cores; no kept script).
TOKENS_ON_A_CPU = 2.2
#: Share of the queries that are expected to be active where some are lazy: nobody knows before the run.
EXPECTED_ACTIVE = 0.5
#: Time of a kept pair of tokens over that of a pair in blocks, in kernels that gather (same file).
GATHERED = 1.9


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
        return TOKENS_ON_A_CPU
    anyway, scores = TOKENS_ON_A_GPU
    return anyway + scores * (1.0 if config.lazy_below is None else EXPECTED_ACTIVE)


def pair_cost(config: OmniSparseConfig) -> float:
    """Time of a kept pair over that of one in blocks."""
    return GATHERED if config.granularity == "token" else 1.0
