"""The description of a run: depths, recipes, learning rates, and the JSON in checkpoints."""

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest
from programs import run_code

from cifar10_resnet.config import (
    CIFAR10_NAMES,
    RECIPES,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    refuse_contradictions,
    training_config,
    units_per_block,
)
from cifar10_resnet.errors import UserError
from cifar10_resnet.options import Options
from cifar10_resnet.training.optimizers import learning_rates

# A run in which no field has its default.
UNUSUAL = RunConfig(
    ModelConfig(
        num_layers=164,
        shortcut_connections=False,
        bottleneck=True,
        resnet_version=1,
        num_classes=3,
        batch_norm_decay=0.9,
        batch_norm_epsilon=1e-5,
    ),
    DataConfig(
        dataset="pictures",
        class_names=("Kätzchen", 'a "dog"', "鳥"),
        holdout=5000,
        coarse_labels=True,
    ),
    TrainingConfig(
        recipe="one_cycle",
        num_iterations=1234,
        batch_size=7,
        optimizer="muon",
        init_lr=1 / 3,
        scale_lr=True,
        momentum=0.0,
        nesterov=True,
        weight_decay=1e-300,
        label_smoothing=0.1,
        alternate_flips=True,
        cutout=5,
        mixup=0.25,
        average_weights=0.3,
        seed=2**40,
        pretrained="runs/birds/model-7",
        fine_tune=True,
        recompute_mean=True,
    ),
)


def test_descriptions_of_runs_do_not_wait_for_tensorflow():
    code = "import cifar10_resnet.config, sys; sys.exit('tensorflow' in sys.modules)"
    run_code(code)


# --- Depths ---------------------------------------------------------------------------------------


def refused_depth_neighbours(num_layers: int, bottleneck: bool) -> list[int]:
    """The depths that the refusal of this one names as the nearest."""
    with pytest.raises(UserError) as refusal:
        units_per_block(num_layers, bottleneck)
    sentence = str(refusal.value)
    assert sentence.startswith(f"num_layers={num_layers} is invalid: it must be ")
    assert ("9n + 2" if bottleneck else "6n + 2") in sentence
    return [int(depth) for depth in re.search(r"nearest are (\d+) and (\d+)", sentence).groups()]


@pytest.mark.parametrize(
    ("num_layers", "bottleneck", "units"),
    [
        *[(8, False, 1), (20, False, 3), (32, False, 5), (44, False, 7), (56, False, 9)],
        *[(110, False, 18), (1202, False, 200)],
        *[(11, True, 1), (29, True, 3), (56, True, 6), (110, True, 12), (164, True, 18)],
        (1001, True, 111),
    ],
)
def test_depths_of_the_papers_give_their_number_of_units(num_layers, bottleneck, units):
    assert units_per_block(num_layers, bottleneck) == units


@pytest.mark.parametrize(
    ("num_layers", "bottleneck", "neighbours"),
    [
        *[(21, False, [20, 26]), (18, False, [14, 20]), (34, False, [32, 38])],
        *[(30, True, [29, 38]), (163, True, [155, 164]), (1202, True, [1199, 1208])],
        # below the shallowest network there is nothing but deeper ones
        *[(2, False, [8, 14]), (0, False, [8, 14]), (-4, False, [8, 14])],
        *[(7, False, [8, 14]), (8, True, [11, 20]), (2, True, [11, 20]), (-7, True, [11, 20])],
    ],
)
def test_a_refused_depth_is_answered_with_the_nearest_ones(num_layers, bottleneck, neighbours):
    assert refused_depth_neighbours(num_layers, bottleneck) == neighbours


