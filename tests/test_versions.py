"""Which torch and transformers are taken, refused or remarked upon, and that every file says the same of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from omnisparse_flex import ConfigError, apply_omnisparse, rewrite_report, seams, versions
from omnisparse_flex.backend import Backend
from omnisparse_flex.config import OmniSparseConfig
from tests.helpers.tiny import build

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12")


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("2.11.0+cu130", (2, 11, 0)),
        ("2.13.0a0+git1", (2, 13, 0)),
        ("5.25.0.dev0", (5, 25, 0)),
        ("5.9", (5, 9)),
        ("main", ()),
    ],
)
def test_the_numbers_of_a_version(version: str, release: tuple[int, ...]) -> None:
    assert versions.release_of(version) == release


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch):
    """Give a library another version for as long as the test runs."""
    return lambda library, version: monkeypatch.setattr(sys.modules[library], "__version__", version)


@pytest.fixture
def model() -> torch.nn.Module:
    return build("llama")


def settings_of(model: torch.nn.Module) -> tuple:
    hooks = [name for name, module in model.named_modules() if module._forward_pre_hooks]
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
    return model.config._attn_implementation, hooks, compiled


@pytest.mark.parametrize("version", ["5.16.9", "4.57.0", "5.16.0.dev0"])
def test_an_older_transformers_is_refused_before_anything_is_changed(model, pretend, version: str) -> None:
    before = settings_of(model)
    pretend("transformers", version)
    with pytest.raises(ConfigError, match=re.escape(f"transformers must be 5.17.0 or newer, got '{version}'")):
        apply_omnisparse(model)
    assert settings_of(model) == before


@pytest.mark.parametrize("version", [versions.TESTED["transformers"].oldest, "5.23.1", "main"])
def test_others_are_taken_without_a_word(model, pretend, version: str) -> None:
    pretend("transformers", version)
    pretend("torch", versions.TESTED["torch"].newest)
    apply_omnisparse(model, inner="eager")
    assert versions.newer_than_tested("torch", "transformers") == ()


def test_newer_ones_are_taken_with_one_line_each_in_the_report_alone(model, pretend, recwarn) -> None:
    pretend("transformers", "5.99.1")
    pretend("torch", "2.99.0+cpu")
    report = rewrite_report(apply_omnisparse(model, inner="eager"))
    newest = {library: tested.newest for library, tested in versions.TESTED.items()}
    assert [note for note in report.notes if "tested" in note] == [
        f"torch 2.99.0+cpu is newer than {newest['torch']}, the newest release that was tested",
        f"transformers 5.99.1 is newer than {newest['transformers']}, the newest release that was tested",
    ]
    assert "5.99.1 is newer" in str(report) and not recwarn.list


def test_a_plain_module_is_told_of_torch_alone(pretend) -> None:
    pretend("torch", "2.99.0")
    notes = rewrite_report(apply_omnisparse(torch.nn.Linear(2, 2), inner="eager")).notes
    assert len([note for note in notes if "tested" in note]) == 1


@pytest.mark.parametrize(
    ("kind", "name"), [("dynamo", "torch"), ("inductor", "torch"), ("transformers", "transformers")]
)
def test_a_missing_seam_is_refused_by_name_before_anything_is_changed(model, monkeypatch, kind: str, name: str) -> None:
    gone = f"{name}:no_such.thing"
    monkeypatch.setattr(seams, "SEAMS", {**seams.SEAMS, kind: (*seams.SEAMS[kind], gone)})
    seams.require_seams.cache_clear()
    before = settings_of(model)
    try:
        with pytest.raises(ConfigError) as error:
            apply_omnisparse(model)
    finally:
        seams.require_seams.cache_clear()
    rule = f"{name} must have {name}.no_such.thing, as {name} {versions.TESTED[name]} has, got "
    assert str(error.value).startswith(rule) and "without it" in str(error.value)
    assert settings_of(model) == before


def test_inductor_is_not_asked_for_where_it_is_not_used(monkeypatch) -> None:
    monkeypatch.setattr(seams, "SEAMS", {**seams.SEAMS, "inductor": ("torch:no_such_thing",)})
    seams.require_seams.cache_clear()
    try:
        Backend(OmniSparseConfig(), inner="aot_eager")
        with pytest.raises(ConfigError, match="no_such_thing"):
            Backend(OmniSparseConfig(), inner="inductor")
    finally:
        seams.require_seams.cache_clear()


def test_source_is_read_where_a_module_is_not_imported(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "unread.py").write_text("raise SystemExit\nsetting: int = 1\nclass A:\n    def b(self): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert all(seams.is_written(f"unread:{name}") for name in ("setting", "A", "A.b"))
    assert not any(seams.is_written(name) for name in ("unread:set", "unread:A.c", "absent:A", "absent.deeper:A"))
    assert "unread" not in sys.modules


def test_a_torch_without_what_we_import_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(seams, "SEAMS", {**seams.SEAMS, "import": ("torch.nn.attention.flex_attention:NoRequest",)})
    seams.require_seams.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"torch must have torch\.nn\.attention\.flex_attention\.NoRequest, as"):
            seams.check_torch()
    finally:
        seams.require_seams.cache_clear()


def test_the_package_is_imported_before_torch() -> None:
    done = subprocess.run([sys.executable, "-c", "import omnisparse_flex"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_older_torch_is_refused_at_the_import() -> None:
    command = [sys.executable, "-c", "import torch; torch.__version__ = '2.10.0+cu128'; import omnisparse_flex"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last == "omnisparse_flex.errors.ConfigError: torch must be 2.11.0 or newer, got '2.10.0+cu128'", done.stderr


# Files.


def requirements(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text("utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pinned(name: str, python: str) -> dict[str, str]:
    """Package -> version that a constraints file pins on Linux."""
    here = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux", "os_name": "posix"}
    here |= {"platform_python_implementation": "CPython", "platform_machine": "x86_64"}
    held = [r for r in requirements(name) if r.marker is None or r.marker.evaluate(here)]
    assert len({r.name for r in held}) == len(held), f"{name} pins a package twice for Python {python}"
    return {r.name: str(r.specifier).removeprefix("==") for r in held}


def declared(library: str) -> Requirement:
    """The package's own requirement."""
    (line,) = set(re.findall(rf'"({library}[<=>][^"]*)"', (ROOT / "pyproject.toml").read_text("utf-8")))
    return Requirement(line)


