"""A second process finds our graphs in AOTAutograd's cache, and never somebody else's."""

from __future__ import annotations

import os
import shutil
import types
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.package import sys_importer

import omnisparse_flex
from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.backend import Backend
from omnisparse_flex.compilation.cache_names import digest_of, source_digest, stable_name

PACKAGE = Path(omnisparse_flex.__path__[0])
# Through the links, so that masks/ and passes/ are among them.
FOLDERS = sorted(
    str(Path(folder).relative_to(PACKAGE))
    for folder, _, files in os.walk(PACKAGE, followlinks=True)
    if any(name.endswith(".py") for name in files)
)


def make(constant: object) -> types.FunctionType:
    def function(x: torch.Tensor) -> object:
        return x, constant

    return function


def test_equal_constants_are_one_function_and_others_are_another() -> None:
    first, again, other = (stable_name(make(constant)) for constant in ((1, 0.5), (1, 0.5), (1, 0.25)))
    assert first is again
    assert first.__name__ != other.__name__ != stable_name(make((1, 0.25)), "bfloat16").__name__
    module, name = sys_importer.get_name(first)
    assert getattr(sys_importer.import_module(module), name) is first


def test_a_constant_without_a_telling_repr_is_not_cached() -> None:
    function = make(object())
    assert stable_name(function) is function
    assert function.__name__ == "function"


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_edit_in_any_folder_is_other_source(tmp_path: Path, folder: str) -> None:
    copy = tmp_path / "omnisparse_flex"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert digest_of(copy) == source_digest()
    file = min((copy / folder).glob("*.py"))
    file.write_bytes(file.read_bytes() + b"\n")
    edited = digest_of(copy)
    assert edited != source_digest()
    file.rename(file.with_name("renamed.py"))
    assert digest_of(copy) not in (edited, source_digest())


def compile_and_run(config: OmniSparseConfig) -> tuple[torch.Tensor, dict[str, int]]:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 256, 16), torch.randn(1, 1, 256, 16)
    attention = torch.compile(
        lambda q, k: torch.ops.omnisparse.attn(q, k, k, None, None, True, 0.25, 0, 0.0),
        backend=Backend(config, min_seq_len=0),
        dynamic=False,
    )
    with torch.no_grad():
        out = attention(query, key)
    return out, dict(counters["aot_autograd"])


@pytest.mark.slow
@fresh_cache()
def test_the_cache_is_hit_by_the_same_rules_only() -> None:
    first, cold = compile_and_run(OmniSparseConfig(budget=0, lazy_threshold=None, sink_size=0, window_size=1))
    again, warm = compile_and_run(OmniSparseConfig(budget=0, lazy_threshold=None, sink_size=0, window_size=1))
    wider, other = compile_and_run(OmniSparseConfig(budget=128, lazy_threshold=None, sink_size=0, window_size=1))
    assert "autograd_cache_bypass" not in cold
    assert warm.get("autograd_cache_hit") == 2, "the graph, and the choice of blocks"
    assert "autograd_cache_hit" not in other
    assert torch.equal(first, again)
    assert not torch.equal(first, wider)
