"""The configuration: what it takes, what it refuses and in which words, and that it stays what it was."""

import copy
import dataclasses
import json
import math
import pickle
import re

import pytest
from hypothesis import given

from omnisparse_flex.config import OmniSparseConfig
from omnisparse_flex.config_checks import OF_COUNTS, OF_PEAKS
from omnisparse_flex.errors import ConfigError
from omnisparse_flex.testing import configs

FIELDS = [field.name for field in dataclasses.fields(OmniSparseConfig)]

VALID = [
    {},
    {"target_recall": 1.0},
    {"target_recall": 1},
    {"target_recall": 1e-6},
    {"target_recall": (0.5, 1.0, 0.9)},
    {"budget": "per_head"},
    {"budget": "peak"},
    {"budget": "peak", "min_peak": 0, "scoring": "sampled_rows", "key_block": 64},
    {"budget": "peak", "min_peak": (0.02, 0.0, 0.5)},
    {"min_peak": 0.2, "scoring": "sampled_rows"},
    {"budget": 0},
    {"budget": 256, "max_kv_budget": 256},
    {"max_kv_budget": 0},
    {"lazy_threshold": None},
    {"lazy_threshold": 0},
    {"lazy_threshold": 1.0},
    {"sink_size": 0},
    {"window_size": 1},
    {"granularity": "token", "scoring": "one_pass", "scoring_dims": 16},
    {"granularity": "token", "gqa_choice": "head", "budget": 64},
]

