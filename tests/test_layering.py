"""The import arrows of the house: every module and folder has a floor, and imports only what lies below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A part is a module of omnisparse_flex/ or one of its folders, with the files of masks/ and its folders told apart; ""
# is the public face, __init__.py. A part imports from its own floor and from those before it, lazily neither.
FLOORS = (
    {"errors", "types", "versions", "seams", "config", "config_checks", "config_schema", "rules_file", "report", "ops"},
    {"kernels", "compilation"},
    {"masks", "masks.expr"},
    {"masks.blocks"},
    {"masks.tokens"},
    {"masks.statistics"},
    {"cost_model"},
    {"attention"},
    {"passes"},
    {"compile_or_restore", "backend"},
    {"model"},
    {"api", "stats", "warmup"},
    {"cache", "calibration", "grid"},
    {""},
    {"cli"},
    {"__main__"},
)
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
# Beside the floors: testing stands on the zoo and the config, and nobody stands on testing.
TESTING_STANDS_ON = {"errors", "types", "config", "masks", "testing"}
MAY_IMPORT_TRANSFORMERS = {"model", "cache", "grid", "cli"}


def house(root: Path) -> dict[str, Path]:
    """Module -> its file, the two linked folders read where they really lie."""
    found = {}
    for folder, package in (("omnisparse_flex", ""), ("masks", "masks."), ("passes", "passes.")):
        for file in (root / folder).rglob("*.py"):
            path = file.relative_to(root / folder).with_suffix("")
            if not any(parent.is_symlink() for parent in file.parents):
                found[(package + ".".join(path.parts)).removesuffix("__init__").removesuffix(".")] = file
    return found


def part_of(module: str) -> str:
    """The part that a module belongs to."""
    first, _, rest = module.partition(".")
    second = f"masks.{rest.partition('.')[0]}"
    return second if first == "masks" and second in FLOOR else first


def imports(node: ast.AST, eager: bool = True) -> Iterator[tuple[str, bool]]:
    """Every name imported below ``node``, and whether the import runs when the module does."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, eager) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            source = "." * child.level + (child.module or "")
            yield from ((f"{source}.{alias.name}", eager) for alias in child.names)
        elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module"):
            yield from ((name.value, eager) for name in child.args if isinstance(name, ast.Constant))
        else:
            lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or (
                isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            )
            yield from imports(child, eager and not lazy)


def target(name: str, modules: dict[str, Path]) -> str | None:
    """The module of ours that an imported name means, "" for the public face."""
    package, _, rest = name.partition(".")
    if package != "omnisparse_flex":
        return None
    while rest and rest not in modules:
        rest = rest.rpartition(".")[0]
    return rest


def edges(root: Path) -> Iterator[tuple[str, str, bool]]:
    """(module, imported name, eager) for every import of the house."""
    for module, file in sorted(house(root).items()):
        for name, eager in imports(ast.parse(file.read_text("utf-8"))):
            yield module, name, eager


def faults(module: str, name: str, eager: bool, modules: dict[str, Path]) -> Iterator[str]:
    """What is wrong with one import."""
    part, found = part_of(module), target(name, modules)
    if found is not None:
        other = part_of(found)
        if part == "testing":
            legal = other in TESTING_STANDS_ON
        else:
            legal = other in FLOOR and part in FLOOR and FLOOR[other] <= FLOOR[part]
        if not legal:
            yield "against the arrow"
        if module == "testing.oracle" and other not in ("errors", "types", "config"):
            yield "the oracle stands alone"
    if name.startswith(".") or name.split(".")[0] in ("masks", "passes"):
        yield "not absolute"
    if part.startswith("masks") and name.startswith(("torch._dynamo", "torch.fx")):
        yield "masks are tensors only"
    if name.split(".")[0] == "transformers" and (eager or part not in MAY_IMPORT_TRANSFORMERS):
        yield f"only {', '.join(sorted(MAY_IMPORT_TRANSFORMERS))}, and only lazily"


def violations(root: Path) -> list[str]:
    modules = house(root)
    return [
        f"{modules[module].relative_to(root)}: {name}: {fault}"
        for module, name, eager in edges(root)
        for fault in faults(module, name, eager, modules)
    ]