@pytest.mark.parametrize("library", list(versions.TESTED))
def test_the_package_asks_for_the_oldest_supported_and_no_less_than_anything_newer(library: str) -> None:
    oldest = versions.TESTED[library].oldest
    assert [(s.operator, Version(s.version)) for s in declared(library).specifier] == [(">=", Version(oldest))]


def test_the_pins_are_what_is_said_to_be_tested() -> None:
    (newest,) = requirements("constraints.txt")
    assert str(newest) == f"torch=={versions.TESTED['torch'].newest}"
    for python in PYTHONS:
        oldest = pinned("pins-oldest.txt", python)
        assert {name: oldest[name] for name in versions.TESTED} == {n: t.oldest for n, t in versions.TESTED.items()}
    assert pinned("pins.txt", "3.12")["transformers"] == versions.TESTED["transformers"].newest


@pytest.mark.parametrize("name", ["pins.txt", "pins-oldest.txt"])
def test_the_pins_hold_every_package_that_the_targets_name_and_none_of_cuda(name: str) -> None:
    own = (ROOT / "pyproject.toml").read_text("utf-8").partition("[project.optional-dependencies]")[2]
    extras = dict(re.findall(r"^(\w+) = (\[.*\])", own.partition("\n[")[0], flags=re.MULTILINE))
    lines = [line for extra in extras.keys() - {"flash"} for line in re.findall(r'"([^"]+)"', extras[extra])]
    wanted = {Requirement(line).name for line in lines}
    assert {"transformers", "pytest", "ruff", "av"} <= wanted
    for python in PYTHONS:
        held = pinned(name, python)
        assert wanted - {"omnisparse-flex"} <= set(held)
        assert not [package for package in held if package.startswith(("nvidia-", "cuda-", "triton"))]
        assert ("torch" in held) == (name == "pins-oldest.txt")


@pytest.mark.parametrize("name", ["pins.txt", "pins-oldest.txt"])
def test_every_pin_is_exact_and_the_file_tells_no_more_than_how_it_is_made(name: str) -> None:
    lines = (ROOT / name).read_text("utf-8").splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "# Made by `make lock`: edit pyproject.toml and run that."
    ]
    assert all([s.operator for s in r.specifier] == ["=="] for r in requirements(name))
    assert not [line for line in lines if "://" in line or " @ " in line or line.startswith("-")]
