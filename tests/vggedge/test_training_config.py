from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from vggedge.training.config import AugmentationConfig, TrainConfig, get_config, parse_scale
from vggedge_runtime.errors import UsageError

INPUT = (64, 64, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"optimizer": "rmsprop"},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"weight_decay": -1e-4},
        {"weight_decay": math.inf},
        {"schedule": "linear"},
        {"plateau_patience": 0},
        {"initialization": "zeros"},
        {"validation_share": 0.0},
        {"validation_share": 1.0},
        {"patience": -1},
        {"seed": -1},
        {"memory_bytes": -1},
    ],
)
def test_a_config_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(change))} is .*; needed is"):
        TrainConfig(**change)


@pytest.mark.parametrize("change", [{"scale": (80, 64)}, {"scale": (0, 64)}, {"colour_shift": -0.1}])
def test_an_augmentation_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(change))} is .*; needed is"):
        AugmentationConfig(**change)


def test_modern_is_the_default() -> None:
    assert get_config("modern", INPUT) == TrainConfig()
    assert TrainConfig().augmentation == AugmentationConfig(scale=None, flip=False, colour_shift=0)


def test_paper_is_section_3_1_of_the_paper() -> None:
    config = get_config("paper", (224, 224, 3))
    assert (config.optimizer, config.momentum, config.weight_decay) == ("sgd", 0.9, 5e-4)
    assert (config.learning_rate, config.schedule, config.epochs) == (1e-2, "plateau", 74)
    assert config.augmentation == AugmentationConfig(scale=(256, 512), flip=True, colour_shift=0.1)
    assert get_config("paper", INPUT).augmentation.scale == (74, 146)
    # The longer side decides, so that every image covers the input.
    assert get_config("paper", (32, 224, 3)).augmentation.scale == (256, 512)


def test_what_is_given_replaces_the_recipe() -> None:
    config = get_config("paper", INPUT, scale="none", flip=False, colour_shift=False, epochs=3, seed=None)
    assert config.augmentation == AugmentationConfig()
    assert (config.epochs, config.seed, config.optimizer) == (3, 0, "sgd")
    config = get_config("modern", INPUT, scale="64,100", colour_shift=True, optimizer="sgd", momentum=0.8)
    assert config.augmentation == AugmentationConfig(scale=(64, 100), colour_shift=0.1)
    assert (config.optimizer, config.momentum, config.learning_rate) == ("sgd", 0.8, TrainConfig().learning_rate)


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("classic", {}, "no recipe is called 'classic'. Known are: modern, paper"),
        ("modern", {"momentum": 0.5}, "momentum is 0.5 and has no effect: only the optimizer sgd"),
        ("modern", {"plateau_patience": 3}, "plateau_patience is 3 and has no effect"),
        ("paper", {"patience": 3}, "patience is 3 and has no effect: .* set plateau_patience instead"),
        ("paper", {"momentum": 0.5, "optimizer": "adam"}, "momentum is 0.5 and has no effect"),
        ("modern", {"scale": "63"}, "scale is 63 pixels at least; the network takes 64x64"),
        ("modern", {"epochs": 0}, "epochs is 0"),
    ],
)
def test_what_would_have_no_effect_or_makes_no_sense_is_refused(
    recipe: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        get_config(recipe, INPUT, **changes)


def test_scales_as_they_are_written() -> None:
    assert parse_scale("72") == (72, 72)
    assert parse_scale("64,128") == (64, 128)
    assert parse_scale("none") is None
    for text in ("", "64-128", "64,", "64,96,128", "-5", "6e1", "³"):
        with pytest.raises(UsageError, match="write S or SMIN,SMAX"):
            parse_scale(text)


def test_a_config_survives_json() -> None:
    config = get_config("paper", INPUT)
    assert msgspec.json.decode(msgspec.json.encode(config), type=TrainConfig) == config