@pytest.mark.parametrize("bottleneck", [False, True])
def test_every_depth_is_either_built_or_refused_with_depths_that_are_built(bottleneck):
    per_unit = 9 if bottleneck else 6
    valid = {per_unit * n + 2: n for n in range(1, 60)}
    for num_layers in range(-20, 300):
        if num_layers in valid:
            assert units_per_block(num_layers, bottleneck) == valid[num_layers]
        else:
            below, above = refused_depth_neighbours(num_layers, bottleneck)
            assert {below, above} <= valid.keys()
            assert above - below == per_unit
            assert below < num_layers < above or num_layers < below == min(valid)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"num_layers": 21}, "num_layers=21"),
        ({"num_layers": 32, "bottleneck": True}, "num_layers=32"),
        ({"resnet_version": 3}, "resnet_version=3"),
        ({"resnet_version": 0}, "resnet_version=0"),
    ],
)
def test_networks_that_do_not_exist_cannot_be_described(given, named):
    with pytest.raises(UserError, match=f"^{re.escape(named)} "):
        ModelConfig(**given)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (ModelConfig(), "resnet20"),
        (ModelConfig(num_layers=1202), "resnet1202"),
        (ModelConfig(num_layers=56, shortcut_connections=False), "plain56"),
        (ModelConfig(num_layers=164, bottleneck=True), "resnet164-bottleneck"),
        (ModelConfig(resnet_version=1), "resnet20-v1"),
        (UNUSUAL.model, "plain164-bottleneck-v1"),
    ],
)
def test_names_of_networks(config, name):
    assert config.name == name


# --- Values that a setting can have ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: TrainingConfig(batch_size=0), "a whole number, 1 to 65,536"),
        (lambda: TrainingConfig(batch_size=1.5), "a whole number, 1 to 65,536"),
        (lambda: TrainingConfig(batch_size=True), "a whole number, 1 to 65,536"),
        (lambda: ModelConfig(num_layers=6_000_002), "a whole number, 1 to 2,000"),
        (lambda: ModelConfig(num_classes=257), "a whole number, 2 to 256"),
        (lambda: TrainingConfig(cutout=65), "a whole number, 0 to 64"),
        (lambda: TrainingConfig(seed=2**63), "a whole number, 0 or more"),
        (lambda: TrainingConfig(num_iterations=10_000_001), "a whole number, 1 to 10,000,000"),
        (lambda: TrainingConfig(momentum=float("nan")), "a number, 0 to 1"),
        (lambda: TrainingConfig(init_lr=float("inf")), "a number, 0 or more"),
        (lambda: TrainingConfig(optimizer="adam"), "momentum or muon"),
        (lambda: TrainingConfig(recipe=None), "paper, one_cycle, fast or best"),
        (lambda: Options(train_epochs=0), "a number, above 0"),
        (lambda: Options(profile_steps=(3, 2)), "a first and a last step, as in 100,110"),
        (lambda: Options(clean=1), "true or false"),
        (lambda: Options(loss_scale=0.5), "a number of 1 or more, or dynamic"),
        (lambda: Options(loss_scale="static"), "a number of 1 or more, or dynamic"),
        (lambda: Options(loss_scale=None), "a number of 1 or more, or dynamic"),
    ],
)
def test_a_value_that_a_setting_cannot_have_is_refused_with_those_that_it_can(make, wanted):
    with pytest.raises(UserError, match=f"is invalid: it must be {re.escape(wanted)}\\.$"):
        make()


def test_values_at_the_bounds_are_good():
    ModelConfig(num_layers=1_202, num_classes=256)
    TrainingConfig(batch_size=65_536, cutout=64)
    TrainingConfig(batch_size=1, momentum=1, label_smoothing=0, seed=2**63 - 1, init_lr=1e308)
    Options(profile_steps=(5, 5), stop_threshold=1, epochs_between_evals=1, num_gpus=None)
    assert [Options(loss_scale=scale).loss_scale for scale in (1, "dynamic")] == [1, "dynamic"]


# --- JSON -----------------------------------------------------------------------------------------


def edited(part: str, **fields: Any) -> str:
    """The JSON of an ordinary run with some fields of a part set to something else."""
    parts = json.loads(RunConfig().to_json())
    parts[part].update(fields)
    return json.dumps(parts)


def test_the_unusual_run_differs_from_the_ordinary_one_in_every_field():
    # or else the round trip would not show that a field survives
    for ordinary, unusual in zip(
        dataclasses.astuple(RunConfig()), dataclasses.astuple(UNUSUAL), strict=True
    ):
        assert all(a != b for a, b in zip(ordinary, unusual, strict=True))


@pytest.mark.parametrize(
    "run",
    [RunConfig(), UNUSUAL, RunConfig(training=TrainingConfig(init_lr=1e20))],
    ids=["ordinary", "unusual", "diverging"],
)
def test_a_run_survives_its_json(run):
    again = RunConfig.from_json(run.to_json())
    assert again == run
    assert hash(again) == hash(run)  # a list in place of a tuple would have none
    assert again.to_json() == run.to_json()


