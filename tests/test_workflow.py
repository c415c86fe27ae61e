"""The public CI runs what the Makefile offers, on the environments that the pins describe."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
if not WORKFLOW.is_file():
    pytest.skip("not a checkout", allow_module_level=True)
JOBS = yaml.safe_load(WORKFLOW.read_text("utf-8"))["jobs"]
COMMANDS = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in JOBS.items()}


def dry_run(*words: str) -> str:
    """What make would run, whatever the make that runs these tests was told."""
    told = r"MAKE\w*|MFLAGS|PIP_\w+|PYTHON|LATEST|OLDEST|WITH|TORCH|VENV|VENV_FLAGS|MARK|JOBS|ARGS"
    environment = {name: value for name, value in os.environ.items() if not re.fullmatch(told, name)}
    done = subprocess.run([*words, "--dry-run"], cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_job_is_one_make_target() -> None:
    assert COMMANDS == {
        "lint": ["make lint"],
        "test": ["make test"],
        "oldest": ["make test OLDEST=1"],
        "newest": ["make test LATEST=1 TORCH=torch"],
    }


def test_only_the_newest_releases_may_fail_and_they_run_weekly() -> None:
    lenient = [name for name, job in JOBS.items() if job.get("continue-on-error")]
    assert lenient == ["newest"] and "schedule" in JOBS["newest"]["if"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("job", list(COMMANDS))
def test_make_knows_each_command(job: str, tmp_path: Path) -> None:
    (command,) = COMMANDS[job]
    shown = dry_run(*command.split(), f"VENV={tmp_path / 'venv'}")
    (installed,) = re.findall(r"pip install -q (torch\S*)", shown)
    pins = re.findall(r'PIP_CONSTRAINT="([^"]*)"', shown)
    assert (installed, set(pins)) == {
        "oldest": ("torch==2.11.0", {"pins-oldest.txt"}),
        "newest": ("torch", set()),
    }.get(job, ((ROOT / "constraints.txt").read_text("utf-8").strip(), {"constraints.txt pins.txt"}))
    assert ("-W default::DeprecationWarning" in shown) == (job == "newest")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_newest_releases_can_be_had_with_the_pinned_torch(tmp_path: Path) -> None:
    shown = dry_run("make", "test", "LATEST=1", "WITH=transformers==5.23.0", f"VENV={tmp_path / 'venv'}")
    assert set(re.findall(r'PIP_CONSTRAINT="([^"]*)"', shown)) == {"constraints.txt"}
    assert 'install -q -e ".[test]" transformers==5.23.0' in shown


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_an_environment_that_is_there_is_used_as_it_is() -> None:
    shown = dry_run("make", "test", "VENV=")
    assert "pip" not in shown and "-m pytest" in shown
