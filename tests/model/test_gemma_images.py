"""Models of the Gemma kind with images: heads of each layer's own, masks that are made outside the decoder."""

from __future__ import annotations

import torch

from omnisparse_flex import apply_omnisparse, rewrite_report
from tests.helpers.gemma import build, gemma4
from tests.helpers.planted import RULES


def test_heads_differ_from_layer_to_layer(device):
    model = build(gemma4, device)
    apply_omnisparse(model, RULES, min_seq_len=0, inner="eager")
    report = rewrite_report(model)
    assert not report.compiled and len(report.rewritten) == 2, str(report)
    with torch.no_grad():
        model(torch.randint(10, 180, (1, 300), device=device))
    report = rewrite_report(model)
    assert len(report.rewritten) == 2 and not report.skipped, str(report)
