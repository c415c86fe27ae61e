"""Every figure the project claims: one flat JSON file, and the README's table made from it.

``record`` is called by the benchmark scripts; nobody edits the file by hand.
``python -m benchmarks.common.summary --readme`` rewrites the table in README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SUMMARY = ROOT / "benchmarks" / "results" / "summary.json"
START, END = "<!-- figures:start -->", "<!-- figures:end -->"
FIELDS = ("value", "unit", "baseline", "device", "torch", "script", "commit")


def record_results(found: Mapping[str, tuple[float, str, str]], content: Mapping[str, Any], script: str) -> None:
    """Write figures into the summary and say them, with the device and versions of their results.

    Args:
        found: Name -> (value, unit, baseline).
        content: The results: ``device``, ``torch`` and ``commit``.
        script: The file that measured them.
    """
    where = {"device": content["device"], "torch_version": content["torch"], "tree": content["commit"]}
    for name, (value, unit, baseline) in found.items():
        record(name, value, unit=unit, baseline=baseline, script=script, **where)
        print(f"{name} = {value} {unit}")


def record(
    name: str,
    value: float,
    *,
    unit: str,
    baseline: str,
    script: str | os.PathLike[str],
    device: str | None = None,
    torch_version: str | None = None,
    tree: str | None = None,
    path: Path = SUMMARY,
) -> dict[str, Any]:
    """Write one figure into the summary; the others stay as they are.

    Args:
        name: Dotted name, e.g. ``"prefill_cpu.speedup.8k.d15"``.
        value: A finite number.
        unit: Its unit, e.g. ``"x"``, ``"s"``.
        baseline: What it is measured against, "" for an absolute figure.
        script: The file that measured it.
        device: Where it was measured; None: this machine's GPU or CPU.
        torch_version: Torch it was measured with; None: this one.
        tree: Commit it was measured on; None: this checkout's.
        path: The summary file.

    Returns:
        The entry.

    Raises:
        ValueError: On a value that is no finite number, or an empty name or unit.
    """
    import torch

    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"value of {name} must be a finite number, got {value!r}")
    for what, text in (("name", name), ("unit", unit)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{what} must be a non-empty string, got {text!r}")
    entry = {
        "value": value,
        "unit": unit,
        "baseline": baseline,
        "device": device_name() if device is None else device,
        "torch": torch_version or torch.__version__,
        "script": relative(script),
        "commit": tree or commit(),
    }
    write_json({**read(path), name: entry}, path)
    return entry


def read(path: Path = SUMMARY) -> dict[str, dict[str, Any]]:
    """The recorded figures; empty where there is no file yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(content: Any, path: Path) -> None:
    """Write JSON with sorted keys; a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would make the file unreadable for others
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def relative(script: str | os.PathLike[str]) -> str:
    """A script's path inside the repository, or as given if it lies outside."""
    path = Path(script).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(script)


def device_name() -> str:
    """This machine's GPU, or else its CPU model and number of cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {os.cpu_count()} cores"


def cpu_name() -> str:
    """Model name of this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the checkout, with ``-dirty`` where files differ; ``unknown`` outside git.

    The results themselves do not count: a run of several benchmarks writes them one by one.
    """
    head = _git("rev-parse", "--short", "HEAD")
    if head is None:
        return "unknown"
    changes = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return head + ("-dirty" if changes else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def table(figures: dict[str, dict[str, Any]]) -> str:
    """The figures as a Markdown table, sorted by name."""
    lines = ["| figure | value | against | device | torch | script | commit |", "|---|---:|---|---|---|---|---|"]
    for name in sorted(figures):
        entry = figures[name]
        value = f"{_short(entry['value'])} {entry['unit']}"
        cells = (f"`{name}`", value, entry["baseline"], entry["device"], entry["torch"])
        links = (f"[{Path(entry['script']).name}]({entry['script']})", f"`{entry['commit']}`")
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in (*cells, *links)) + " |")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def rewrite(text: str, figures: dict[str, dict[str, Any]]) -> str:
    """``text`` with the table between the two markers renewed.

    Raises:
        ValueError: Unless both markers stand there once, in order.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"file must hold {START} and then {END}, once each")
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    return f"{before}{START}\n{table(figures)}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or write it into the README."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--readme", action="store_true", help="rewrite the table between the markers")
    parser.add_argument("--check", action="store_true", help="with --readme: change nothing, exit 1 if it would change")
    parser.add_argument("--file", type=Path, default=ROOT / "README.md", help="the file to rewrite")
    parser.add_argument("--summary", type=Path, default=SUMMARY, help="the figures")
    options = parser.parse_args(arguments)
    figures = read(options.summary)
    if not options.readme:
        print(table(figures))
        return 0
    old = options.file.read_text()
    new = rewrite(old, figures)
    if options.check:
        return int(old != new)
    if old != new:
        options.file.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
