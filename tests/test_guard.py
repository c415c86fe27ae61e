"""Kernels that may fail to compile: switched off once they do, but not by a recording that fails around them."""

from __future__ import annotations

import pytest
import torch

from omnisparse_flex.guard import guarded


def fails():
    raise RuntimeError("no such instruction")


def test_a_kernel_that_failed_is_not_tried_again():
    runs = []
    call = guarded(lambda: runs.append(1) or fails(), "slower then")
    with pytest.warns(UserWarning, match="slower then: no such instruction"):
        assert call() is None
    assert call() is None and len(runs) == 1


def test_a_recording_that_fails_leaves_the_kernel_on(monkeypatch):
    """The stream refuses every launch once its recording is void; outside of it the kernel is as good as before."""
    recording = [True]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording[0])
    call = guarded(lambda: fails() if recording[0] else 7, "slower then")
    with pytest.raises(RuntimeError, match="no such instruction"):
        call()
    recording[0] = False
    assert call() == 7
