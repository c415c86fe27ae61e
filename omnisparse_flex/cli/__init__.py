"""The console script ``omnisparse-flex``: ``demo``, ``check`` and ``calibrate``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from omnisparse_flex.errors import ConfigError, require

#: Exit code of a user's mistake, as argparse's own.
USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        0, or 2 after one clear line on standard error for a user's mistake.
    """
    arguments = _parser().parse_args(argv)
    try:
        return {"demo": _demo, "check": _check, "calibrate": _calibrate}[arguments.verb](arguments)
    except (ConfigError, FileNotFoundError, NotADirectoryError) as error:
        message = " ".join(str(error).split())
        print(f"omnisparse-flex {arguments.verb}: {message}", file=sys.stderr)
        return USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="omnisparse-flex", description="OmniSparse attention for video-MLLMs: see it run, or check your own model."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{demo,check,calibrate}")
    _add_demo(verbs.add_parser("demo", help="a trained video model answers questions about a clip, dense and sparse"))
    _add_check(verbs.add_parser("check", help="is it safe and faster on your model and your video?"))
    _add_calibrate(verbs.add_parser("calibrate", help="rules that keep the recall you want, from your text or video"))
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = "Answers about a generated clip, dense and sparse, beside the truth; saves a picture."
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where the picture goes (here)")
    parser.add_argument("--quick", action="store_true", help="a shorter clip")
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="DIR",
        help="the trained model (default: models/video_needle of the checkout)",
    )


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.description = "Run a model on disk densely and sparsely on the same input, and give one verdict."
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="directory with config.json and weights")
    parser.add_argument("--no-run", action="store_true", help="only list the attention sites; needs no weights")
    parser.add_argument("--video", type=Path, metavar="F", help="a video file")
    parser.add_argument("--prompt", metavar="P", help="the text; without a tokenizer, or without P, seeded token ids")
    parser.add_argument("--config", metavar="JSON", help="OmniSparseConfig fields: JSON text or a file with it")
    parser.add_argument("--tokens", type=_positive, default=4096, metavar="N", help="seeded token ids (default 4096)")
    parser.add_argument("--heatmap", type=Path, metavar="FILE", help="a picture: true recall of every head, densities")
    _add_common(parser)


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.description = "Find per-layer targets whose true recall meets the wanted one on data like yours; saves JSON."
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="directory with config.json and weights")
    parser.add_argument("--target-recall", type=float, metavar="R", help="wanted of every head, in (0, 1)")
    parser.add_argument(
        "--speed", action="store_true", help="measure from which length sparse pays on this machine; needs nothing else"
    )
    material = parser.add_mutually_exclusive_group()
    material.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text like yours, the longer the better")
    material.add_argument("--video", type=Path, metavar="F", help="a video file")
    parser.add_argument("--out", type=Path, metavar="JSON", help="where the rules go")
    parser.add_argument("--config", metavar="JSON", help="the other rules: JSON text or a file with it")
    parser.add_argument(
        "--tokens", type=_positive, default=8192, metavar="N", help="of a window of text (default 8192)"
    )
    parser.add_argument("--windows", type=_positive, default=4, metavar="N", help="most windows of text (default 4)")
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-frames", type=_positive, default=64, metavar="N", help="of the video (default 64)")
    parser.add_argument(
        "--min-seq-len",
        type=_natural,
        metavar="N",
        help="dense below so many queries (default: measured)",
    )


def _demo(arguments: argparse.Namespace) -> int:
    _need("transformers", "av", "skvideo", "matplotlib", "numpy", extra="demo")
    from omnisparse_flex.cli.demo import run_demo

    run_demo(arguments.weights, arguments.out, quick=arguments.quick)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    _need("transformers", extra="hf")
    from omnisparse_flex.cli import check

    if arguments.heatmap is not None:
        _need("matplotlib", extra="demo")
        _writable("heatmap", arguments.heatmap)
    # Before the weights: a typing error should not cost their loading.
    config = check.config_from(arguments.config)
    if arguments.no_run:
        check.explain_model(arguments.model_dir, config)
        return 0
    check.run_check(
        arguments.model_dir,
        config,
        check.Question(arguments.video, arguments.prompt, arguments.max_frames, arguments.tokens),
        min_seq_len="auto" if arguments.min_seq_len is None else arguments.min_seq_len,
        heatmap=arguments.heatmap,
    )
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    _need("transformers", extra="hf")
    from omnisparse_flex.cli import calibrate as calibrate_command
    from omnisparse_flex.cli import check

    config = check.config_from(arguments.config)
    wanted = (arguments.target_recall, arguments.text or arguments.video, arguments.out)
    require(
        arguments.speed or None not in wanted,
        "calibrate",
        "be given --target-recall, --out, and --text or --video, or else --speed",
        " ".join(name for name, x in zip(("--target-recall", "--text", "--out"), wanted, strict=True) if x is not None)
        or "none of them",
    )
    if arguments.speed:
        calibrate_command.run_speed(arguments.model_dir, config)
    if None in wanted:
        return 0
    _writable("out", arguments.out)
    calibrate_command.run_calibrate(
        arguments.model_dir,
        config,
        arguments.target_recall,
        calibrate_command.Material(
            arguments.text, arguments.video, arguments.tokens, arguments.windows, arguments.max_frames
        ),
        arguments.out,
        min_seq_len="auto" if arguments.min_seq_len is None else arguments.min_seq_len,
    )
    return 0


def _writable(name: str, path: Path) -> None:
    fits = path.absolute().parent.is_dir() and not path.is_dir()
    require(fits, name, "be a file in an existing directory", str(path))


def _need(*modules: str, extra: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be installed: pip install 'omnisparse-flex[{extra}]'")


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
