"""What ``omnisparse_flex.grid`` assumes of the inside of transformers: one quick test for each."""

from __future__ import annotations

import pytest
import torch

from omnisparse_flex.grid.guidance import split_guidance
from omnisparse_flex.grid.slots import static_length
from omnisparse_flex.model.cache_argument import NEW_NAME, OLD_NAME
from tests.helpers.assumption import seam
from tests.helpers.grids import EOF, EOI, EOL, build, cached, emu3_images, prompts

transformers = pytest.importorskip("transformers")


def test_a_callable_gets_what_generate_prepared() -> None:
    what = "generate calls custom_generate(model, ids, logits_processor=, stopping_criteria=, generation_config=, ...)"
    model, _ = build("llama", dtype=torch.float32)
    seen = {}

    def custom(model, ids, logits_processor, stopping_criteria, generation_config, image_sizes=None, **kwargs):
        seen.update(kwargs, ids=ids, sizes=image_sizes, processors=logits_processor, config=generation_config)
        return ids

    with seam(what, "generation_config", "custom_generate"):
        given = {"custom_generate": custom, "max_new_tokens": 4, "pad_token_id": 3, "image_sizes": [[2, 3]]}
        ids = model.generate(**prompts(), **given, guidance_scale=2.0, top_k=3, do_sample=True)
        assert ids.shape == (2, 5) and seen["sizes"] == [[2, 3]] and seen["config"].max_new_tokens == 4
        cache = seen.get(NEW_NAME, seen.get(OLD_NAME))
        assert isinstance(cache, transformers.DynamicCache) and cache.get_seq_length() == 0
        guidance, others = split_guidance(seen["processors"])
        assert guidance.scale == 2.0 and guidance.ids is None and len(others) == 1


def test_guidance_keeps_its_prompt_where_we_read_it() -> None:
    what = "guidance's processor has guidance_scale and unconditional_context with input_ids and attention_mask"
    with seam(what, "unconditional_context"):
        ids, mask = torch.ones(1, 4, dtype=torch.int64), torch.tensor([[0, 1, 1, 1]])
        processor = transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor(3.0, None, ids, mask)
        guidance, others = split_guidance([processor])
        assert guidance.scale == 3.0 and guidance.ids is ids and guidance.mask is mask and others == []


@torch.no_grad()
def test_caches_append_in_order_of_arrival() -> None:
    what = "a StaticCache appends whatever the positions are, shows all of its slots, and says how many"
    with seam(what, "max_cache_len"):
        model, _ = build("llama", dtype=torch.float32)
        cache = transformers.StaticCache(config=model.config, max_cache_len=9)
        assert static_length(cache) == 9 and static_length(transformers.DynamicCache()) is None
        for ids, positions in (
            (torch.tensor([[5, 6]]), [0, 1]),
            (torch.tensor([[7]]), [8]),
            (torch.tensor([[8]]), [4]),
        ):
            mask = torch.ones(1, 1, ids.shape[1], 9, dtype=torch.bool)
            model(ids, attention_mask=mask, position_ids=torch.tensor([positions]), **cached(cache))
        filled = cache.layers[0].keys.abs().sum((0, 1, 3)) > 0
        assert filled.tolist() == [True] * 4 + [False] * 5 and int(cache.get_seq_length()) == 4


def test_a_config_says_its_mode_and_its_attention() -> None:
    what = "GenerationConfig.get_generation_mode() and config._attn_implementation give names that we know"
    with seam(what, "_attn_implementation"):
        mode = transformers.GenerationConfig(num_beams=2).get_generation_mode(None)
        assert mode.value == "beam_search"
        assert build("llama", "eager")[0].config.get_text_config(decoder=True)._attn_implementation == "eager"


def test_emu3_names_its_structure_tokens_and_drops_three() -> None:
    what = "Emu3's vocabulary_mapping.vocab_map names the ends of rows and of images"
    with seam(what, "vocab_map", "extra_200"):
        model = emu3_images().eval()
        names = model.vocabulary_mapping.vocab_map
        assert (names["<|extra_200|>"], names["<|extra_201|>"], names["<|image end|>"]) == (EOL, EOF, EOI)
        assert model.vocabulary_mapping.eol_token_id == EOL
        image = torch.cat([torch.tensor([[5, 6, EOL, 7, 8, EOL]]), torch.tensor([[EOF, EOI, 2]])], dim=1)
        assert model.decode_image_tokens(image_tokens=image, height=2, width=2).shape[-2:] == (4, 4)
