"""The tensor side: mask factories for everyone, and the selection they combine with.

The public zoo is what this module exports; the rest of the folder (expressions, scoring,
budgets, block lists) serves ``sparse_attention``.
"""

from omnisparse_flex.masks.causal import causal
from omnisparse_flex.masks.combine import intersect, union
from omnisparse_flex.masks.document import document, document_ids
from omnisparse_flex.masks.near_to_far import near_to_far, near_to_far_order
from omnisparse_flex.masks.padding import padding
from omnisparse_flex.masks.sinks_and_window import sinks_and_window
from omnisparse_flex.masks.sliding_window import sliding_window
from omnisparse_flex.masks.visual_text import visual_text
from omnisparse_flex.masks.zipar import zipar

__all__ = [
    "causal",
    "document",
    "document_ids",
    "intersect",
    "near_to_far",
    "near_to_far_order",
    "padding",
    "sinks_and_window",
    "sliding_window",
    "union",
    "visual_text",
    "zipar",
]
