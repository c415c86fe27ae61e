"""The candidate of a row's first token follows the last prediction, however many tests it has stood."""

import itertools

import pytest
import torch

from omnisparse_flex.grid.adaptive import FirstToken

P = [torch.tensor(row) for row in ([0.7, 0.2, 0.1, 0.0], [0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.5, 0.0])]
ROWS = 40_000


def test_a_candidate_follows_the_last_prediction():
    torch.manual_seed(0)
    first = FirstToken()
    assert not first.test(P[0].expand(ROWS, -1)), "one prediction says nothing about the next"
    for before, now in itertools.pairwise(P):
        old = first.tokens
        first.test(now.expand(ROWS, -1))
        share = first.tokens.bincount(minlength=4) / ROWS
        assert (share - now).abs().max() < 0.01
        # min(p, q) of the mass is kept, and what is kept keeps its token.
        assert (first.tokens == old).float().mean() >= torch.minimum(before, now).sum() - 0.01


@pytest.mark.parametrize(("now", "kept"), [([[0.0, 1.0], [1.0, 0.0]], False), ([[0.0, 1.0], [0.0, 1.0]], True)])
def test_all_rows_of_a_batch_start_together(now, kept):
    first = FirstToken()
    first.test(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    assert first.tokens.tolist() == [1, 1]
    assert first.test(torch.tensor(now)) is kept
    assert first.tokens.tolist() == torch.tensor(now).argmax(-1).tolist()


def test_equal_predictions_are_kept():
    torch.manual_seed(0)
    first, same = FirstToken(), torch.rand(64, 9).softmax(-1)
    first.test(same)
    tokens = first.tokens
    assert first.test(same) and torch.equal(first.tokens, tokens)
