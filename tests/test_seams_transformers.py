"""What this library assumes of the inside of transformers: one quick test for each; torch's are in ``test_seams``."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

from omnisparse_flex import OmniSparseCache
from omnisparse_flex.model import hf as integration
from omnisparse_flex.model import visual_mask
from omnisparse_flex.model.cache_argument import NEW_NAME, OLD_NAME, as_cache_argument, cache_name
from omnisparse_flex.model.switches import expected_call
from tests.helpers.assumption import seam
from tests.helpers.tiny import IMAGE, VIDEO, build

transformers = pytest.importorskip("transformers")

IDS = torch.arange(10, 26)[None]
PADDED = torch.ones_like(IDS).index_fill(1, torch.arange(3), 0)
#: What ``OmniSparseCache`` inherits of ``Cache``, as its layers are plain and nobody else's: of recurrent and
#: convolutional states, offloading by transformers, capacities and allocation ahead of time.
INHERITED = {
    "early_initialization", "get_conv_state", "get_recurrent_state", "has_previous_state", "is_recording_past",
    "max_batch_size", "max_cache_len", "offload", "prefetch", "update_conv_state", "update_indexer",
    "update_recurrent_state",
}  # fmt: skip


class Spy:
    """An attention and a mask function that keep what they are given, by the names of ours."""

    def __init__(self) -> None:
        self.attention, self.masks, self.made = [], [], []

    def attend(self, *args, **kwargs):
        self.attention.append(inspect.signature(integration.attention_forward).bind(*args, **kwargs).arguments)
        with expected_call():  # by its name alone, ours warns
            return integration.attention_forward(*args, **{**kwargs, "cache": None})

    def mask(self, *args, **kwargs):
        self.masks.append(inspect.signature(integration.mask_forward).bind(*args, **kwargs).arguments)
        self.made.append(integration.mask_forward(*args, **kwargs))
        return self.made[-1]


@pytest.fixture
def spy() -> Spy:
    from transformers.masking_utils import AttentionMaskInterface

    made = Spy()
    transformers.AttentionInterface.register("seam_spy", made.attend)
    AttentionMaskInterface.register("seam_spy", made.mask)
    return made


def spied(model):
    for config in integration.attention_configs(model):
        config._attn_implementation_internal = "seam_spy"
    return model


@torch.no_grad()
def test_attention_is_chosen_by_name_at_each_call(spy: Spy) -> None:
    what = "attention and mask functions are looked up at each call, by config._attn_implementation_internal"
    with seam(what, "_attn_implementation_internal"):
        model = build("llama")
        dense = model(IDS).logits
        assert not spy.attention
        torch.testing.assert_close(spied(model)(IDS).logits, dense)
        assert len(spy.attention) == 2 and spy.masks


@torch.no_grad()
def test_an_attention_function_is_told_what_ours_reads(spy: Spy) -> None:
    what = "an attention function gets (module, q, k, v, mask, scaling=, dropout=) and the decoder's other arguments"
    with seam(what, "def attention_forward", "layer_idx"):
        model = spied(build("llama"))
        model.model(input_ids=IDS, attention_mask=PADDED, omnisparse_cache=None, seam_probe="told")
        for layer, told in enumerate(spy.attention):
            assert told["module"].layer_idx == layer and told["scaling"] == 16**-0.5 and told["dropout"] == 0.0
            assert told["query"].shape == (1, 4, 16, 16) and told["key"].shape == (1, 2, 16, 16)
            assert told["attention_mask"] is spy.made[0], "what the mask function returns"
            assert told["kwargs"]["seam_probe"] == "told"


@torch.no_grad()
def test_a_mask_function_is_told_what_ours_reads(spy: Spy) -> None:
    what = "a mask function gets sizes, offsets, the padding and, for plain causality, causal_mask_function itself"
    with seam(what, "mask_function is causal_mask_function"):
        from transformers.masking_utils import causal_mask_function

        model = spied(build("llama"))
        model.model(input_ids=IDS, attention_mask=PADDED)
        told = spy.masks[0]
        assert told["mask_function"] is causal_mask_function and tuple(told["attention_mask"].shape) == (1, 16)
        assert (told["q_length"], told["kv_length"], told["q_offset"], told.get("kv_offset", 0)) == (16, 16, 0, 0)
        assert not told.get("use_vmap")
        assert spy.made[0].dim() == 2, "two-dimensional masks of ours reach attention"


def test_a_mask_can_be_asked_for_in_full() -> None:
    with seam("sdpa_mask returns bool (B, 1, L, S) if it may skip nothing", "allow_is_bidirectional_skip=False"):
        full = integration.mask_forward(1, 4, 6, 2, mask_function=lambda b, h, q, kv: kv <= q, device="cpu")
        assert full.dtype == torch.bool and full.shape == (1, 1, 4, 6)
        assert torch.equal(full[0, 0], torch.ones(4, 6, dtype=torch.bool).tril(2))


def test_sinks_and_soft_caps_have_the_names_that_we_read() -> None:
    with seam("logit sinks are passed as s_aux", "s_aux"):
        assert "s_aux=" in inspect.getsource(importlib.import_module("transformers.models.gpt_oss.modeling_gpt_oss"))
    with seam("soft caps are passed as softcap", "softcap: float | None"):
        assert "softcap=" in inspect.getsource(importlib.import_module("transformers.models.gemma2.modeling_gemma2"))


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl", "llava_onevision", "gpt_oss"])
def test_the_decoder_is_found_and_can_be_changed(name: str) -> None:
    with seam("get_decoder() leads to the text model, whose attention can be set", "_can_set_attn_implementation"):
        model = build(name)
        decoder = integration.find_decoder(model)
        assert integration.layer_count(decoder) == 2 and integration.attention_configs(decoder)
        assert not [part for part, _ in decoder.named_modules() if "vis" in part.split(".")[0]]
        assert hasattr(decoder.config, "use_cache") and decoder.config.hidden_size == 64


def test_configs_name_their_visual_tokens_as_we_read_them() -> None:
    with seam("a video model's config has image_token_id and video_token_id (or ..._index)", "VISUAL_TOKEN_FIELDS"):
        for name in ("qwen2_5_vl", "llava_onevision"):
            config = build(name).config
            found = {getattr(config, field, None) for field in visual_mask.VISUAL_TOKEN_FIELDS}
            assert {IMAGE, VIDEO} <= found


@torch.no_grad()
def test_the_model_passes_tokens_and_cache_by_name() -> None:
    what = "the module around the decoder gets input_ids, and hands the decoder its embeddings and its cache by name"
    with seam(what, 'named.get("input_ids")', "cache_in("):
        model = build("qwen2_5_vl")
        decoder, told = integration.find_decoder(model), {}
        receiver = visual_mask.receiver_of(model, decoder)
        for module in (receiver, decoder):
            module.register_forward_pre_hook(lambda m, args, kwargs: told.update({m: (args, kwargs)}), with_kwargs=True)
        cache = transformers.DynamicCache(config=decoder.config)
        model(input_ids=IDS, **as_cache_argument(model.forward, cache))
        args, kwargs = told[receiver]
        assert inspect.signature(receiver.forward).bind_partial(*args, **kwargs).arguments["input_ids"] is IDS
        assert told[decoder][1]["inputs_embeds"].shape == (1, 16, 64)
        assert told[decoder][1][cache_name(decoder.forward)] is cache


def test_a_forward_names_its_cache_in_one_of_two_ways() -> None:
    with seam("a decoder's forward has a parameter cache (since 5.24) or past_key_values", "def cache_name"):
        for name in ("llama", "qwen2_5_vl"):
            parameters = inspect.signature(integration.find_decoder(build(name)).forward).parameters
            assert {NEW_NAME, OLD_NAME} & set(parameters)


def test_a_cache_has_no_method_that_ours_does_not_know() -> None:
    with seam("transformers asks nothing of a cache that OmniSparseCache leaves to Cache", "class OmniSparseCache"):
        public = {name for name in dir(transformers.Cache) if not name.startswith("__")}
        assert public - set(dir(OmniSparseCache)) <= INHERITED


def test_generate_marks_a_cache_of_the_users() -> None:
    with seam("generate sets cache._is_user_defined when it begins", "_is_user_defined"):
        model = build("llama")
        cache = transformers.DynamicCache(config=model.config)
        model.generate(IDS, max_new_tokens=1, do_sample=False, **as_cache_argument(model.forward, cache))
        assert cache._is_user_defined is True


def test_gradient_checkpointing_is_an_attribute_of_the_decoder() -> None:
    with seam("a decoder that checkpoints says so in .gradient_checkpointing", '"gradient_checkpointing"'):
        model = build("llama")
        assert model.get_decoder().gradient_checkpointing is False
        model.gradient_checkpointing_enable()
        assert model.get_decoder().gradient_checkpointing is True


def test_a_twin_without_storage_is_made_from_the_config() -> None:
    with seam(
        "type(decoder)(decoder.config) builds a decoder, on the meta device too", "type(decoder)(decoder.config)"
    ):
        decoder = build("llama").model
        with torch.device("meta"):
            twin = type(decoder)(decoder.config)
        assert {name for name, _ in twin.named_parameters()} == {name for name, _ in decoder.named_parameters()}


def test_auto_classes_know_their_configs() -> None:
    with seam("an auto class tells by _model_mapping which configs it takes", "_model_mapping"):
        llama, video = (type(build(name).config) for name in ("llama", "qwen2_5_vl"))
        assert llama in transformers.AutoModelForCausalLM._model_mapping
        assert video in transformers.AutoModelForImageTextToText._model_mapping
        assert llama not in transformers.AutoModelForImageTextToText._model_mapping
