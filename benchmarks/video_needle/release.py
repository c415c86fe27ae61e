"""A trained checkpoint as a folder that others can use: bfloat16 safetensors, config, model card; checked when read.

python3 -m benchmarks.video_needle.release --checkpoint runs/sparse --out models/video_needle \\
    --compared results/compare.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.video_needle import checkpoint
from benchmarks.video_needle.evaluate import describe
from benchmarks.video_needle.model import count_parameters, make_config, make_model, speed_up_vision
from benchmarks.video_needle.vocabulary import WORDS
from omnisparse_flex.errors import ConfigError, require

#: What a folder holds beside ``config.json``; the second says what it is and how it was made.
WEIGHTS, FACTS, CARD = "model.safetensors", "video_needle.json", "README.md"
#: Oldest transformers whose Qwen2.5-VL positions are those of training.
TRANSFORMERS = (5, 17)


def release(directory: Path, out: Path, rows: Sequence[dict[str, Any]] = ()) -> None:
    """Write a checkpoint's folder.

    Args:
        directory: The checkpoint.
        out: Where; made if need be.
        rows: Of ``compare.py``; those of the checkpoint, by its folder's name, make the card's table.

    Raises:
        ConfigError: If the checkpoint is missing, incomplete or of another model.
    """
    record = checkpoint.read_record(directory)
    model = make_model(0, **record["sizes"])
    checkpoint.load(directory, model)
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    told = {"omnisparse": record["omnisparse"], "sizes": record["sizes"], "runs": _runs(record)}
    told |= {"words": list(WORDS), "sha256": _hash(out / WEIGHTS), "held_out": record["held_out"][-1:]}
    (out / FACTS).write_text(json.dumps(told, indent=1) + "\n")
    megabytes = (out / WEIGHTS).stat().st_size / 2**20
    (out / CARD).write_text(_card(told, count_parameters(model), megabytes, rows, directory.name))


def _runs(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What a checkpoint was trained by, the first run first: each began with the weights of the one before."""
    before = record.get("before")
    own = {key: record[key] for key in ("step", "schedule", "omnisparse", "versions", "device", "seconds")}
    return [*(_runs(before) if before else []), own]


def load(folder: Path) -> Any:
    """The model of a released folder, float32, in eval mode.

    Raises:
        ConfigError: If a file is missing or not the released one, the task has changed, or transformers is too old.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration, __version__

    for name in (WEIGHTS, "config.json", FACTS):
        require((folder / name).is_file(), "weights", f"be a folder with {name}", str(folder))
    version = tuple(int(part) for part in __version__.split(".")[:2])
    require(version >= TRANSFORMERS, "transformers", "be at least {}.{}".format(*TRANSFORMERS), __version__)
    told, found = facts(folder), _hash(folder / WEIGHTS)
    wanted, words, sizes = told["sha256"], told["words"], told["sizes"]
    require(found == wanted, "weights", f"have the checksum {wanted[:12]} of {FACTS}", found[:12])
    require(words == list(WORDS), "weights", "be of this vocabulary", f"{len(words)} other words")
    config = json.loads((folder / "config.json").read_text())
    ours = make_config(**sizes).to_dict()
    for part in ("text_config", "vision_config"):
        theirs = config.get(part, {})
        other = [k for k in ours[part] if _shapes(k) and theirs.get(k) != json.loads(json.dumps(ours[part][k]))]
        require(not other, "config.json", f"be of the released sizes in {part}", other)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return speed_up_vision(model).eval()


def facts(folder: Path) -> dict[str, Any]:
    """What a released model is, and how it was made.

    Raises:
        ConfigError: If the folder's facts are missing or not ours.
    """
    try:
        told: dict[str, Any] = json.loads((folder / FACTS).read_text())
        missing = {"sha256", "words", "sizes", "omnisparse"} - set(told)
    except (OSError, json.JSONDecodeError, TypeError) as error:
        raise ConfigError(f"weights must come with a {FACTS} of ours, got {error!r}") from error
    require(not missing, "weights", f"come with a {FACTS} of ours", f"one without {sorted(missing)}")
    return told


def _shapes(key: str) -> bool:
    """Whether a field of the config changes what the weights mean."""
    return key.endswith(("_size", "_heads", "_layers", "depth", "rope_parameters", "tokens_per_second"))


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _card(facts: dict[str, Any], parameters: int, megabytes: float, rows: Sequence[dict[str, Any]], name: str) -> str:
    lines = [
        "---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n\n# Video needle, a small video-MLLM\n",
        f"Stock `Qwen2_5_VLForConditionalGeneration`, {parameters / 1e6:.1f} M parameters, {megabytes:.1f} MiB in",
        "bfloat16, trained from random weights on the synthetic task of `benchmarks/video_needle`: questions about",
        "coloured shapes that slide through a long clip for a moment. It knows nothing else.\n",
        "| run | attention | steps | stages planned (visual tokens:steps) | tokens a step | peak rate | time |",
        "|---:|---|---:|---|---:|---:|---|",
    ]
    for number, run in enumerate(facts["runs"], 1):
        plan, how = run["schedule"], "dense" if run["omnisparse"] is None else f"OmniSparse `{run['omnisparse']}`"
        time = f"{run['seconds']:.0f} s on {run['device']}"
        cells = [number, how, run["step"], plan["stages"], plan["tokens"], plan["lr"], time]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    last = facts["runs"][-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    seed = last["schedule"]["seed"]
    lines.append(f"\n{versions}. First weights and data follow from seed {seed}; on a GPU sums may round")
    lines.append("differently from run to run, and a run with fewer steps than planned was stopped by its clock.\n")
    lines += [f"Held-out videos, {x['length']} tokens: {describe(x['accuracy'])}.\n" for x in facts["held_out"]]
    if rows:
        from benchmarks.video_needle.report import table

        lines += ["Test videos, dense and sparse:\n", table(list(rows), name), ""]
    lines += [
        "`omnisparse-flex demo --weights` this folder asks it about a generated clip. Trained on frames of Big Buck",
        "Bunny ((c) Blender Foundation, CC BY 3.0) and of the clips `bikes` and `carphone`, shrunk and recoloured.",
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the folder, and read it once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compared", type=Path, help="JSON of compare.py, for the card")
    parser.add_argument("--figures", action="store_true", help="record the checkpoint's size")
    options = parser.parse_args(arguments)
    try:
        rows = json.loads(options.compared.read_text())["rows"] if options.compared else []
        release(options.checkpoint, options.out, rows)
        load(options.out)
    except ConfigError as error:
        print(f"release.py: {error}", file=sys.stderr)
        return 2
    if options.figures:
        from benchmarks.common import summary

        size = (options.out / WEIGHTS).stat().st_size / 2**20
        summary.record("video.checkpoint_mb", size, unit="MiB", baseline="", script=__file__)
    print((options.out / CARD).read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
