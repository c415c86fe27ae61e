"""Kernels that fail once are left alone, and only kernels that fail; they run where their tensors lie."""

from contextlib import nullcontext

import pytest
import torch

from omnisparse_flex.kernels.fallback import guarded

X = torch.zeros(1)


def test_a_failure_warns_once_and_ends_it():
    calls = []

    def run(x):
        calls.append(x)
        raise RuntimeError("no such instruction")

    call = guarded(run, "the kernels failed")
    with pytest.warns(UserWarning, match="omnisparse: the kernels failed: no such instruction"):
        assert call(X) is None
    assert call(X) is None and len(calls) == 1  # a second warning would be an error


def test_running_out_of_memory_is_no_failure_of_the_kernels():
    full = [True]

    def run(x):
        if full[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x

    call = guarded(run, "the kernels failed")
    with pytest.raises(torch.OutOfMemoryError):
        call(X)
    full[0] = False
    assert call(X) is X


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: entered.append(x) or nullcontext())
    assert guarded(lambda x, y: (x, y), "the kernels failed")(X, 2) == (X, 2) and entered == [X]


def test_a_recording_that_fails_leaves_the_kernels_on(monkeypatch):
    """The stream refuses every launch once its recording is void; outside of it the kernels are as good as before."""
    recording = [True]

    def run(x):
        if recording[0]:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x

    monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording[0])
    call = guarded(run, "the kernels failed")
    with pytest.raises(RuntimeError, match="not permitted"):
        call(X)
    recording[0] = False
    assert call(X) is X