def test_fields_that_an_older_version_did_not_write_take_their_defaults():
    parts = json.loads(UNUSUAL.to_json())
    del parts["training"]["label_smoothing"], parts["model"]["batch_norm_epsilon"]
    again = RunConfig.from_json(json.dumps(parts))
    assert again.training == dataclasses.replace(UNUSUAL.training, label_smoothing=0.0)
    assert again.model == dataclasses.replace(UNUSUAL.model, batch_norm_epsilon=1e-3)


@pytest.mark.parametrize(
    "text",
    [
        *["", "{", "resnet20", "null", "5", "[]", '"model"', "{}", '{"model": {}}'],
        '{"model": {}, "data": [], "training": {}}',
        '{"model": {}, "data": {"class_names": null}, "training": {}}',
        edited("model", num_layers=None),
        edited("model", num_layers=21),
        edited("model", width=10),
        edited("training", warmup=5),
        edited("data", class_names=10),
        edited("data", class_names=["three", "class", "names"]),
        edited("model", num_classes=11),
        edited("data", dataset="of a later version"),
    ],
)
def test_garbage_in_place_of_a_run_is_a_one_line_error(text):
    with pytest.raises(UserError) as refusal:
        RunConfig.from_json(text)
    assert "\n" not in str(refusal.value)


# --- Learning rates -------------------------------------------------------------------------------


def test_the_papers_learning_rates_change_at_500_32000_and_48000():
    rates = learning_rates(TrainingConfig())
    assert rates.shape == (64_000,)
    assert rates.dtype == np.float32
    expected = {
        **{0: 0.01, 499: 0.01, 500: 0.1, 31_999: 0.1},
        **{32_000: 0.01, 47_999: 0.01, 48_000: 0.001, 63_999: 0.001},
    }
    # Equal to the nearest float32, up to its last digit.
    np.testing.assert_allclose(rates[list(expected)], list(expected.values()), rtol=2e-7)
    changes = np.flatnonzero(np.diff(rates)) + 1
    assert changes.tolist() == [500, 32_000, 48_000]


@pytest.mark.parametrize(
    ("num_iterations", "boundaries"),
    [
        (6_400, [50, 3_200, 4_800]),
        (128_000, [1_000, 64_000, 96_000]),
        (1_000, [8, 500, 750]),  # 7.8 rounded
        (64, [32, 48]),  # half a step of warming up is none
    ],
)
def test_the_papers_learning_rates_keep_their_proportions_in_other_lengths(
    num_iterations, boundaries
):
    rates = learning_rates(TrainingConfig(num_iterations=num_iterations))
    assert rates.shape == (num_iterations,)
    assert (np.flatnonzero(np.diff(rates)) + 1).tolist() == boundaries
    factors = [0.01, 0.1, 0.01, 0.001][-len(boundaries) - 1 :]
    np.testing.assert_allclose(rates[[0, *boundaries]], factors, rtol=2e-7)


@pytest.mark.parametrize("recipe", RECIPES)
def test_learning_rates_are_proportional_to_the_initial_one(recipe):
    one = TrainingConfig(recipe=recipe, num_iterations=200, init_lr=1.0)
    three = dataclasses.replace(one, init_lr=3.0)
    np.testing.assert_allclose(learning_rates(three), 3 * learning_rates(one), rtol=2e-7)


@pytest.mark.parametrize("recipe", ["one_cycle", "fast", "best"])
@pytest.mark.parametrize("num_iterations", [100, 16_000])
def test_one_cycle_goes_straight_up_to_its_peak_and_straight_down_to_almost_nothing(
    recipe, num_iterations
):
    training = TrainingConfig(recipe=recipe, num_iterations=num_iterations, init_lr=0.2)
    rates = learning_rates(training)
    peak = num_iterations // 5
    assert rates.shape == (num_iterations,)
    assert rates.dtype == np.float32
    assert rates[peak] == rates.max() == np.float32(0.2)
    # equal steps on either side: a fifth of the way takes the whole rise, the rest the whole fall
    np.testing.assert_allclose(np.diff(rates[:peak]), 0.2 / peak, rtol=0, atol=5e-8)
    np.testing.assert_allclose(
        np.diff(rates[peak:]), -0.2 / (num_iterations - peak), rtol=0, atol=5e-8
    )
    assert rates.min() > 0
    assert rates[0] <= 0.2 / peak * 1.01
    assert rates[-1] <= 0.2 / (num_iterations - peak) * 1.01


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("num_iterations", [1, 2, 3, 5, 7, 11])
def test_every_step_of_the_shortest_runs_has_a_learning_rate(recipe, num_iterations):
    rates = learning_rates(TrainingConfig(recipe=recipe, num_iterations=num_iterations))
    assert rates.shape == (num_iterations,)
    assert np.all((rates > 0) & (rates <= np.float32(0.1)))


