"""``OMNISPARSE_DUMP``: what it writes, what it changes (nothing), and where it cannot write."""

import pytest
import torch
import torch.nn.functional as F

from omnisparse_flex.backend import Backend
from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.errors import ConfigError
from omnisparse_flex.passes import PIPELINE
from omnisparse_flex.passes.dump import DUMP_VARIABLE


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def run(backend, length=40):
    torch.manual_seed(0)
    return torch.compile(attend, backend=backend)(*torch.randn(3, 1, 2, length, 16))


def backend():
    return Backend(OmniSparseConfig(), inner="eager", min_seq_len=0)


def test_every_pass_has_a_file_and_the_report_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path))
    dumping = backend()
    out = run(dumping)
    names = [run_pass.__name__ for run_pass in PIPELINE]
    files = sorted((tmp_path / "graph_000").iterdir())
    assert [file.name for file in files] == [f"{i}_{name}.py" for i, name in enumerate(["captured", *names])]
    calls = [[line for line in file.read_text().splitlines() if " = omnisparse" in line] for file in files]
    assert not calls[0] and len(calls[-1]) == 2  # the selection, the attention
    assert all(" ms, " in file.read_text().splitlines()[0] for file in files[1:])
    assert f"the graph after every pass: {tmp_path / 'graph_000'}" in str(dumping.log.report())
    monkeypatch.delenv(DUMP_VARIABLE)
    torch._dynamo.reset()
    assert torch.equal(out, run(backend()))


def test_graphs_of_one_process_and_of_another_share_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path))
    (tmp_path / "graph_000").mkdir()  # another process's
    run(backend())
    torch._dynamo.reset()
    run(backend())
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["graph_000", "graph_001", "graph_002"]
    assert not list((tmp_path / "graph_000").iterdir())


def test_a_folder_that_cannot_be_made_is_refused_before_any_compile(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path / "file" / "below"))
    with pytest.raises(ConfigError, match=f"{DUMP_VARIABLE} must name a folder that can be written"):
        backend()


def test_a_folder_that_is_lost_later_does_not_stop_the_call(tmp_path, monkeypatch):
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path / "dump"))
    dumping = backend()
    (tmp_path / "dump").rmdir()
    (tmp_path / "dump").write_text("")
    run(dumping)
    assert dumping.log.report().rewritten
