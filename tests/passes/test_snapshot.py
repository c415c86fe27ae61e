"""A graph that is brought back is what the compiler was given."""

from __future__ import annotations

import torch
from torch.fx import symbolic_trace

from omnisparse_flex.passes import Snapshot


def test_sources_of_inputs_are_kept():
    module = symbolic_trace(torch.nn.ReLU())
    (given,) = module.graph.find_nodes(op="placeholder")
    given._dynamo_source = "where Dynamo found it"
    before = Snapshot(module)
    given.replace_all_uses_with(given)
    before.restore()
    (again,) = module.graph.find_nodes(op="placeholder")
    assert again is not given and again._dynamo_source == "where Dynamo found it"
