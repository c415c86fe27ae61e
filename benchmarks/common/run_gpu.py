"""Every GPU benchmark, one process after the other on each GPU, with what each took: ``make bench-gpu``.

    python3 -m benchmarks.common.run_gpu --only prefill train
    python3 -m benchmarks.common.run_gpu --gpus 2 --seconds 480 --data DIR --only finetune short step library
    python3 -m benchmarks.common.run_gpu --quick --device cpu

A script that fails or takes too long does not stop the others. Each writes its own JSON and figures as it goes. With
several GPUs each has its share of the machine's cores to itself, so that one script's compiling is not in another's
times. Scripts on SmolLM2 want ``--data``, a folder that ``benchmarks.quality.prepare`` made.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL, VIDEO = str(ROOT.parent / "models" / "video_needle"), str(ROOT / "results" / "video")
#: Stands for the folder of ``--data`` among a script's arguments.
DATA = "{data}"
#: Fine-tuning on text that lasts for all steps, the target falling over half of them.
TUNED = (
    '{"more_text": true, "steps": 400, "warmup": 200, "lr": 3e-4, "train_density": 0.19, "densities": [0.19, 0.25], '
    '"base": {"budget": "per_head", "lazy_threshold": 0.1, "window_size": 128}}'
)


def finetuning(name: str, *scorings: str) -> tuple[str, ...]:
    """Arguments of a fine-tuning experiment with a dense run, weights and results of its own."""
    out, work = ROOT / "results" / f"finetune_smollm2_{name}.json", ROOT / "scratch" / f"finetune_{name}"
    given = ("--data", DATA, "--minutes", "8.5", "--plan", TUNED, "--out", str(out), "--work", str(work))
    return (*given, "--scoring", *scorings)


@dataclasses.dataclass(frozen=True)
class Script:
    """One benchmark.

    Attributes:
        name: As ``--only`` takes it.
        file: In this folder.
        limit: Seconds after which it is stopped.
        quick: It has a ``--quick``.
        arguments: More arguments.
        device: It has a ``--device``.
    """

    name: str
    file: str
    limit: float
    quick: bool = True
    arguments: tuple[str, ...] = ()
    device: bool = True


@dataclasses.dataclass(frozen=True)
class Lane:
    """Where scripts run one after the other.

    Attributes:
        gpu: Its number as CUDA takes it; "" for what is visible.
        cores: Cores of the processor; empty: all.
    """

    gpu: str = ""
    cores: frozenset[int] = frozenset()


#: Cheap and telling ones first.
SCRIPTS = (
    Script("prefill", "prefill/bench_prefill.py", 260),
    Script("train", "prefill/bench_train.py", 180),
    Script("token", "tokens/bench_token.py", 180),
    Script("quality_speed", "speed_quality/bench_quality_speed.py", 300),
    Script("decode", "decode/bench_decode.py", 120),
    Script("decode_model", "decode/bench_decode_model.py", 240),
    Script("short", "prefill/bench_short.py", 360),
    Script("ttft", "model/bench_ttft.py", 600, arguments=("--hf",)),
    Script("compile", "model/bench_compile.py", 300, quick=False),
    Script("scorers", "prefill/bench_scorers.py", 240),
    Script("step", "video_needle/step_time.py", 150, False, ("--init", MODEL, "--out", VIDEO, "--figures"), False),
    Script("finetune", "smollm2/finetune_smollm2.py", 540, arguments=finetuning("tiles_warm", "tile_pool")),
    Script("library", "quality/library.py", 300, False, ("--data", DATA), False),
    Script("tests", "common/gpu_tests.py", 600, quick=False, device=False),
)


def command(script: Script, *, quick: bool, device: str, data: Path | None = None) -> list[str]:
    """What is run."""
    flags = ["--quick"] if quick and script.quick else []
    # A quick run measures nothing, but must find its data all the same.
    given = script.arguments if not quick else ("--data", DATA) if DATA in script.arguments else ()
    flags += [str(data) if argument == DATA else argument for argument in given]
    return [sys.executable, str(ROOT / script.file), *flags, *(["--device", device] if script.device else [])]


def run(line: list[str], lane: Lane, seconds: float) -> str:
    """``"ok"``, or what went wrong."""
    path = os.pathsep.join(filter(None, (str(ROOT.parent), os.environ.get("PYTHONPATH"))))
    own = {"CUDA_VISIBLE_DEVICES": lane.gpu} if lane.gpu else {}
    process = subprocess.Popen(line, env={**os.environ, "PYTHONPATH": path, **own}, start_new_session=True)
    if lane.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, lane.cores)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what it started to compile with, too
        process.wait()
        return f"stopped after {seconds:.0f} s"
    return "ok" if status == 0 else f"failed with exit status {status}"


def lanes(gpus: int) -> list[Lane]:
    """A lane for each GPU; cores are shared out evenly."""
    if gpus == 1:
        return [Lane()]
    named = [x for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x] or [str(i) for i in range(gpus)]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    each = len(cores) // gpus
    return [Lane(named[i], frozenset(cores[i * each : (i + 1) * each])) for i in range(gpus)]


def main() -> int:
    """Run what is asked for; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [script.name for script in SCRIPTS]
    parser.add_argument("--only", nargs="+", choices=names, help="in this order; default: all that can run")
    parser.add_argument("--quick", action="store_true", help="short cases; records nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs to use, each for one script at a time")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of all; then what runs is stopped")
    parser.add_argument("--data", type=Path, help="of the scripts on SmolLM2")
    options = parser.parse_args()
    able = [s for s in SCRIPTS if (s.quick or not options.quick) and (options.data or DATA not in s.arguments)]
    missing = set(options.only or ()) - {script.name for script in able}
    if missing:
        parser.error(f"{', '.join(sorted(missing))}: there is no --quick of it, or it wants --data")
    by_name = {script.name: script for script in able}
    wanted = [by_name[name] for name in options.only] if options.only else able
    waiting, outcomes = collections.deque(enumerate(wanted, 1)), []
    deadline = time.perf_counter() + options.seconds

    def work(lane: Lane) -> None:
        while time.perf_counter() < deadline:
            try:
                number, script = waiting.popleft()
            except IndexError:
                return
            start, place = time.perf_counter(), f"[{number}/{len(wanted)}] {script.name}"
            seconds = min(script.limit, deadline - start)
            print(f"{place} (at most {seconds:.0f} s)", flush=True)
            line = command(script, quick=options.quick, device=options.device, data=options.data)
            outcomes.append(run(line, lane, seconds))
            print(f"{place}: {outcomes[-1]}, {time.perf_counter() - start:.0f} s", flush=True)

    threads = [threading.Thread(target=work, args=(lane,)) for lane in lanes(options.gpus)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 0 if len(outcomes) == len(wanted) and all(outcome == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
