"""OmniSparse attention for video-MLLMs, installed by graph passes in one call."""

from omnisparse_flex.seams import check_torch

check_torch()  # first: the modules below import from the inside of torch

from omnisparse_flex.api import apply_omnisparse, remove_omnisparse, rewrite_report
from omnisparse_flex.attention.functional import sparse_attention
from omnisparse_flex.cache.hf_cache import OmniSparseCache
from omnisparse_flex.calibration.search import calibrate
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.errors import ConfigError
from omnisparse_flex.stats import collect_stats

__version__ = "0.2.0"

__all__ = [
    "ConfigError",
    "OmniSparseCache",
    "OmniSparseConfig",
    "apply_omnisparse",
    "calibrate",
    "collect_stats",
    "remove_omnisparse",
    "rewrite_report",
    "sparse_attention",
]
