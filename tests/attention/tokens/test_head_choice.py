"""Query heads that choose their own tokens, in tensor code: each as if it were alone, all in one call and one model."""

import copy
import dataclasses

import pytest
import torch

from omnisparse_flex import OmniSparseCache, OmniSparseConfig, apply_omnisparse, collect_stats, rewrite_report
from omnisparse_flex.attention.tokens.dispatch import attend_and_select, attend_tokens
from omnisparse_flex.masks.expr.expr import Const, causal
from omnisparse_flex.masks.expr.index_mask import IndexMask
from omnisparse_flex.masks.statistics import STATS
from omnisparse_flex.masks.tokens.key_bits import unpack_bits
from omnisparse_flex.testing import AttentionShape
from tests.attention.tokens.test_token_kernels import CONFIG, loud, site_of
from tests.attention.tokens.test_tokens import check, run
from tests.helpers.tiny import batch, build, cached
from tests.model.test_training import gradients, worst
from tests.model.test_transformers import bracket

HEADS = dataclasses.replace(CONFIG, gqa_choice="head", lazy_threshold=0.4)
NARROW = dataclasses.replace(HEADS, scoring_dims=16)
CASES = [HEADS, NARROW, dataclasses.replace(HEADS, budget=40)]
SHAPES = [AttentionShape(2, 2, 3, 300, 700, 32), AttentionShape(1, 1, 2, 520, 520, 32)]
TOKENS = {"granularity": "token", "gqa_choice": "head", "segment_size": 128, "sink_size": 16, "window_size": 64}
EVERYTHING = OmniSparseConfig(target_recall=0.999, budget=1 << 20, lazy_threshold=None, **TOKENS)
SPARSE = OmniSparseConfig(target_recall=0.98, scoring_dims=16, lazy_threshold=0.05, **TOKENS)


def causal_mask(shape):
    return IndexMask(causal(Const(shape.kv_len - shape.q_len)))


