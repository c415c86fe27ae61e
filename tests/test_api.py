"""The public face: names, bad input before any change, and plain modules."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import omnisparse_flex
from omnisparse_flex import ConfigError, OmniSparseConfig, apply_omnisparse, collect_stats, rewrite_report
from omnisparse_flex.api import dense
from omnisparse_flex.backend import UNMEASURED_MIN_QUERIES, Backend
from omnisparse_flex.model.compiled_module import compiled_decoder_of
from tests.helpers.tiny import batch, build, text_config


class Attention(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 2, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        return x + self.out(y.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    def __init__(self, layers: int = 2, **kwargs):
        super().__init__()
        self.layers = nn.ModuleList(Attention(**kwargs) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def gpt(device):
    torch.manual_seed(0)
    return GPT().eval().to(device)


def test_public_names():
    assert set(omnisparse_flex.__all__) == {
        "ConfigError",
        "OmniSparseCache",
        "OmniSparseConfig",
        "apply_omnisparse",
        "calibrate",
        "collect_stats",
        "remove_omnisparse",
        "rewrite_report",
        "sparse_attention",
    }
    assert all(hasattr(omnisparse_flex, name) for name in omnisparse_flex.__all__)


BAD = {
    "config type": ({"config": {"target_recall": 0.9}}, "config must be an OmniSparseConfig, got"),
    "min_seq_len": ({"min_seq_len": -1}, "min_seq_len must be at least 0, got -1"),
    "min_seq_len type": ({"min_seq_len": 1.5}, 'min_seq_len must be "auto" or an int of at least 0, got 1.5'),
    "kernel": ({"kernel": "cuda"}, "kernel must be one of auto, triton, flash, got 'cuda'"),
    "inner": ({"inner": "nvfuser"}, "inner must be a Dynamo backend or one of auto, inductor, aot_eager, eager, got"),
    "dynamic": ({"dynamic": "yes"}, "dynamic must be None, True or False, got 'yes'"),
    "visual dtype": ({"visual_mask": torch.ones(1, 4)}, "visual_mask must be bool, got torch.float32"),
    "visual rank": ({"visual_mask": torch.ones(4, dtype=torch.bool)}, "visual_mask must have shape (B, N), got (4,)"),
    "visual type": ({"visual_mask": [True]}, "visual_mask must be a bool tensor (B, N) or None, got 'list'"),
    "layers": (
        {"config": OmniSparseConfig(target_recall=(0.9, 0.9, 0.9))},
        "target_recall must hold one value for each of the 2 layers, got (0.9, 0.9, 0.9)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_change_nothing(case, device):
    arguments, message = BAD[case]
    model = build("llama", device)
    with pytest.raises(ConfigError) as error:
        apply_omnisparse(model, **arguments)
    assert message in str(error.value)
    assert compiled_decoder_of(model) is None and model.config._attn_implementation == "sdpa"


def test_flash_without_its_package_is_refused(gpt, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"kernel must be .* unless flash-attn-4 is installed"):
        apply_omnisparse(gpt, kernel="flash")


def test_models_that_cannot_be_changed():
    with pytest.raises(ConfigError, match=r"model must be an nn.Module, got 'int'"):
        apply_omnisparse(3)
    with pytest.raises(ConfigError, match="model must not be compiled yet"):
        apply_omnisparse(torch.compile(GPT()))
    compiled_part = GPT()
    compiled_part.layers[0].compile()
    with pytest.raises(ConfigError, match=r"got a compiled part 'layers.0'"):
        apply_omnisparse(compiled_part)
    with pytest.raises(ConfigError, match="model must be changed by apply_omnisparse, got 'GPT'"):
        rewrite_report(GPT())
    with pytest.raises(ConfigError, match="model must be changed by apply_omnisparse"), collect_stats(GPT()):
        pass


def test_eager_only_and_encoder_decoder_models_are_refused(monkeypatch):
    from transformers import T5Config, T5ForConditionalGeneration

    model = build("llama")
    monkeypatch.setattr(type(model.model), "_supports_sdpa", False)
    with pytest.raises(ConfigError, match="model must support sdpa attention, got LlamaModel with eager"):
        apply_omnisparse(model)
    t5 = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=50, decoder_start_token_id=0)
    with pytest.raises(ConfigError, match="model must be decoder-only"):
        apply_omnisparse(T5ForConditionalGeneration(t5))


def test_failure_half_way_restores_the_model(monkeypatch):
    model = build("qwen2_5_vl")
    monkeypatch.setattr("omnisparse_flex.model.install.VisualMaskHook", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        apply_omnisparse(model)
    assert compiled_decoder_of(model) is None
    assert model.config.text_config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_plain_module(gpt, device):
    x = torch.randn(2, 300, 32, device=device)
    expected = gpt(x)
    apply_omnisparse(gpt, OmniSparseConfig(target_recall=0.999, budget=1 << 20), min_seq_len=0, inner="aot_eager")
    assert rewrite_report(gpt).notes[-1] == "the sites of a plain module are known after its first run"
    assert torch.allclose(gpt(x), expected, atol=1e-5)
    report = rewrite_report(gpt)
    assert [site.kind for site in report.rewritten] == ["sdpa", "sdpa"]
    with dense(gpt):
        assert torch.equal(gpt(x), expected)


def test_backend_by_name(gpt, device):
    x = torch.randn(1, 300, 32, device=device)
    options = {"config": {"target_recall": 0.999, "budget": 1 << 20}, "min_seq_len": 0, "inner": "aot_eager"}
    compiled = torch.compile(gpt, backend="omnisparse", options=options)
    assert torch.allclose(compiled(x), gpt(x), atol=1e-5)


def test_backend_by_name_checks_its_options(gpt, device):
    x = torch.randn(1, 300, 32, device=device)
    for options, message in (
        ({"budget": 3}, "options must hold only config, min_seq_len, kernel, inner, got"),
        ({"config": {"recall": 1}}, "config must hold only the fields"),
    ):
        with pytest.raises(Exception, match=message):
            torch.compile(gpt, backend="omnisparse", options=options)(x)


def test_nothing_rewritten_warns(device):
    model = nn.Linear(4, 4).to(device)
    apply_omnisparse(model, inner="eager")
    with pytest.warns(UserWarning, match="no attention site"):
        model(torch.randn(2, 4, device=device))
    assert "no attention site found" in " ".join(rewrite_report(model).notes)


def test_a_gpu_never_measured_gets_conservative_defaults(monkeypatch):
    backend = Backend(OmniSparseConfig())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Other GPU")
    assert backend.min_queries(torch.device("cuda")) == UNMEASURED_MIN_QUERIES
    assert backend.log.report().notes == (
        f"Some Other GPU was never measured: dense below {UNMEASURED_MIN_QUERIES} queries",
    )


def test_dropout_in_training_is_a_named_skip(device):
    model = GPT(dropout=0.1).train().to(device)
    apply_omnisparse(model, min_seq_len=0, inner="eager")
    with pytest.warns(UserWarning, match="rewrote no attention site"):
        model(torch.randn(1, 200, 32, device=device))
    assert {s.reason for s in rewrite_report(model).skipped} == {
        "attention dropout is 0.1: no flex kernel drops weights"
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype, device):
    model = GPT(dim=64).to(device, dtype).eval()
    x = torch.randn(1, 300, 64, device=device, dtype=dtype)
    expected = model(x)
    apply_omnisparse(model, OmniSparseConfig(target_recall=0.999, budget=1 << 20), min_seq_len=0, inner="aot_eager")
    tolerance = 4 * math.sqrt(64) * torch.finfo(dtype).eps
    assert (model(x) - expected).abs().max() <= tolerance * expected.abs().max()
    assert len(rewrite_report(model).rewritten) == 2


def test_user_visual_mask_is_checked_per_call(device):
    model = build("llama", device)
    apply_omnisparse(
        model, visual_mask=lambda args, kwargs: torch.ones(1, 3, dtype=torch.bool), min_seq_len=0, inner="eager"
    )
    with pytest.raises(ConfigError, match=r"visual_mask must have shape \(1, 140\), got \(1, 3\)"):
        model(**batch((140,), device))


def test_stats_and_density(device):
    model = build("llama", device, **text_config(num_hidden_layers=2))
    rules = {"lazy_threshold": None, "sink_size": 16, "window_size": 16, "last_rows": 0}
    apply_omnisparse(model, OmniSparseConfig(target_recall=(1.0, 0.5), **rules), min_seq_len=0, inner="aot_eager")
    with torch.no_grad(), collect_stats(model, exact=True, maps=True) as stats:
        model(**batch((900,), device))
    (layer,) = stats.per_layer()
    assert layer.layer == 1 and 0 < layer.density < 1
    assert stats.density == pytest.approx((1 + layer.density) / 2)
    assert layer.estimated_recall >= 0.5 and len(layer.true_recall) == 4
    assert all(0 < low <= mean <= 1.0001 for low, mean in zip(layer.worst_true_recall, layer.true_recall, strict=True))
    maps = stats.block_maps(1)
    kept = (maps[:2, :8, :8] > 0).sum(dtype=torch.float32) / 2
    assert kept / 36 == pytest.approx(layer.density, abs=1e-3)
    assert "true recall" in str(stats) and stats.to_dict()["layers"][0]["layer"] == 1


def test_the_package_is_imported_first_and_its_folders_hand_out_what_they_hold() -> None:
    """In a process of its own: here, torch is imported already."""
    lines = (
        "import omnisparse_flex",
        "from omnisparse_flex.attention import sparse_attention",
        "from omnisparse_flex.cache import OmniSparseCache",
        "from omnisparse_flex.calibration import calibrate, run_calibration",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
