"""The import arrows of the house: errors, types, config ← masks ← attention ← passes ← backend ← api."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A part is a module of omnisparse_flex/, or a folder of it with all below; "" is the public face, __init__.py.
LAYERS = [{"errors", "types", "config"}, {"masks"}, {"attention"}, {"passes"}, {"backend"}, {"api", ""}]
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
MAY_IMPORT_TRANSFORMERS = {"integration", "cache", "demo", "loading"}


def house(root: Path) -> dict[str, list[Path]]:
    """Part -> its files at any depth, the two linked folders read where they really lie."""
    face = root / "omnisparse_flex"
    modules = {file.stem.replace("__init__", ""): [file] for file in face.glob("*.py")}
    folders = {path.name: path for path in face.iterdir() if path.is_dir() and not path.is_symlink()}
    folders |= {name: root / name for name in ("passes", "masks")}
    return modules | {name: files for name, path in folders.items() if (files := sorted(path.rglob("*.py")))}


def imports(node: ast.AST, eager: bool = True) -> Iterator[tuple[str, bool]]:
    """Every name imported below ``node``, and whether the import runs when the module does."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, eager) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            source = "." * child.level + (child.module or "")
            yield from ((f"{source}.{alias.name}", eager) for alias in child.names)
        else:
            lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or (
                isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            )
            yield from imports(child, eager and not lazy)


def violations(root: Path) -> list[str]:
    parts = house(root)
    edges = [
        (part, file.relative_to(root), name, eager)
        for part, files in parts.items()
        for file in files
        for name, eager in imports(ast.parse(file.read_text("utf-8")))
    ]

    def target(name: str) -> str | None:
        package, _, rest = name.partition(".")
        first = rest.partition(".")[0]
        return (first if first in parts else "") if package == "omnisparse_flex" else None

    def reach(name: str, seen: frozenset[str] = frozenset()) -> set[str]:
        """The ranked parts that ``name`` leads to; parts outside the arrows (helpers) are looked through."""
        here = target(name)
        if here is None or here in RANK or here in seen:
            return {here} & RANK.keys()
        return {far for part, _, further, _ in edges if part == here for far in reach(further, seen | {here})}

    def faults(part: str, name: str, eager: bool) -> Iterator[str]:
        if part in RANK and any(RANK[far] > RANK[part] for far in reach(name)):
            yield "against the arrow"
        if part == "reference" and target(name) not in LAYERS[0] | {None}:
            yield "the oracle stands alone"
        if name.startswith(".") or name.split(".")[0] in ("masks", "passes"):
            yield "not absolute"
        if part == "masks" and name.startswith("torch._dynamo"):
            yield "masks are tensors only"
        if name.split(".")[0] == "transformers" and (eager or part not in MAY_IMPORT_TRANSFORMERS):
            yield f"only {', '.join(sorted(MAY_IMPORT_TRANSFORMERS))}, and only lazily"

    return [f"{file}: {name}: {fault}" for part, file, name, eager in edges for fault in faults(part, name, eager)]


def test_the_arrows_hold() -> None:
    assert RANK.keys() <= house(ROOT).keys()  # a renamed part would leave the arrows unwatched
    assert violations(ROOT) == []


def plant(root: Path, file: str, source: str) -> Path:
    """A small legal house with one module of the caller's in it."""
    house = {
        "omnisparse_flex/__init__.py": "from omnisparse_flex.api import apply\n",
        "omnisparse_flex/api.py": "from omnisparse_flex import backend\n",
        "omnisparse_flex/backend.py": "from omnisparse_flex.passes import run\n",
        "omnisparse_flex/attention.py": "from omnisparse_flex.masks.causal import causal\n",
        "omnisparse_flex/config.py": "from omnisparse_flex.errors import ConfigError\n",
        "omnisparse_flex/errors.py": "",
        "passes/__init__.py": "from omnisparse_flex.attention import attend\n",
        "masks/__init__.py": "",
        "masks/causal.py": "from omnisparse_flex.config import Config\nimport torch\n",
    }
    for path, text in (house | {file: source}).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, "utf-8")
    return root


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("omnisparse_flex/config.py", "from omnisparse_flex.masks import causal"),
        ("masks/planted.py", "import omnisparse_flex.passes"),
        ("masks/planted.py", "from omnisparse_flex import attention"),
        ("masks/planted.py", "def late():\n    from omnisparse_flex import apply"),
        ("masks/planted.py", "from torch import _dynamo"),
        ("masks/planted.py", "import torch._dynamo.utils as u"),
        ("masks/planted.py", "def late():\n    import transformers"),
        ("masks/planted.py", "from .causal import causal"),
        ("masks/deep/er/planted.py", "from omnisparse_flex import attention"),
        ("omnisparse_flex/cache/planted.py", "import transformers"),
        ("passes/planted.py", "import masks"),
        ("passes/planted.py", "from passes.lift import lift"),
        ("passes/planted.py", "from omnisparse_flex.backend import backend"),
        ("omnisparse_flex/attention.py", "from omnisparse_flex import passes"),
        ("omnisparse_flex/reference.py", "from omnisparse_flex.masks import causal"),
        ("omnisparse_flex/stats.py", "from transformers import Cache"),
        ("omnisparse_flex/stats.py", "def late():\n    import transformers"),
        ("omnisparse_flex/cache.py", "import transformers"),
        ("omnisparse_flex/cache.py", "try:\n    from transformers import Cache\nexcept ImportError:\n    pass"),
        ("omnisparse_flex/cache.py", "class A:\n    import transformers.cache_utils"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str) -> None:
    assert len(violations(plant(tmp_path, file, source))) == 1


def test_a_detour_through_an_unranked_module_is_found(tmp_path: Path) -> None:
    plant(tmp_path, "masks/planted.py", "from omnisparse_flex import helper")
    (tmp_path / "omnisparse_flex/helper.py").write_text("from omnisparse_flex import passes, helper", "utf-8")
    assert violations(tmp_path) == ["masks/planted.py: omnisparse_flex.helper: against the arrow"]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("omnisparse_flex/cache.py", "def late():\n    import transformers"),
        ("omnisparse_flex/cache.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers"),
        ("omnisparse_flex/reference.py", "from omnisparse_flex.config import Config\nfrom torch import Tensor"),
        ("omnisparse_flex/testing.py", "from omnisparse_flex import apply, masks, passes"),
        ("passes/planted.py", "from omnisparse_flex.masks.causal import causal\nimport torch._dynamo"),
        ("masks/planted.py", "from omnisparse_flex.masks import causal"),
    ],
)
def test_a_legal_import_is_left_alone(tmp_path: Path, file: str, source: str) -> None:
    assert violations(plant(tmp_path, file, source)) == []
