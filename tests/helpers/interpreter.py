"""Runs a Triton kernel's check on the CPU, in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

_SCALARS = tuple(int(x) for x in numpy.__version__.split(".")[:2]) < (2, 4)
_TRITON = importlib.util.find_spec("triton") is not None

needs_interpreter = pytest.mark.skipif(not _TRITON, reason="needs Triton")
#: From 2.4 on, numpy refuses what the interpreter of Triton 3.6 does with a kernel's scalars.
needs_scalars = pytest.mark.skipif(not (_TRITON and _SCALARS), reason="needs Triton, and a numpy that it can use")


def run_interpreted(module: str, call: str) -> None:
    """Calls ``module.call`` of the tests in a process of its own: Triton decides when it is imported."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    code = f"import {module}; {module}.{call}"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
