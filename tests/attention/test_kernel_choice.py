"""Which kernel a site runs on."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from omnisparse_flex import OmniSparseConfig
from omnisparse_flex.attention import flex_options as kernel_choice
from omnisparse_flex.attention.flex_options import FLASH, has_flash, kernel_options
from omnisparse_flex.backend import Backend

SEVERAL = "a graph for several lengths (symbolic sizes)"


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU with flash-attn-4."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(kernel_choice, "has_flash", lambda: True)


class Fake:
    """What the choice reads of a tensor."""

    def __init__(self, head_dim, device="cuda", length=512):
        self.shape, self.device = (1, 8, length, head_dim), torch.device(device)


def choose(
    kernel="auto",
    dim=128,
    dtype=torch.bfloat16,
    device="cuda",
    plain=True,
    value_dim=None,
    captures=False,
    length=512,
    sinks=False,
):
    shapes = [Fake(d, device, length) for d in (dim, dim, value_dim or dim)]
    return kernel_options(kernel, *shapes, dtype, plain_scores=plain, captures=captures, sinks=sinks)


def symbol(value):
    """A size of a graph for several lengths."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    return mode.from_tensor(torch.empty(value), symbolic_context=context).shape[0]


def test_flash_where_it_is_installed_and_legal(hopper):
    assert choose() == choose("flash") == choose(dim=64) == (FLASH, "")
    assert choose("triton") == ((), "")


def test_triton_without_a_word_where_flash_is_not_installed(hopper, monkeypatch):
    monkeypatch.setattr(kernel_choice, "has_flash", lambda: False)
    assert choose() == choose(captures=True) == choose(length=symbol(512)) == ((), "")


@pytest.mark.parametrize("kernel", ["auto", "flash"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "dtype torch.float32"),
        ({"dim": 80}, "head_dim 80"),
        ({"value_dim": 64}, "head_dim 128"),
        ({"plain": False}, "logits with a bias, soft cap or score_mod"),
        ({"captures": True}, "a mask that reads tensors"),
        ({"length": 127}, "127 queries"),
        ({"sinks": True}, "logit sinks"),
    ],
)
def test_what_flash_does_not_take_runs_on_triton_by_name(hopper, kernel, changes, reason):
    options, why = choose(kernel, **changes)
    assert FLASH[0] not in options and why == reason


def test_symbolic_sizes_run_on_triton(hopper):
    length = symbol(512)
    assert choose(length=length) == choose("flash", length=length) == ((), SEVERAL)
    assert length == 512  # a guard: now it is a number
    assert choose(length=length) == (FLASH, "")


def test_deterministic_algorithms_run_on_triton(hopper):
    torch.use_deterministic_algorithms(True)
    try:
        assert choose() == ((), "deterministic algorithms")
    finally:
        torch.use_deterministic_algorithms(False)


def test_another_gpu_gets_no_options_that_were_not_measured_on_it(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert choose() == choose("flash") == ((), "compute capability 8.x")
    assert choose("triton") == choose(device="cpu") == ((), "")


def test_a_note_for_each_reason():
    refused = [(0, "x"), (1, ""), (2, "y"), (3, "x")]
    assert kernel_choice.notes(refused) == [
        "FLASH does not take x: layers 0, 3 run the Triton kernel",
        "FLASH does not take y: layers 2 run the Triton kernel",
    ]
    assert kernel_choice.notes([(0, ""), (1, "")]) == []


@pytest.mark.parametrize("installed", [True, False])
def test_flash_attn_2_is_not_flash_attn_4(installed, monkeypatch):
    """Version 2 has a folder ``cute`` as well."""

    def version(name):
        assert name == "flash-attn-4"
        if not installed:
            raise PackageNotFoundError(name)
        return "4.0.0b1"

    monkeypatch.setattr("importlib.metadata.version", version)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert has_flash() == installed


class Elsewhere:
    """The sites' tensors as if they lay on a GPU."""

    def __init__(self, tensor):
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, torch.device("cuda")


@pytest.fixture
def traced(hopper, monkeypatch):
    """Compiles for a pretended GPU and runs nothing there: the kernel's options go no further than the choice."""
    lower = sys.modules["omnisparse_flex.passes.lower"]
    asked = []

    def choose(kernel, query, key, value, dtype, **rest):
        options, why = kernel_options(kernel, *(Elsewhere(x) for x in (query, key, value)), torch.bfloat16, **rest)
        asked.append(options)
        return (), why

    monkeypatch.setattr(lower, "kernel_options", choose)
    return asked


def causal_attention(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def padded_attention(query, key, value, real):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=real[:, None, None, :])


def test_a_second_length_runs_on_triton_and_the_report_says_so(traced):
    backend = Backend(OmniSparseConfig(key_block=128), min_seq_len=0, inner="inductor")
    compiled = torch.compile(causal_attention, backend=backend)
    for length in (256, 384):
        compiled(*(torch.randn(1, 2, length, 64) for _ in range(3)))
        if length == 256:
            assert not any("FLASH" in note for note in backend.log.notes)
    assert traced == [FLASH, ()]
    assert [note for note in backend.log.notes if "FLASH" in note] == [
        f"FLASH does not take {SEVERAL}: layers 0 run the Triton kernel"
    ]


def test_a_mask_that_reads_tensors_runs_on_triton(traced):
    backend = Backend(OmniSparseConfig(key_block=128), min_seq_len=0, inner="inductor")
    query = torch.randn(1, 2, 256, 64)
    torch.compile(padded_attention, backend=backend)(query, query + 0, query * 1, torch.ones(1, 256, dtype=torch.bool))
    assert traced == [()] and any("a mask that reads tensors" in note for note in backend.log.notes)


@pytest.mark.parametrize("kernel", ["auto", "flash"])
def test_token_granularity_never_asks_for_flash(traced, kernel):
    """Its parts are merged by their log-sum-exps, whose gradient FLASH does not have."""
    backend = Backend(OmniSparseConfig(granularity="token"), min_seq_len=0, kernel="auto", inner="inductor")
    backend.kernel = kernel  # the package is pretended
    query = torch.randn(1, 2, 256, 64)
    torch.compile(causal_attention, backend=backend)(query, query + 0, query * 1)
    assert traced == []
    assert any("token granularity" in note for note in backend.log.notes) == (kernel == "flash")


def test_other_inner_compilers_have_no_kernels(traced):
    backend = Backend(OmniSparseConfig(), min_seq_len=0, inner="aot_eager")
    query = torch.randn(1, 2, 256, 64)
    torch.compile(causal_attention, backend=backend)(query, query + 0, query * 1)
    assert traced == [] and not any("FLASH" in note for note in backend.log.notes)
