"""The pages' Python runs as it is written, on a tiny model.

The convention: every ```` ```python ```` block of README.md and of docs/ is run, those of one page in order and in one
namespace. It begins with what a reader has by then: ``model``, a Qwen2.5-VL that ``apply_omnisparse`` changed;
``inputs``, what its processor makes of a clip and a question; ``batch``, the same, its ``labels``, and ``batches`` with
theirs; an ``optimizer``; ``torch``, and the public names of the package. ``from_pretrained`` gives that model, and a
processor whose only clip is the one of ``inputs``. So nothing is downloaded; a block that truly needs weights or files
says so in a comment right above it, ``<!-- not run: why -->``, and is then only compiled.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import omnisparse_flex
from omnisparse_flex import OmniSparseConfig, apply_omnisparse
from omnisparse_flex.backend import Backend
from omnisparse_flex.model.cache_argument import NEW_NAME, OLD_NAME, cache_name
from tests.helpers.tiny import build, video_inputs

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
#: But for the recipes, each of which has its own models and packages (``test_recipes``).
PAGES = [ROOT / "README.md", *sorted(x for x in (ROOT / "docs").rglob("*.md") if x.name != "recipes.md")]
BLOCK = re.compile(r"^(?P<before>[^\n]*)\n```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \w.* -->")


def blocks_of(text: str) -> list[tuple[str, bool]]:
    """Code of each block, and whether it is run."""
    return [(found["code"], not NOT_RUN.fullmatch(found["before"].strip())) for found in BLOCK.finditer(text)]


class Processor:
    """What stands for a model's processor: it has seen one clip."""

    def apply_chat_template(self, messages, *, tokenize: bool, return_dict: bool, return_tensors: str, **kwargs):
        assert messages[0]["role"] == "user" and tokenize and return_dict and return_tensors == "pt"
        return transformers.BatchFeature(video_inputs(rows=1))

    def batch_decode(self, tokens: torch.Tensor, **kwargs) -> list[str]:
        return [" ".join(map(str, row.tolist())) for row in tokens]


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What a page's first block finds; the passes rewrite at every length, and what they make runs eagerly."""
    monkeypatch.setattr(Backend, "inner_for", lambda self, device, needs_grad: "eager")
    monkeypatch.setattr(Backend, "min_queries", lambda self, device, shape=None: 0)
    model = build("qwen2_5_vl", num_hidden_layers=1)
    model.generation_config.max_new_tokens = 3
    for name in ("AutoProcessor", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda *a, **k: Processor())
    for name in ("Qwen2_5_VLForConditionalGeneration", "AutoModelForImageTextToText", "AutoModelForCausalLM"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda *a, **k: model)
    apply_omnisparse(model, OmniSparseConfig(target_recall=0.9))
    inputs = video_inputs(rows=1)
    public = {name: getattr(omnisparse_flex, name) for name in omnisparse_flex.__all__}
    return {
        **public,
        "torch": torch,
        "model": model,
        "inputs": inputs,
        "batch": inputs,
        "labels": inputs["input_ids"],
        "batches": [{**inputs, "labels": inputs["input_ids"]}],
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
    }


def as_installed(code: str, model: torch.nn.Module) -> str:
    """The pages give a cache by its new name, and say which versions have the old one."""
    return code if cache_name(model.forward) == NEW_NAME else re.sub(rf"\b{NEW_NAME}=", f"{OLD_NAME}=", code)


@pytest.mark.filterwarnings("ignore:omnisparse. calibration leaves every layer dense")  # of so few tokens
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_blocks_of_a_page_run(page: Path, namespace: dict, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, (code, runs) in enumerate(blocks_of(page.read_text("utf-8")), 1):
        compiled = compile(as_installed(code, namespace["model"]), f"{page.name}, block {number}", "exec")
        if runs:
            exec(compiled, namespace)


def test_the_readme_has_blocks_and_runs_its_first() -> None:
    found = blocks_of(PAGES[0].read_text("utf-8"))
    assert found and found[0][1]


def test_blocks_are_found_and_marked_ones_are_not_run() -> None:
    text = "a\n```python\nx = 1\n```\n\n<!-- not run: needs a clip -->\n```python\ny = 2\nz = 3\n```\n```sh\nls\n```\n"
    assert blocks_of(text) == [("x = 1\n", True), ("y = 2\nz = 3\n", False)]