@pytest.mark.parametrize("fields", [{}, {"score_mod": lambda s, b, h, q, kv: s + h * (q - kv) * 0.001}])
@pytest.mark.parametrize("config", CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_is_dense_attention_under_what_each_head_chose(shape, config, fields):
    """In float64, gradients included; a change of scores sees the query's head."""
    given = loud(shape, "cpu", torch.float64)
    out, selection, kept, own = run(shape, given, config, causal_mask(shape), **fields)
    assert kept.sum() < 0.9 * own.sum() and selection.rows.shape[:2] == (shape.batch, shape.heads)
    fetched = unpack_bits(selection.chosen, shape.kv_len).unflatten(1, (shape.kv_heads, shape.group))
    assert (fetched[:, :, 0] != fetched[:, :, 1]).any(), "members chose alike: a test of nothing"
    check(out, given, kept, **fields)


@pytest.mark.parametrize("config", CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_head_chooses_as_if_it_were_alone(shape, config):
    query, key, value = loud(shape, "cpu", torch.float64)
    out, selection, *_ = run(shape, (query, key, value), config, causal_mask(shape))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    got = torch.autograd.grad(out, (query, key, value), grad)
    wanted = [torch.zeros_like(x) for x in got]
    single, group = shape._replace(kv_heads=1, group=1), dataclasses.replace(config, gqa_choice="group")
    for h in range(shape.heads):
        heads = (slice(h, h + 1), *[slice(h // shape.group, h // shape.group + 1)] * 2)
        mine = [x.detach()[:, own].requires_grad_() for x, own in zip((query, key, value), heads, strict=True)]
        alone, own, *_ = run(single, mine, group, causal_mask(shape))
        torch.testing.assert_close(out[:, h : h + 1], alone)
        for all_heads, one in zip(selection[1:], own[1:], strict=True):
            torch.testing.assert_close(all_heads[:, h : h + 1], one)
        for total, x, own in zip(wanted, torch.autograd.grad(alone, mine, grad[:, h : h + 1]), heads, strict=True):
            total[:, own] += x
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_group_of_one_chooses_as_its_head():
    shape = AttentionShape(1, 2, 1, 520, 520, 32)
    results = []
    for config in (NARROW, dataclasses.replace(NARROW, gqa_choice="group")):
        results.append(run(shape, loud(shape, "cpu"), config, causal_mask(shape)))
    (out, selection, *_), (other, others, *_) = results
    assert torch.equal(out, other) and all(torch.equal(a, b) for a, b in zip(selection[1:], others[1:], strict=True))


def test_a_groups_choice_is_one_for_each_kv_head():
    config = dataclasses.replace(HEADS, gqa_choice="group")
    _, selection = attend_and_select(*loud(SHAPES[0], "cpu"), site_of(SHAPES[0], "cpu", config))
    assert selection.chosen.shape[:2] == (2, 2) and selection.rows.shape[3] == 3 * config.segment_size


def test_the_record_is_the_mean_of_the_heads():
    """Kept pairs, allowed pairs, active share and the cost of scores, against a record of every head alone."""
    shape = SHAPES[0]
    given, found = [x.detach() for x in loud(shape, "cpu")], []
    attend_tokens(*given, dataclasses.replace(site_of(shape, "cpu", NARROW), write=found.append, exact=True))
    for h in range(shape.heads):
        own = (given[0][:, h : h + 1], *(x[:, h // shape.group, None] for x in given[1:]))
        alone = dataclasses.replace(NARROW, gqa_choice="group")
        site = site_of(shape._replace(kv_heads=1, group=1), "cpu", alone)
        attend_tokens(*own, dataclasses.replace(site, write=found.append, exact=True))
    whole, *heads = found
    for name in ("kept_blocks", "allowed_blocks", "active_share", "selection_blocks"):
        at = STATS.index(name)
        mean = sum(x.stats[at] for x in heads) / len(heads)
        torch.testing.assert_close(whole.stats[at], mean, msg=name)
    assert torch.equal(whole.block_map, torch.cat([x.block_map for x in heads]))
    torch.testing.assert_close(whole.recalls, torch.cat([x.recalls for x in heads], 1))


def test_a_model_with_all_keys_is_dense(device):
    """Logits and gradients, through the graph."""
    inputs = batch((600, 411), device)
    model = build("llama", device).train()
    exact = gradients(copy.deepcopy(model).double(), inputs, enabled=False)
    dense = gradients(model, inputs, enabled=False)
    apply_omnisparse(model, EVERYTHING, min_seq_len=0, inner="aot_eager")
    with torch.no_grad(), collect_stats(model) as stats:
        model(**inputs)
    assert [layer.budget > 0 for layer in stats.per_layer()] == [True, True], "keys were gathered"
    for key, grad in gradients(model, inputs, enabled=False).items():
        assert (grad.double() - exact[key]).abs().max() <= bracket(exact[key], dense[key]), key


def test_a_compiled_model_does_what_an_eager_one_does(device):
    """Narrow scores, too: logits, what is recorded, and training with and without checkpoints."""
    inputs = batch((700, 500), device)
    found = {}
    for inner in ("eager", "aot_eager"):
        model = apply_omnisparse(build("llama", device, head_dim=32), SPARSE, min_seq_len=0, inner=inner)
        with torch.no_grad(), collect_stats(model, exact=True, maps=True) as stats:
            logits = model(**inputs).logits[inputs["attention_mask"].bool()]
        found[inner] = (logits, stats.raw, stats.maps, stats.recalls)
        assert len(rewrite_report(model).rewritten) == 2
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other)
    for layer in stats.per_layer():
        assert 0 < layer.density < 1 and layer.budget > 0 and len(layer.true_recall) == 4
        maps = stats.block_maps(layer.layer)
        assert maps[:4].flatten(1).any(1).all() and not maps[4:].any(), "a picture for each query head"
    model.train()
    plain = gradients(model, inputs, enabled=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert worst(gradients(model, inputs, enabled=False), plain) < 1e-4


def test_a_model_answers_with_a_slim_cache(device):
    inputs = batch((400,), device)
    visual = lambda args, kwargs: kwargs["input_ids"] > 0  # noqa: E731
    model = apply_omnisparse(build("llama", device), EVERYTHING, min_seq_len=0, inner="eager", visual_mask=visual)
    wanted = build("llama", device).generate(**inputs, max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        for cache in (None, OmniSparseCache(model, visual_recall=1.0)):
            got = model.generate(**inputs, max_new_tokens=3, do_sample=False, **cached(cache))
            assert torch.equal(got, wanted)
