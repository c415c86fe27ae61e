"""Bootstrap intervals over groups of answers that are not independent, such as the questions about one video."""

from __future__ import annotations

import numpy as np

#: Resamples of the videos, and two-sided level.
RESAMPLES, LEVEL = 4000, 0.95


def interval(correct: np.ndarray, video: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean with a bootstrap interval over videos.

    Args:
        correct: (questions,) of numbers; differences of two models' answers give a paired interval.
        video: (questions,) of each one's video.
        seed: Of the resampling.

    Returns:
        ``(mean, low, high)``.
    """
    _, index = np.unique(video, return_inverse=True)
    sums, counts = np.bincount(index, weights=correct.astype(float)), np.bincount(index)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(sums.sum() / counts.sum()), float(low), float(high)
