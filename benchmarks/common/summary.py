"""Every figure the project claims: one flat JSON file, and the tables of the README and the docs made from it.

Benchmark scripts call ``record``; nobody edits the file. ``--readme`` renews what these comments mark in both pages::

    <!-- headline:start --> ... <!-- headline:end -->        the first table, one rule in every row
    <!-- figures:start video. --> ... <!-- figures:end -->   the figures whose names start so
    <!-- figures:start --> ... <!-- figures:end -->          those that no other table of the file shows
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SUMMARY = ROOT / "benchmarks" / "results" / "summary.json"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
MARKED = re.compile(r"<!-- (headline|figures):start(?: ([\w. ]+))? -->\n(.*?)<!-- \1:end -->", re.DOTALL)
FIELDS = ("value", "unit", "baseline", "device", "torch", "script", "commit")


def record_results(found: Mapping[str, tuple[float, str, str]], content: Mapping[str, Any], script: str) -> None:
    """Write figures, name -> (value, unit, baseline), into the summary and print them.

    ``content`` is their results file and says ``device``, ``torch`` and ``commit``; ``script`` measured them.
    """
    where = {
        "device": content["device"],
        "torch_version": content["torch"],
        "tree": content["commit"],
        "script": script,
    }
    for name, (value, unit, baseline) in found.items():
        record(name, value, unit=unit, baseline=baseline, **where)
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
    """Write one figure into the summary, leave the others as they are, and return its entry.

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
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the checkout, with ``-dirty`` where files differ; ``unknown`` outside git.

    The results themselves do not count: a run of several benchmarks writes them one by one.
    """
    head = _git("rev-parse", "--short", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return "unknown" if head is None else head + ("-dirty" if changes else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as a Markdown table, sorted by name."""
    lines = ["| figure | value | against | device | torch | script | commit |", "|---|---:|---|---|---|---|---|"]
    for name in sorted(figures):
        entry = figures[name]
        value = f"{_short(entry['value'])} {entry['unit']}"
        cells = (f"`{name}`", value, entry["baseline"], entry["device"], entry["torch"])
        source = (f"`{entry['script']}`", f"`{entry['commit']}`")
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in (*cells, *source)) + " |")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


#: Rules that the README's first table may show, the first measured one wins: prefix of their figures -> what they are,
#: and the prefixes of figures for the quality they lose (the last one measured wins).
POINTS = {
    "ttft.default": ("the default rules", ("peak", "qwen")),
    "ttft": (
        "a fixed budget (*kept*: its share of the block pairs), not the default, whose time is not measured",
        (),
    ),
}
#: Its rows, in visual tokens, and its columns, made of figures "{prefix}.{name}.{length}".
LENGTHS = ("8k", "32k", "128k", "256k")
COLUMNS = {
    "dense": "{dense_s:.2f} s",
    "OmniSparse": "{s:.2f} s (**{speedup:.1f}x**)",
    "XAttention's rule": "{rival_s:.2f} s",
    "memory, dense → OmniSparse": "{dense_gib:.1f} → {gib:.1f} GiB",
    "kept": "{density:.3f}",
    "quality lost": "{ppl_delta_pct:.1f} % perplexity",
}


def headline(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Time to first token, memory and quality by length, one rule in every row; "not measured" where so."""
    point = next((p for p in POINTS if any(f"{p}.speedup.{length}" in figures for length in LENGTHS)), "ttft")
    rules, quality = POINTS[point]

    def cell(template: str, length: str) -> str:
        wanted = re.findall(r"{(\w+)", template)
        places = [(n, f"{p}.{n}.{length}") for n in wanted for p in (quality if n == "ppl_delta_pct" else (point,))]
        known = {name: figures[place]["value"] for name, place in places if place in figures}
        return template.format(**known) if len(known) == len(wanted) else "not measured"

    rows = [[length.upper(), *(cell(template, length) for template in COLUMNS.values())] for length in LENGTHS]
    lines = ["| " + " | ".join(row) + " |" for row in [["tokens", *COLUMNS], ["---:"] * (len(COLUMNS) + 1), *rows]]
    speedups = [figures[n] for length in LENGTHS if (n := f"{point}.speedup.{length}") in figures]
    where = {f"{x['device']}, torch {x['torch']}. Baseline: {x['baseline'].partition(';')[0]}." for x in speedups}
    return "\n".join([*lines, "", " ".join([f"One rule in every row: {rules}.", *sorted(where)])])


def rewrite(text: str, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """``text`` with every marked table renewed.

    Raises:
        ValueError: If it marks no table, or leaves one open.
    """
    marks = text.count(":start") + text.count(":end -->")
    found = list(MARKED.finditer(text))
    if not found or marks != 2 * len(found):
        raise ValueError(f"file must hold marked tables, each with a start and an end, got {marks} marks")
    named = tuple(prefix for match in found for prefix in (match[2] or "").split())

    def renewed(match: re.Match[str]) -> str:
        prefixes = tuple((match[2] or "").split())
        own = {n for n in figures if (n.startswith(prefixes) if prefixes else not n.startswith(named))}
        made = headline(figures) if match[1] == "headline" else table({name: figures[name] for name in own})
        return f"{match[0].partition('-->')[0]}-->\n{made}\n<!-- {match[1]}:end -->"

    return MARKED.sub(renewed, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of all figures, or renew the tables of the README and the docs."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--readme", action="store_true", help="rewrite the marked tables")
    parser.add_argument("--check", action="store_true", help="with --readme: change nothing, exit 1 if it would change")
    parser.add_argument("--file", type=Path, nargs="+", default=PAGES, help="the files to rewrite")
    parser.add_argument("--summary", type=Path, default=SUMMARY, help="the figures")
    options = parser.parse_args(arguments)
    figures = read(options.summary)
    if not options.readme:
        print(table(figures))
    texts = {file: file.read_text() for file in options.file if options.readme}
    changed = {file: new for file, old in texts.items() if (new := rewrite(old, figures)) != old}
    for file, text in changed.items():
        if not options.check:
            file.write_text(text)
    return int(options.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