INVALID = [
    ({"target_recall": 0.0}, "target_recall must be in (0, 1], got 0.0"),
    ({"target_recall": 1.5}, "target_recall must be in (0, 1], got 1.5"),
    ({"target_recall": -0.1}, "target_recall must be in (0, 1], got -0.1"),
    ({"target_recall": math.nan}, "target_recall must be in (0, 1], got nan"),
    ({"target_recall": math.inf}, "target_recall must be in (0, 1], got inf"),
    ({"target_recall": True}, "target_recall must be in (0, 1], got True"),
    ({"target_recall": None}, "target_recall must be in (0, 1], got None"),
    ({"target_recall": "0.9"}, "target_recall must be in (0, 1], got '0.9'"),
    ({"target_recall": [0.9, 2]}, "target_recall must be in (0, 1], got (0.9, 2)"),
    ({"target_recall": ()}, "target_recall must hold one value per layer, got ()"),
    ({"granularity": "row"}, "granularity must be one of block, token, got 'row'"),
    ({"scoring": "oracle"}, "scoring must be one of auto, mean_pool, tile_pool, sampled_rows, got 'oracle'"),
    (
        {"granularity": "token", "scoring": "mean_pool"},
        "scoring must be one of auto, one_pass, got 'mean_pool'",
    ),
    ({"segment_size": 100}, "segment_size must be an int of at least 128, got 100"),
    ({"segment_size": 200}, "segment_size must be a multiple of 128, got 200"),
    ({"granularity": "token", "scoring_dims": 8}, "scoring_dims must be an int of at least 16, got 8"),
    ({"granularity": "token", "scoring_dims": 48}, "scoring_dims must be a power of 2, got 48"),
    ({"scoring_dims": 32}, 'scoring_dims must be None without scoring="one_pass", got 32'),
    ({"gqa_choice": "member"}, "gqa_choice must be one of group, head, got 'member'"),
    (
        {"gqa_choice": "head"},
        "gqa_choice must be \"group\" at block granularity, where each query head always chooses, got 'head'",
    ),
    (
        {"granularity": "token", "gqa_choice": "head", "budget": "flattest_head"},
        'gqa_choice must be "group" for the flattest head\'s budget, which needs all members of a group at once, '
        "got 'head'",
    ),
    ({"budget": "roundest_head"}, "budget must be one of flattest_head, per_head, peak, got 'roundest_head'"),
    *(
        ({"budget": "peak", "min_peak": value}, f"min_peak must be in [0, 1), got {value!r}")
        for value in (1, 1.0, 1.5, -0.1, math.nan, math.inf, True, None, "0.1", (0.1, 1.0))
    ),
    ({"budget": "peak", "min_peak": ()}, "min_peak must hold one value per layer, got ()"),
    *(
        (
            {"min_peak": 0.2, **fields},
            'min_peak must be left at 0.1 without budget="peak", which alone reads it, got 0.2',
        )
        for fields in (
            {"budget": "per_head"},
            {"granularity": "token"},
            {"max_kv_budget": 64},
            {"scoring": "mean_pool"},
        )
    ),
    (
        {"scoring": "sampled_rows", "budget": "per_head"},
        'budget must be "peak" for scoring="sampled_rows", got \'per_head\'',
    ),
    (
        {"scoring": "sampled_rows", "max_kv_budget": 64},
        'budget must be "peak" for scoring="sampled_rows", got \'per_head\'',
    ),
    *(
        (
            {"budget": "peak", "lazy_threshold": value},
            'lazy_threshold must be left out for budget="peak", where a query block whose rows peak nowhere fetches '
            f"nothing, got {value}",
        )
        for value in (None, 0.05)
    ),
    (
        {"budget": "peak", "scoring": "mean_pool"},
        'scoring must be "sampled_rows" for budget="peak", got \'mean_pool\'',
    ),
    (
        {"budget": "peak", "granularity": "token"},
        "budget must be per_head, flattest_head or an int at token granularity, got 'peak'",
    ),
    ({"budget": "peak", "max_kv_budget": 256}, 'max_kv_budget must be None for budget="peak", got 256'),
    ({"budget": -1}, "budget must be an int of at least 0, got -1"),
    ({"budget": 1.5}, "budget must be an int of at least 0, got 1.5"),
    ({"budget": True}, "budget must be an int of at least 0, got True"),
    ({"budget": 512, "max_kv_budget": 256}, "budget must be at most max_kv_budget=256, got 512"),
    ({"max_kv_budget": -1}, "max_kv_budget must be an int of at least 0, got -1"),
    ({"max_kv_budget": 128.0}, "max_kv_budget must be an int of at least 0, got 128.0"),
    ({"lazy_threshold": 1.01}, 'lazy_threshold must be "auto", None or in [0, 1], got 1.01'),
    ({"lazy_threshold": "low"}, "lazy_threshold must be \"auto\", None or in [0, 1], got 'low'"),
    ({"sink_size": -1}, "sink_size must be an int of at least 0, got -1"),
    ({"sink_size": None}, "sink_size must be an int of at least 0, got None"),
    ({"window_size": 0}, "window_size must be an int of at least 1, got 0"),
]


@pytest.mark.parametrize("fields", VALID, ids=str)
def test_valid(fields):
    config = OmniSparseConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize(("fields", "message"), INVALID, ids=[str(fields) for fields, _ in INVALID])
