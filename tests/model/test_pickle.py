"""A changed model can be pickled; what comes back runs densely, says so, and can be changed anew."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch

from omnisparse_flex import apply_omnisparse, remove_omnisparse
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from tests.helpers.planted import RULES
from tests.helpers.tiny import build

DENSE = "attention is dense: .*call apply_omnisparse"


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    ("name", "again"),
    [("llama", copy.deepcopy), ("qwen2_5_vl", saved), ("decoder", pickled)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_there_and_back(name, again, device):
    model = build("llama" if name == "decoder" else name, device)
    model = model.model if name == "decoder" else model
    x = torch.randint(10, 180, (1, 300), device=device)
    with torch.no_grad():
        expected = model(x)[0]
        apply_omnisparse(model, RULES, min_seq_len=0, inner="eager", visual_mask=lambda args, kwargs: None)
        sparse = model(x)[0]
        twin = again(model)
        with pytest.warns(UserWarning, match=DENSE):
            torch.testing.assert_close(twin(x)[0], expected)
        apply_omnisparse(twin, RULES, min_seq_len=0, inner="eager", visual_mask=lambda args, kwargs: None)
        torch.testing.assert_close(twin(x)[0], sparse)
    assert compiled_decoder_of(twin) is not compiled_decoder_of(model)
    remove_omnisparse(twin)
    assert not any(m._forward_pre_hooks for m in twin.modules())


def test_a_plain_module(device):
    from tests.test_api import GPT

    model = apply_omnisparse(GPT().eval().to(device), RULES, min_seq_len=0, inner="eager")
    twin = pickle.loads(pickle.dumps(model))
    with pytest.warns(UserWarning, match=DENSE), torch.no_grad():
        twin(torch.randn(1, 300, 32, device=device))


@pytest.mark.slow
def test_in_a_process_that_never_applied(tmp_path):
    model = build("llama", num_hidden_layers=1).model
    torch.save(apply_omnisparse(model, RULES, inner="eager"), tmp_path / "model.pt")
    code = (
        "import sys, torch, warnings; warnings.simplefilter('ignore');"
        "model = torch.load(sys.argv[1], weights_only=False);"
        "print(tuple(model(torch.full((1, 40), 50))[0].shape))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], capture_output=True, text=True)
    assert done.stdout.strip() == "(1, 40, 64)", done.stderr
