"""A wheel built from the sdist carries the whole library, and works where no checkout is."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"omnisparse_flex": "omnisparse_flex", "passes": "omnisparse_flex/passes", "masks": "omnisparse_flex/masks"}

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed; its errors come with the failure."""
    # Neither make's pip settings (relative paths) nor a PYTHONPATH that would let the checkout in.
    inherited = {key: value for key, value in os.environ.items() if key not in ("PIP_CONSTRAINT", "PYTHONPATH")}
    done = subprocess.run(command, cwd=cwd, env=inherited | environment, text=True, capture_output=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, and the wheel built from that sdist, out of a clean copy: a build litters."""
    base = tmp_path_factory.mktemp("packaging")
    # A dot starts .git, the environment and every cache.
    litter = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "results", "scratch")
    shutil.copytree(ROOT, base / "checkout", symlinks=True, ignore=litter)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", base / "dist", base / "checkout", cwd=base)
    return base / "dist"


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    (wheel,) = dist.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


def sources(*suffixes: str) -> set[str]:
    """What the package should hold, by its paths in the wheel."""
    return {
        f"{package}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for file in (ROOT / folder).rglob("*.*")
        if file.suffix in suffixes and not linked(file)
    }


def linked(file: Path) -> bool:
    """Whether a path of the checkout leads through one of the two links."""
    return any(parent.is_symlink() for parent in file.parents if parent.is_relative_to(ROOT))


def test_the_wheel_holds_the_package_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    held = [name for name in names if ".dist-info/" not in name]
    assert sorted(held) == sorted(sources(".py", ".typed", ".json"))  # as lists: nothing twice, no tests
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_sdist_holds_each_source_once(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    inside = [str(PurePosixPath(*PurePosixPath(member.name).parts[1:])) for member in members if member.isfile()]
    # Passes and masks by the links, where the package wants them; with the folders beside it they would be there twice.
    assert sorted(name for name in inside if name.split("/")[0] in FOLDERS) == sorted(sources(".py", ".typed", ".json"))
    assert {"LICENSE", "README.md", "pyproject.toml", "tests/conftest.py"} <= set(inside)
    assert len(inside) == len(set(inside))


def test_the_metadata_names_our_entry_points(installed: Path) -> None:
    (found,) = importlib.metadata.distributions(path=[str(installed)])
    assert {(point.group, point.name, point.value) for point in found.entry_points} == {
        ("console_scripts", "omnisparse-flex", "omnisparse_flex.cli:main"),
        ("torch_dynamo_backends", "omnisparse", "omnisparse_flex.backend:omnisparse_backend"),
    }
    extras = found.metadata.get_all("Provides-Extra") or []
    assert {"hf", "demo", "test", "bench", "flash", "docs", "lint"} == set(extras)
    assert [line for line in found.requires or [] if "extra ==" not in line] == ["torch>=2.11"]


# Run as someone else's program: -I leaves out the working directory and PYTHONPATH, only the wheel is put on the path.
# The environment's own editable install stays importable behind it, hence the look at where each module came from.
PREAMBLE = """
import sys
target = sys.argv[1]
sys.path.insert(0, target)
"""

IMPORT = """
import omnisparse_flex
heavy = {"transformers", "torch._inductor", "hypothesis", "matplotlib", "av"} & sys.modules.keys()
assert not heavy, f"import omnisparse_flex pulled in {heavy}"

import omnisparse_flex.masks, omnisparse_flex.passes
for module in (omnisparse_flex, omnisparse_flex.masks, omnisparse_flex.passes):
    assert module.__file__.startswith(target), module.__file__
for name in omnisparse_flex.__all__:
    getattr(omnisparse_flex, name)
"""

BACKEND = """
import torch
assert "omnisparse" in torch._dynamo.list_backends(None)
assert "omnisparse_flex" not in sys.modules, "naming the backends must not import them"
backend = torch._dynamo.lookup_backend("omnisparse")
assert sys.modules["omnisparse_flex.backend"].__file__.startswith(target)
assert backend is sys.modules["omnisparse_flex.backend"].omnisparse_backend
"""

THIRD_PARTY_MASK = """
import torch
from torch.nn.attention.flex_attention import create_block_mask
from omnisparse_flex import testing
assert testing.__file__.startswith(target)

B, H, L, S, WINDOW = 2, 3, 200, 300, 70

def sliding_window(b, h, q_idx, kv_idx):
    position = q_idx + (S - L)
    return (kv_idx <= position) & (position - kv_idx < WINDOW)

distance = torch.arange(L)[:, None] + (S - L) - torch.arange(S)
dense = ((distance >= 0) & (distance < WINDOW)).expand(B, H, L, S)
testing.assert_mask_mod_equals(sliding_window, dense)
testing.assert_block_mask_equals(create_block_mask(sliding_window, B, H, L, S, device="cpu"), dense)

q, k, v = torch.randn(B, H, L, 16), torch.randn(B, H, S, 16), torch.randn(B, H, S, 16)
sdpa = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), attn_mask=dense)
torch.testing.assert_close(testing.dense_oracle(q, k, v, mask=dense), sdpa)

wrong = dense.clone()
wrong[1, 2, 150, 200] ^= True
for check in (
    lambda: testing.assert_mask_mod_equals(sliding_window, wrong),
    lambda: testing.assert_block_mask_equals(create_block_mask(sliding_window, B, H, L, S, device="cpu"), wrong),
):
    try:
        check()
    except AssertionError:
        continue
    raise SystemExit("one wrong pair went unseen")
"""


@pytest.mark.parametrize("program", [IMPORT, BACKEND, THIRD_PARTY_MASK], ids=["import", "backend", "third-party-mask"])
def test_it_works_outside_the_checkout(installed: Path, tmp_path: Path, program: str) -> None:
    run(sys.executable, "-I", "-c", PREAMBLE + program, str(installed), cwd=tmp_path)


def test_the_command_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    command = installed / "bin" / "omnisparse-flex"
    shown = run(sys.executable, command, "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "demo" in shown and "check" in shown


def test_a_checkout_without_symbolic_links_is_refused(tmp_path: Path) -> None:
    """Where git makes no links, it writes files that hold their target."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "omnisparse_flex").mkdir()
    (tmp_path / "omnisparse_flex" / "masks").write_text("../masks")
    found = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 1 and "omnisparse_flex/masks must be a link" in found.stderr
