"""The keys OmniSparse always keeps: attention sinks and the local window."""

from __future__ import annotations

from torch import Tensor

from omnisparse_flex.masks._checks import check_count
from omnisparse_flex.types import MaskMod


def sinks_and_window(sink_size: int, window_size: int) -> MaskMod:
    """A query sees, causally, the first ``sink_size`` keys and the latest ``window_size`` ones.

    Args:
        sink_size: First tokens of the sequence that every later query keeps; 0 for none.
        window_size: Latest tokens, the query itself included; at least 1.

    Returns:
        A ``mask_mod``. It is what a lazy query attends beside text, and the sinks-plus-window
        control of a quality table.

    Raises:
        ConfigError: If ``sink_size`` is not an int of at least 0, or ``window_size`` not
            an int of at least 1.

    Source: StreamingLLM, arXiv 2309.17453, section 3.2. Our choice: positions stay those
    of the whole sequence (no re-indexing inside the cache).
    """
    check_count("sink_size", sink_size, minimum=0)
    check_count("window_size", window_size, minimum=1)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & ((kv_idx < sink_size) | (kv_idx > q_idx - window_size))

    mask_mod.__name__ = f"sinks_{sink_size}_window_{window_size}"
    return mask_mod
