"""Grids of tokens generated several at a time: ZipAR on models as they are, NAR with heads of its own."""

from omnisparse_flex.grid.nar import NAROutput, nar_generate, nar_logits, nar_loss
from omnisparse_flex.grid.neighbor_heads import NeighborHeads
from omnisparse_flex.grid.zipar import ZipARGenerateOutput, zipar_generate
from omnisparse_flex.grid.zipar_loss import zipar_logits, zipar_loss

__all__ = [
    "NAROutput",
    "NeighborHeads",
    "ZipARGenerateOutput",
    "nar_generate",
    "nar_logits",
    "nar_loss",
    "zipar_generate",
    "zipar_logits",
    "zipar_loss",
]
