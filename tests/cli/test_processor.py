"""A video as the model's own processor gives it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from omnisparse_flex import ConfigError
from omnisparse_flex.cli import check, processor, video
from omnisparse_flex.cli.loading import auto_class
from tests.helpers.tiny import build

WORDS = ["w0", "Describe", "the", "video.", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %} {{ c['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


class StandIn:
    """What a processor does with a clip, and what it was asked."""

    chat_template = "a template"

    def apply_chat_template(self, talk, **options):
        self.talk = talk
        return "text"

    def __call__(self, **asked):
        self.asked = asked
        return {"input_ids": torch.tensor([[1, 2]]), "pixel_values_videos": torch.ones(4, 3), "video_metadata": ["x"]}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    model = build("qwen3_vl")
    model.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen3VLProcessor"}))
    return tmp_path


def ask(model_dir: Path, prompt: str | None = None) -> dict[str, torch.Tensor]:
    question = check.Question(video.demo_clip(), prompt, max_frames=4)
    return check.build_inputs(model_dir, auto_class(model_dir)[1], question, lambda text: None)


def test_the_processor_gets_frames_and_times(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    stand_in = StandIn()
    monkeypatch.setattr(processor, "_processor_of", lambda model_dir: stand_in)
    given = ask(model_dir, "what happens?")
    assert set(given) == {"input_ids", "pixel_values_videos"}
    assert stand_in.talk[0]["content"][1]["text"] == "what happens?"
    assert stand_in.asked["videos"][0].shape == (4, 3, 720, 1280) and stand_in.asked["do_sample_frames"] is False
    (metadata,) = stand_in.asked["video_metadata"]
    assert metadata["frames_indices"] == [0, 1, 2, 3] and 3 < metadata["duration"] < 8  # 5.28 s of film
    monkeypatch.setattr(StandIn, "__call__", lambda self, **asked: 1 / 0)
    with pytest.raises(ConfigError, match="takes a video, got ZeroDivisionError"):
        ask(model_dir)
    monkeypatch.setattr(StandIn, "chat_template", None)
    with pytest.raises(ConfigError, match="model_dir must have a processor with a chat template"):
        ask(model_dir)


def test_a_processor_that_is_not_there(model_dir: Path) -> None:
    pytest.importorskip("av")
    with pytest.raises(ConfigError, match=r"model_dir must be loadable|must be installed"):
        ask(model_dir)
    (model_dir / "processor_config.json").unlink()
    with pytest.raises(ConfigError, match="unless model_dir holds the model's own processor"):
        ask(model_dir)


def test_qwen3_vl_reads_the_clip(model_dir: Path) -> None:
    """The real one: a text with its second before each pair of frames."""
    pytest.importorskip("av")
    pytest.importorskip("torchvision")
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=WORDS[4:])
    sizes = {"size": {"shortest_edge": 4096, "longest_edge": 64 * 64 * 4}}
    transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(**sizes),
        chat_template=TEMPLATE,
    ).save_pretrained(model_dir)
    given = ask(model_dir)
    frames, height, width = given["video_grid_thw"][0].tolist()
    assert (
        frames == 2 and int((given["input_ids"] == WORDS.index("<|video_pad|>")).sum()) == frames * height * width // 4
    )
    assert int((given["input_ids"] == WORDS.index("<|vision_start|>")).sum()) == 2