def test_invalid(fields, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        OmniSparseConfig(**fields)


@given(configs())
def test_json_round_trip(config):
    assert OmniSparseConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_json_round_trip_of_layer_targets():
    config = OmniSparseConfig(target_recall=[0.5, 1.0])
    assert config.target_recall == (0.5, 1.0)
    assert OmniSparseConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_refuses_what_it_does_not_know():
    message = f"config must hold only the fields {sorted(FIELDS)}, got ['targt_recall']"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        OmniSparseConfig.from_dict({"targt_recall": 0.9})
    with pytest.raises(ConfigError, match=r"^config must be a mapping of field names to values, got 0\.9$"):
        OmniSparseConfig.from_dict(0.9)


#: What was removed: the fields, and the message, from the constructor and from saved rules.
REMOVED = [
    (
        {"share_layers": 2},
        "share_layers must be left out, as version 0.2 removed it (every layer chooses its own blocks), got 2",
    ),
    (
        {"lazy_mode": "skip"},
        "lazy_mode must be left out, as version 0.2 removed it (lazy queries attend sinks, window and text), "
        "got 'skip'",
    ),
    *(
        (
            {"scoring": scoring},
            f'scoring must be "{other}" in its place, as version 0.2 removed this estimator, got {scoring!r}',
        )
        for scoring, other in (("probe", "sampled_rows"), ("antidiagonal", "tile_pool"), ("column_mass", "one_pass"))
    ),
]


@pytest.mark.parametrize(("fields", "message"), REMOVED, ids=[str(fields) for fields, _ in REMOVED])
def test_what_was_removed_names_its_successor(fields, message):
    for build in (OmniSparseConfig.from_dict, lambda given: OmniSparseConfig(**given)):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            build(fields)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        dataclasses.replace(OmniSparseConfig(), **fields)


def test_unknown_fields_are_no_removed_ones():
    with pytest.raises(TypeError, match="unexpected keyword argument 'targt_recall'"):
        OmniSparseConfig(targt_recall=0.9)


def test_rules_of_an_earlier_version_are_read():
    saved = {"target_recall": 0.7, "sink_size": 32, "share_layers": 1, "lazy_mode": "local"}  # 0.1 wrote no schema
    assert OmniSparseConfig.from_dict(saved) == OmniSparseConfig(target_recall=0.7, sink_size=32, budget="per_head")
    assert saved["share_layers"] == 1  # the caller's dict is left as it was
    assert OmniSparseConfig().to_dict()["schema"] == 3
    with pytest.raises(ConfigError, match="share_layers must be left out"):
        OmniSparseConfig.from_dict({"schema": 2, "share_layers": 1})


@pytest.mark.parametrize("schema", [0, 4, "2", None, True, 1.0])
def test_rules_of_an_unknown_schema_are_refused(schema):
    with pytest.raises(ConfigError, match=r"^schema must be an int from 1 to 3 .* got"):
        OmniSparseConfig.from_dict({"schema": schema})


#: Today's name of what was the default until schema 3.
FORMER = {"target_recall": 0.98, "key_block": 128, "budget": "per_head", "window_size": 256}


@pytest.mark.parametrize("schema", [None, 1, 2])
def test_rules_saved_before_peaks_were_the_default_keep_their_meaning(schema):
    """What a field left out meant then, whether some fields were saved or all."""
    number = {} if schema is None else {"schema": schema}
    assert OmniSparseConfig.from_dict(number) == OmniSparseConfig(**FORMER)
    some = {"target_recall": 0.9, "window_size": 1, "last_rows": 128, "budget": "per_head"}  # the video model's
    read = OmniSparseConfig.from_dict({**number, **some})
    assert (read.key_block, read.scorer, read.lazy_below) == (128, "mean_pool", 0.05)
    tokens = OmniSparseConfig.from_dict({**number, "granularity": "token"})
    assert (tokens.budget, tokens.target_recall, tokens.window_size) == ("per_head", 0.98, 256)
    fixed = OmniSparseConfig.from_dict({**number, "budget": 512})
    assert (fixed.budget, fixed.window_size, fixed.key_block) == (512, 256, 128)
    peak = OmniSparseConfig.from_dict({**number, "budget": "peak", "lazy_threshold": None})
    assert (peak.target_recall, peak.key_block, peak.window_size) == (0.98, 128, 256)


def test_what_a_saved_default_says_is_complete():
    """Every field has a value: a later default changes nothing about it."""
    saved = OmniSparseConfig().to_dict()
    assert {name: saved[name] for name in ("budget", *OF_PEAKS)} == {"budget": "peak", **OF_PEAKS}
    assert OmniSparseConfig.from_dict(saved) == OmniSparseConfig()


COUNTING = [
    {"granularity": "token"}, {"scoring": "mean_pool"}, {"scoring": "tile_pool"}, {"max_kv_budget": 64},
    {"lazy_threshold": None}, {"lazy_threshold": 0.05}, {"budget": "flattest_head"}, {"budget": 64},
]  # fmt: skip


@pytest.mark.parametrize("fields", COUNTING, ids=str)
def test_rules_that_count_have_the_defaults_of_counting(fields):
    config = OmniSparseConfig(**fields)
    assert config.budget == fields.get("budget", "per_head")
    assert {name: getattr(config, name) for name in OF_COUNTS} == OF_COUNTS
    told = dataclasses.replace(config, target_recall=0.5, window_size=1)
    assert (told.target_recall, told.window_size, told.budget) == (0.5, 1, config.budget)


@pytest.mark.parametrize("fields", [{}, {"target_recall": 0.9}, {"sink_size": 0}, {"budget": "peak"}], ids=str)
def test_blocks_are_chosen_by_peaks_unless_told(fields):
    config = OmniSparseConfig(**fields)
    assert (config.budget, config.scorer, config.granularity) == ("peak", "sampled_rows", "block")
    expected = {name: fields.get(name, value) for name, value in OF_PEAKS.items()}
    assert {name: getattr(config, name) for name in OF_PEAKS} == expected


def test_a_config_is_copied_and_pickled():
    config = OmniSparseConfig(target_recall=(0.5, 0.6), budget=64)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config and hash(other) == hash(config)


def test_frozen_hashable_and_slotted():
    config = OmniSparseConfig(target_recall=[0.5, 0.6])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.target_recall = 0.9
    assert hash(config) == hash(OmniSparseConfig(target_recall=(0.5, 0.6)))  # Dynamo guards on it
    assert not hasattr(config, "__dict__")


def test_recall_of_layers():
    shared, listed = OmniSparseConfig(target_recall=0.7), OmniSparseConfig(target_recall=(0.5, 0.6))
    assert [shared.recall_of(layer) for layer in (0, 27)] == [0.7, 0.7]
    assert [listed.recall_of(layer) for layer in (0, 1)] == [0.5, 0.6]
    shared.check_layers(28)
    listed.check_layers(2)
    message = "target_recall must hold one value for each of the 3 layers, got (0.5, 0.6)"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        listed.check_layers(3)


def test_a_head_has_as_many_coordinates_as_scores_read():
    config = OmniSparseConfig(granularity="token", scoring_dims=32)
    config.check_head_dim(32)
    with pytest.raises(ConfigError, match=r"^scoring_dims must be at most the head_dim 24, got 32$"):
        config.check_head_dim(24)
    OmniSparseConfig().check_head_dim(8)


def test_one_listed_target_is_still_a_list_of_one_layer():
    message = "target_recall must hold one value for each of the 2 layers, got (0.5,)"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        OmniSparseConfig(target_recall=(0.5,)).check_layers(2)


def test_query_selection_by_default_is_that_of_blocks():
    assert OmniSparseConfig(budget="per_head").lazy_below == 0.05
    assert OmniSparseConfig(granularity="token").lazy_below is None
    assert OmniSparseConfig().lazy_below is None  # peaks say who is lazy
    for threshold in (None, 0, 0.4):
        for granularity in ("block", "token"):
            assert OmniSparseConfig(granularity=granularity, lazy_threshold=threshold).lazy_below == threshold


def test_paper():
    paper = OmniSparseConfig.paper()
    rules = (paper.target_recall, paper.budget, paper.lazy_threshold, paper.max_kv_budget)
    assert rules == (0.95, "flattest_head", 0.05, None)
    assert (paper.granularity, paper.window_size, paper.key_block) == ("token", 256, 128)


def test_a_config_error_is_a_value_error():
    with pytest.raises(ValueError, match="window_size"):
        OmniSparseConfig(window_size=0)


def test_min_peak_holds_one_value_for_each_layer_of_the_model():
    config = OmniSparseConfig(budget="peak", min_peak=[0.02, 0.0, 0.5])
    assert [config.min_peak_of(layer) for layer in range(3)] == [0.02, 0.0, 0.5]
    assert [config.is_dense(layer) for layer in range(3)] == [False, True, False]
    assert OmniSparseConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="min_peak must hold one value for each of the 4 layers"):
        config.check_layers(4)
