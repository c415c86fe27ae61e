"""Write ``docs/families.md`` and ``benchmarks/results/families.json``: every family of transformers' mapping.

Without arguments all of them are tried, some 20 minutes on one core; the names of families try these alone, and the
others stay as they are recorded; ``--page`` writes the page alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results" / "families.json"
#: How the remark of a family begins that was not compared: without a tiny model, or without an answer to ids alone.
NOT_RUN = ("no tiny model", "dense attention does not run")
HEAD = """# Model families

Every model type in transformers' mapping from images and text to text, built with two layers and random weights and run
on two rows of unlike layout: text, an image of 256 tokens, text, and then a second turn of text over the cache that the
model made for itself. The rules keep text and a query's own block alone, so the right answer is known: an oracle in
float64 attends densely under that mask. *Error* is the larger distance of the two turns' logits to the oracle's, and
*gradients* that of the decoder's gradients; dense attention in float32 loses 2e-7 to 2e-6 by itself. *If wrong* is the
distance that the logits would have if the first turn's text were dropped; no gradients: not compared. Density is of
this prompt under these rules. A layer of another kind than attention cannot be sparse. Images are placeholders without
pixels here; `tests/model/test_state_in_every_graph.py` and `tests/model/test_gemma_images.py` run pixels.

This page is written by `docs/make_families.py`; `tests/model/test_families.py` runs ten of its rows.
"""


def examined(family: str) -> dict[str, Any]:
    """A family's row, ready for JSON."""
    import torch

    from tests.helpers.families import examine

    row = examine(family, train=True)
    torch._dynamo.reset()
    return dataclasses.asdict(row) | {"faults": row.faults}


def page(rows: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """The page's text."""
    sparse = [row for row in rows if row["sparse"]]
    rest = [row for row in rows if not row["sparse"]]
    lines = [HEAD, f"Run with torch {versions['torch']} and transformers {versions['transformers']}: {_count(rows)}.\n"]
    lines += [
        "## Sparse\n",
        "| family | sparse layers | density | error | if wrong | gradients | slim cache | remarks |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|", *map(line, sparse)]
    lines += ["\n## Dense, refused, or not run here\n", "| family | why |", "|---|---|"]
    lines += [
        f"| {row['family']} | {_cell('; '.join([*row['dense'], *row['says'], *row['faults']]))} |" for row in rest
    ]
    return "\n".join(lines) + "\n"


def line(row: dict[str, Any]) -> str:
    """A sparse family's line of the table."""
    error = max(row["error"], row["second"])
    slim = "yes" if row["slim"] == "yes" else _cell(row["slim"].partition(", got")[0])
    remarks = _remarks(row)
    sites = f"{row['sparse']} of 2"
    numbers = f"{row['density']:.2f} | {error:.0e} | {row['seen']:.1g} | {_number(row['gradients'])}"
    return f"| {row['family']} | {sites} | {numbers} | {slim} | {remarks} |"


def figures(rows: list[dict[str, Any]]) -> dict[str, int]:
    """What the page claims, in numbers."""
    run = [row for row in rows if not any(text.startswith(NOT_RUN) for text in row["says"])]
    return {
        "families": len(rows),
        "built": len(run),
        "sparse": sum(bool(row["sparse"]) for row in run),
        "refused_or_dense_with_a_reason": sum(not row["sparse"] and not row["faults"] for row in run),
        "silent_faults": sum(bool(row["faults"]) for row in rows),
    }


def _count(rows: list[dict[str, Any]]) -> str:
    found = figures(rows)
    return (
        f"dense attention runs {found['built']} of {found['families']} tiny models, {found['sparse']} of them run "
        f"sparsely, {found['refused_or_dense_with_a_reason']} are dense or refused with a reason, "
        f"{found['silent_faults']} have a fault"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def _remarks(row: dict[str, Any]) -> str:
    return _cell("; ".join([*row["dense"], *row["says"], *row["faults"]]))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main(arguments: list[str]) -> None:
    """Run the families that are asked for, and write both files."""
    import torch
    import transformers

    from tests.helpers.families import families

    known = {row["family"]: row for row in json.loads(RESULTS.read_text())["rows"]} if RESULTS.exists() else {}
    wanted = [] if "--page" in arguments else arguments or families()
    for family in wanted:
        known[family] = examined(family)
        print(family, known[family]["faults"] or "well", flush=True)
    rows = [known[name] for name in sorted(known)]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    RESULTS.write_text(json.dumps({"versions": versions, "figures": figures(rows), "rows": rows}, indent=1) + "\n")
    (HERE / "families.md").write_text(page(rows, versions), "utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    os.environ["OMNISPARSE_RAISE_BUGS"] = "1"
    warnings.simplefilter("ignore")
    main(sys.argv[1:])
