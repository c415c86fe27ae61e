"""What the choice of keys costs beyond that by block means, which the cost model was fitted with."""

from __future__ import annotations

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.masks.blocks.select import COSTS

#: Time of a choice of blocks beyond that of ``mean_pool``, as a share of a dense call's: the larger of 32K and 128K
#: tokens on an H200 (``benchmarks/results/scorers.json``); taken for every GPU.
ON_A_GPU = {"mean_pool": 0.0, "tile_pool": 0.05, "antidiagonal": 0.12, "probe": 3.2}
#: Time of a choice of tokens: what it takes whoever is active, and what the scores of all queries take; the larger of
#: the same lengths, by ``one_pass`` (``benchmarks/results/token.json``).
TOKENS_ON_A_GPU = (0.24, 0.57)
#: The same in tensor code: on a CPU a call of 2K to 32K tokens never took less than this above a dense one
#: (``benchmarks/results/token_cpu.json``). A GPU runs it for estimators that have no kernel; not measured there.
TENSOR_CODE = 1.4
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
    if device == "cpu" or config.scorer != "one_pass":
        return TENSOR_CODE
    anyway, scores = TOKENS_ON_A_GPU
    return anyway + scores * (1.0 if config.lazy_below is None else EXPECTED_ACTIVE)


def pair_cost(config: OmniSparseConfig) -> float:
    """Time of a kept pair over that of one in blocks."""
    return GATHERED if config.granularity == "token" else 1.0