def circles(root: Path) -> set[frozenset[str]]:
    """Groups of modules that import one another, lazily or not; the public face is not looked through."""
    modules = house(root)
    after: dict[str, set[str]] = {module: set() for module in modules}
    for module, name, _ in edges(root):
        if (found := target(name, modules)) and found != module:
            after[module].add(found)

    def reach(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            fresh = after[waiting.pop()] - seen
            seen |= fresh
            waiting += fresh
        return seen

    reached = {module: reach(module) for module in modules}
    return {frozenset(m for m in reached[a] if a in reached[m]) for a in modules if a in reached[a]}


def test_every_part_has_a_floor() -> None:
    parts = {part_of(module) for module in house(ROOT)}
    assert parts == FLOOR.keys() | {"testing"}  # a renamed part would leave the arrows unwatched


def test_the_arrows_hold() -> None:
    assert violations(ROOT) == []


def test_no_module_imports_itself_by_a_detour() -> None:
    assert circles(ROOT) == set()


def plant(root: Path, file: str, source: str) -> Path:
    """A small legal house with one module of the caller's in it."""
    house = {
        "omnisparse_flex/__init__.py": "from omnisparse_flex.api import apply\n",
        "omnisparse_flex/api.py": "from omnisparse_flex import backend\n",
        "omnisparse_flex/backend.py": "from omnisparse_flex.passes import run\n",
        "omnisparse_flex/attention/__init__.py": "",
        "omnisparse_flex/attention/functional.py": "from omnisparse_flex.masks.causal import causal\n",
        "omnisparse_flex/config.py": "from omnisparse_flex.errors import ConfigError\n",
        "omnisparse_flex/errors.py": "",
        "passes/__init__.py": "from omnisparse_flex.attention.functional import attend\n",
        "masks/__init__.py": "",
        "masks/causal.py": "from omnisparse_flex.config import Config\nimport torch\n",
        "masks/expr/expr.py": "",
        "masks/tokens/select.py": "from omnisparse_flex.masks.expr.expr import Expr\n",
    }
    for path, text in (house | {file: source}).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, "utf-8")
    return root


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("omnisparse_flex/config.py", "from omnisparse_flex.masks import causal"),
        ("omnisparse_flex/config.py", "from omnisparse_flex import unknown_part, errors"),
        ("omnisparse_flex/kernels/planted.py", "from omnisparse_flex.masks.expr import expr"),
        ("masks/planted.py", "import omnisparse_flex.passes"),
        ("masks/planted.py", "from omnisparse_flex import attention"),
        ("masks/planted.py", "def late():\n    from omnisparse_flex import apply"),
        ("masks/planted.py", "from torch import _dynamo"),
        ("masks/tokens/planted.py", "import torch._dynamo.utils as u"),
        ("masks/expr/planted.py", "from torch.fx import Node"),
        ("masks/planted.py", "def late():\n    import transformers"),
        ("masks/planted.py", "from .causal import causal"),
        ("masks/deep/er/planted.py", "from omnisparse_flex import attention"),
        ("masks/expr/planted.py", "from omnisparse_flex.masks.tokens.select import select"),
        ("masks/blocks/planted.py", "from omnisparse_flex.masks.tokens import select"),
        ("masks/tokens/planted.py", "from omnisparse_flex.masks import statistics"),
        ("passes/planted.py", "import masks"),
        ("passes/planted.py", "from passes.lift import lift"),
        ("passes/planted.py", "from omnisparse_flex.backend import backend"),
        ("omnisparse_flex/attention/tokens/planted.py", "from omnisparse_flex import passes"),
        ("omnisparse_flex/testing/oracle.py", "from omnisparse_flex.masks import causal"),
        ("omnisparse_flex/testing/planted.py", "from omnisparse_flex import backend"),
        ("omnisparse_flex/api.py", "from omnisparse_flex.testing import oracle"),
        ("omnisparse_flex/stats.py", "from transformers import Cache"),
        ("omnisparse_flex/stats.py", "def late():\n    import transformers"),
        ("omnisparse_flex/cache/planted.py", "import transformers"),
        ("omnisparse_flex/cache/planted.py", "try:\n    from transformers import Cache\nexcept ImportError:\n    pass"),
        ("omnisparse_flex/cache/planted.py", "class A:\n    import transformers.cache_utils"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str) -> None:
    if file.startswith("masks/tokens/planted") and "statistics" in source:
        (tmp_path / "masks").mkdir()
        (tmp_path / "masks/statistics.py").write_text("", "utf-8")
    if "testing import oracle" in source:
        (tmp_path / "omnisparse_flex/testing").mkdir(parents=True)
        (tmp_path / "omnisparse_flex/testing/oracle.py").write_text("", "utf-8")
    assert len(violations(plant(tmp_path, file, source))) == 1


@pytest.mark.parametrize(
    "late",
    [
        "from omnisparse_flex.cache.b import b",
        "def late():\n    from omnisparse_flex.cache import b",
        "def late():\n    importlib.import_module('omnisparse_flex.cache.b')",
    ],
)
def test_a_planted_circle_is_found(tmp_path: Path, late: str) -> None:
    plant(tmp_path, "omnisparse_flex/cache/a.py", late)
    assert circles(tmp_path) == set()
    plant(tmp_path, "omnisparse_flex/cache/b.py", "from omnisparse_flex.cache.c import c")
    plant(tmp_path, "omnisparse_flex/cache/c.py", "from omnisparse_flex.cache.a import a")
    assert circles(tmp_path) == {frozenset({"cache.a", "cache.b", "cache.c"})}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("omnisparse_flex/cache/planted.py", "def late():\n    import transformers"),
        ("omnisparse_flex/cache/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers"),
        ("omnisparse_flex/testing/oracle.py", "from omnisparse_flex.config import Config\nfrom torch import Tensor"),
        ("omnisparse_flex/testing/__init__.py", "from omnisparse_flex import masks, config"),
        ("passes/planted.py", "from omnisparse_flex.masks.causal import causal\nimport torch._dynamo"),
        ("masks/planted.py", "from omnisparse_flex.masks import causal"),
        ("masks/statistics.py", "from omnisparse_flex.masks.tokens.select import select"),
    ],
)
def test_a_legal_import_is_left_alone(tmp_path: Path, file: str, source: str) -> None:
    assert violations(plant(tmp_path, file, source)) == []
