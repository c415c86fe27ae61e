"""Grids of tokens generated several at a time: ZipAR on models as they are, NAR with heads of its own."""

from omnisparse_flex.grid.zipar import ZipARGenerateOutput, zipar_generate
from omnisparse_flex.grid.zipar_loss import zipar_logits, zipar_loss

__all__ = ["ZipARGenerateOutput", "zipar_generate", "zipar_logits", "zipar_loss"]
