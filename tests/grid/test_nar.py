"""NAR: forwards counted, cached decoding against one forward, exact probabilities, heads, guidance, refusals."""

import itertools

import pytest
import torch

transformers = pytest.importorskip("transformers")

from omnisparse_flex.errors import ConfigError  # noqa: E402
from omnisparse_flex.grid import NeighborHeads, nar_generate, nar_logits, nar_loss  # noqa: E402
from tests.helpers.grids import small  # noqa: E402

VOCAB = 12


def llama(**changes):
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(**small(num_hidden_layers=3, max_position_embeddings=2048, **changes)))


def qwen(**changes):
    """A decoder whose rotary embedding has three axes."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**small(num_hidden_layers=3, rope_parameters=rope, **changes)))


DECODERS = {"llama": llama, "qwen": qwen}


def build(name, grid, mixing="mean", attention="sdpa", vocab=VOCAB):
    torch.manual_seed(0)
    decoder = DECODERS[name]().eval().double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    decoder.set_attn_implementation(attention)
    heads = NeighborHeads(decoder, vocab, grid, mixing)
    if heads.gates is not None:
        for parameter in heads.gates.parameters():
            torch.nn.init.normal_(parameter)
    return decoder, heads


def conditions(rows=2, length=3, seed=0):
    return torch.randint(VOCAB, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


def count(decoder):
    calls = []
    decoder.register_forward_pre_hook(lambda *a: calls.append(a[2]["input_ids"].shape), with_kwargs=True)
    return calls


class Recorder:
    """Logits by raster place; noise of the place, so that greedy decoding varies."""

    def __init__(self):
        self.seen = {}

    def __call__(self, places, logits):
        noisy = []
        for place, row in zip(places.tolist(), logits.unbind(1), strict=True):
            self.seen[place] = row
            generator = torch.Generator().manual_seed(place)
            noisy.append(row - torch.log(-torch.log(torch.rand(row.shape, generator=generator, dtype=row.dtype))))
        return torch.stack(noisy, dim=1)

    def logits(self):
        return torch.stack([self.seen[place] for place in sorted(self.seen)], dim=1)


@pytest.mark.parametrize(("grid", "forwards"), [((16, 16), 31), ((4, 16, 16), 34), ((3, 5), 7), ((1, 1), 1)])
def test_one_forward_for_each_shell(grid, forwards):
    decoder, heads = build("llama", grid)
    calls = count(decoder)
    output = nar_generate(decoder, heads, conditions(rows=1))
    tokens = torch.Size(grid).numel()
    assert output.forwards == len(calls) == forwards
    assert output.tokens.shape == (1, tokens) and output.tokens.max() < VOCAB
    assert sum(shape[1] for shape in calls) == 3 + tokens - 1  # the condition, and every token but the last


@pytest.mark.parametrize("grid", [(4, 5), (2, 3, 4)])
@pytest.mark.parametrize(
    ("name", "mixing", "attention", "cache"),
    [
        ("llama", "mean", "sdpa", "dynamic"),
        ("llama", "gate", "sdpa", "static"),
        ("llama", "mean", "eager", "static"),
        ("llama", "mean", "flex_attention", "dynamic"),
        ("qwen", "mean", "sdpa", "static"),
        ("qwen", "gate", "sdpa", "dynamic"),
    ],
)
def test_the_cached_decoding_is_the_teacher_forced_forward(name, grid, mixing, cache, attention, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as integration

    monkeypatch.setattr(
        integration, "compile_friendly_flex_attention", lambda *a, training=False, **k: flex_attention(*a, **k)
    )
    decoder, heads = build(name, grid, mixing, attention)
    recorder, condition = Recorder(), conditions()
    static = transformers.StaticCache(config=decoder.config, max_cache_len=40) if cache == "static" else None
    output = nar_generate(decoder, heads, condition, do_sample=False, logits_processor=recorder, cache=static)
    assert len(output.tokens.unique()) > 5
    with torch.no_grad():
        logits = nar_logits(decoder, heads, output.tokens, condition)
    torch.testing.assert_close(logits, recorder.logits(), atol=1e-5, rtol=1e-5)  # RMSNorm computes in float32


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("mixing", ["mean", "gate"])
def test_probabilities_of_a_toy_grid_sum_to_one(name, mixing):
    decoder, heads = build(name, (2, 2), mixing, vocab=3)
    grids = torch.tensor(list(itertools.product(range(3), repeat=4)))
    with torch.no_grad():
        nats = nar_loss(decoder, heads, grids, conditions(rows=1).expand(81, -1), reduction="none").sum(dim=1)
    assert (-nats.double()).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_drawn_grids_have_these_probabilities():
    decoder, heads = build("llama", (1, 2), vocab=3)
    grids = torch.tensor(list(itertools.product(range(3), repeat=2)))
    condition = conditions(rows=1)
    with torch.no_grad():
        expected = (-nar_loss(decoder, heads, grids, condition.expand(9, -1), reduction="none").sum(dim=1)).exp()
    torch.manual_seed(0)
    drawn = nar_generate(decoder, heads, condition.expand(4000, -1)).tokens
    share = (drawn @ torch.tensor([3, 1])).bincount(minlength=9) / 4000
    assert (share - expected).abs().max() < 0.03


def test_each_token_has_the_heads_of_the_neighbours_it_has():
    heads = build("llama", (2, 2, 3))[1]
    sources = heads.sources(4)
    assert sources[:, 0].tolist() == [3, 3, 3]  # all heads at the condition's last token
    assert sources[0].tolist() == [3, 4, 5, -1, 7, 8, -1, 10, 11, -1, 13, 14]
    assert sources[1].tolist() == [3, -1, -1, 4, 5, 6, -1, -1, -1, 10, 11, 12]
    assert sources[2].tolist() == [3, -1, -1, -1, -1, -1, 4, 5, 6, 7, 8, 9]
    states = [torch.randn(1, 16, 32, dtype=torch.float64) for _ in range(3)]
    logits = heads(states, sources)
    each = [head(norm(state)) for head, norm, state in zip(heads.heads, heads.norms, states, strict=True)]
    torch.testing.assert_close(logits[:, 2], each[0][:, 5])
    torch.testing.assert_close(logits[:, 4], (each[0][:, 7] + each[1][:, 5]) / 2)
    torch.testing.assert_close(logits[:, 11], (each[0][:, 14] + each[1][:, 12] + each[2][:, 9]) / 3)


def test_heads_read_one_layer_deeper_for_each_axis():
    decoder, heads = build("llama", (2, 2, 2))
    states = decoder(input_ids=conditions(), output_hidden_states=True).hidden_states
    assert all(a is b for a, b in zip(heads.states(states), states[1:], strict=True))
    _, image = build("llama", (2, 2))
    assert all(a is b for a, b in zip(image.states(states), states[2:], strict=True))


def test_a_gate_starts_as_the_mean_and_heads_as_a_raster_models():
    decoder, mean = build("llama", (3, 4))
    gate = NeighborHeads(decoder, VOCAB, (3, 4), "gate")
    gate.load_state_dict(mean.state_dict(), strict=False)
    tokens = torch.randint(0, VOCAB, (2, 12))
    torch.testing.assert_close(
        nar_logits(decoder, gate, tokens, conditions()), nar_logits(decoder, mean, tokens, conditions())
    )
    head = torch.nn.Linear(32, 40, bias=False).double()
    copied = NeighborHeads(decoder, VOCAB, (3, 4), head=head)
    assert all(torch.equal(own.weight, head.weight[:VOCAB]) for own in copied.heads)


@pytest.mark.parametrize("grid", [(3, 4), (2, 2, 3)])
def test_guidance_in_one_batch_equals_two_runs(grid):
    decoder, heads = build("llama", grid)
    recorder, condition, without = Recorder(), conditions(), conditions(seed=5)
    output = nar_generate(
        decoder,
        heads,
        condition,
        unconditional=without,
        guidance_scale=2.5,
        do_sample=False,
        logits_processor=recorder,
    )
    assert output.forwards == sum(grid) - len(grid) + 1
    with torch.no_grad():
        runs = [nar_logits(decoder, heads, output.tokens, rows).log_softmax(-1) for rows in (condition, without)]
    expected = runs[1] + 2.5 * (runs[0] - runs[1])
    torch.testing.assert_close(recorder.logits(), expected, atol=1e-4, rtol=1e-4)


def test_top_k_and_temperature_bound_the_draw():
    decoder, heads = build("llama", (3, 3))
    greedy = nar_generate(decoder, heads, conditions(), do_sample=False).tokens
    assert torch.equal(nar_generate(decoder, heads, conditions(), top_k=1).tokens, greedy)
    assert torch.equal(nar_generate(decoder, heads, conditions(), temperature=1e-4).tokens, greedy)
    assert not torch.equal(nar_generate(decoder, heads, conditions(), temperature=9.0, top_k=99).tokens, greedy)


@pytest.mark.parametrize("mixing", ["mean", "gate"])
def test_it_learns(mixing):
    torch.manual_seed(0)
    decoder = llama()
    heads = NeighborHeads(decoder, VOCAB, (4, 4), mixing)
    tokens, condition = torch.randint(0, VOCAB, (4, 16)), conditions(rows=4, length=1)
    optimizer = torch.optim.AdamW([*decoder.parameters(), *heads.parameters()], lr=3e-3)
    losses = []
    for _ in range(25):
        losses.append(nar_loss(decoder, heads, tokens, condition))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]


def test_bad_input_is_refused():
    decoder, heads = build("llama", (2, 3))
    calls = count(decoder)
    tokens, condition = torch.zeros(2, 6, dtype=torch.int64), conditions()

    def static(length):
        return transformers.StaticCache(config=decoder.config, max_cache_len=length)

    refused = [
        (lambda: NeighborHeads(decoder, 5, (2,)), "grid must be (rows, columns) or (frames, rows, columns), got (2,)"),
        (lambda: NeighborHeads(decoder, 5, (2, 0)), "grid's extents must be an int of at least 1, got 0"),
        (lambda: NeighborHeads(decoder, 0, (2, 2)), "vocab_size must be an int of at least 1, got 0"),
        (lambda: NeighborHeads(decoder, 5, (2, 2), "sum"), "mixing must be one of mean, gate, got 'sum'"),
        (
            lambda: NeighborHeads(decoder, 5, (2, 2), head=torch.nn.Linear(32, 4)),
            "head must map 32 features to 5 symbols, got (4, 32)",
        ),
        (lambda: nar_loss(decoder, heads, tokens[:, 1:], condition), "tokens must have the shape (2, 6), got (2, 5)"),
        (lambda: nar_loss(decoder, heads, tokens, condition, "sum"), "reduction must be one of mean, none, got 'sum'"),
        (
            lambda: nar_generate(decoder, heads, condition[:, :0]),
            "condition must have at least one token, got (2, 0)",
        ),
        (
            lambda: nar_generate(decoder, heads, condition[0]),
            "condition must be an int tensor of shape (B, P), got a torch.int64 tensor of shape (3,)",
        ),
        (
            lambda: nar_generate(decoder, heads, condition, guidance_scale=2.0),
            "unconditional must have the shape (2, 3), got None",
        ),
        (lambda: nar_generate(decoder, heads, condition, temperature=0), "temperature must be above 0, got 0"),
        (lambda: nar_generate(decoder, heads, condition, top_k=0), "top_k must be at least 1, got 0"),
        (
            lambda: nar_generate(decoder, heads, condition, cache=static(7)),
            "cache must have at least 8 slots, got 7",
        ),
        (
            lambda: nar_generate(decoder, heads, condition, cache=()),
            "cache must be a DynamicCache or a StaticCache, got 'tuple'",
        ),
        (lambda: nar_generate(decoder, decoder, condition), "heads must be NeighborHeads, got 'LlamaModel'"),
    ]
    for call, message in refused:
        with pytest.raises(ConfigError) as raised:
            call()
        assert str(raised.value) == message
    shallow = llama()
    shallow.config.num_hidden_layers = 2
    with pytest.raises(ConfigError, match="decoder must have at least 3 layers, got 2"):
        NeighborHeads(shallow, 5, (2, 2, 2))
    decoder.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ConfigError, match="attn_implementation must take a mask"):
        nar_generate(decoder, heads, condition)
    assert not calls