# --- Recipes --------------------------------------------------------------------------------------


def test_the_defaults_are_the_papers():
    assert training_config({}) == training_config({"recipe": None}) == TrainingConfig()
    assert training_config({"recipe": "paper"}) == TrainingConfig(
        recipe="paper",
        num_iterations=64_000,
        batch_size=128,
        init_lr=0.1,
        momentum=0.9,
        nesterov=False,
        weight_decay=2e-4,
        label_smoothing=0.0,
        seed=0,
    )
    assert ModelConfig() == ModelConfig(20, True, False, 2, 10, 0.99, 1e-3)
    assert DataConfig() == DataConfig("cifar10", CIFAR10_NAMES, 0, False)


def test_one_cycle_brings_its_own_values():
    assert training_config({"recipe": "one_cycle"}) == TrainingConfig(
        recipe="one_cycle",
        num_iterations=16_000,
        batch_size=128,
        init_lr=0.2,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        label_smoothing=0.0,
        seed=0,
    )


def test_fast_brings_its_own_values():
    assert training_config({"recipe": "fast"}) == TrainingConfig(
        recipe="fast",
        num_iterations=16_000,
        batch_size=128,
        optimizer="muon",
        init_lr=0.2,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        label_smoothing=0.1,
        alternate_flips=True,
        cutout=9,
        seed=0,
    )


def test_given_values_win_over_the_recipe_also_where_they_are_zero_or_false():
    given = {
        **{"recipe": "one_cycle", "num_iterations": 10, "nesterov": False, "weight_decay": 0.0},
        **{"init_lr": None, "batch_size": None, "seed": 3},
    }
    assert training_config(given) == TrainingConfig(
        recipe="one_cycle",
        num_iterations=10,
        init_lr=0.2,
        nesterov=False,
        weight_decay=0.0,
        seed=3,
    )


def test_the_learning_rate_follows_the_batch_size_only_where_that_is_asked_for():
    for batch_size, scale_lr, peak in ((256, False, 0.1), (256, True, 0.2), (32, True, 0.025)):
        training = training_config({"batch_size": batch_size, "scale_lr": scale_lr})
        assert learning_rates(training).max() == np.float32(peak)


def test_flags_that_are_no_hyperparameters_are_left_to_others():
    assert training_config({"num_layers": 56, "path": "here"}) == TrainingConfig()


# --- Contradictions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "fixed"),
    [
        ("num_layers", 20, 164),
        ("shortcut_connections", True, False),
        ("bottleneck", False, True),
        ("resnet_version", 2, 1),
        ("holdout", 0, 5000),
        ("dataset", "cifar10", "pictures"),
        ("coarse_labels", False, True),
        ("init_lr", 0.1, 1 / 3),
        ("recipe", "paper", "one_cycle"),
        ("nesterov", False, True),
        ("seed", 0, 2**40),
    ],
)
def test_a_value_that_contradicts_the_checkpoint_is_refused_with_both_values(name, value, fixed):
    with pytest.raises(UserError) as refusal:
        refuse_contradictions(UNUSUAL, {"momentum": 0.0, name: value}, "runs/pets/model-12")
    sentence = str(refusal.value)
    assert f"{name}={value} " in sentence
    assert f"{name}={fixed}" in sentence
    assert "runs/pets/model-12" in sentence


def test_values_that_agree_with_the_checkpoint_are_no_contradiction():
    parts = (UNUSUAL.model, UNUSUAL.data, UNUSUAL.training)
    given = {name: value for part in parts for name, value in dataclasses.asdict(part).items()}
    refuse_contradictions(UNUSUAL, given, "model-1")


def test_values_not_given_contradict_nothing():
    names = [
        field.name
        for part in (ModelConfig, DataConfig, TrainingConfig)
        for field in dataclasses.fields(part)
    ]
    refuse_contradictions(UNUSUAL, {}, "model-1")
    refuse_contradictions(UNUSUAL, dict.fromkeys(names), "model-1")
