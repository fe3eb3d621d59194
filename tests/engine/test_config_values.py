"""Bad config values are found before anything is built, each in a sentence that names key and choices."""

import re
from pathlib import Path

import pytest
from dfm_d2.detection.checks import CHOICES, LEAST, get_key

from dfm_d2.detection.task import DETECTION
from dfm_d2.engine.setup import load_config, validate_config
from dfm_d2.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SHAPES = str(next(path for path in CONFIGS if path.name == "shapes_flow_r18.yaml"))

BAD = {
    "no such model": (["MODEL.META_ARCHITECTURE", "FlowDetectr"], "one of FlowDetector, CascadeDetector"),
    "a model of Detectron2": (["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"], "'GeneralizedRCNN'; choose"),
    "local cascade": (["MODEL.META_ARCHITECTURE", "CascadeDetector"], "set MODEL.DFM.UPDATE joint"),
    "signal scale": (["MODEL.DFM.SIGNAL_SCALE", "0.0"], "SIGNAL_SCALE is 0.0; it must be greater than 0"),
    "signal scale nan": (["MODEL.DFM.SIGNAL_SCALE", "float('nan')"], "SIGNAL_SCALE"),
    "no features": (["MODEL.DFM.HEAD.IN_FEATURES", "[]"], "IN_FEATURES is empty"),
    "heads": (["MODEL.DFM.HEAD.NUM_HEADS", "3"], "NUM_HEADS is 3; it must divide .*HIDDEN_DIM 128"),
    "no heads": (["MODEL.DFM.HEAD.NUM_HEADS", "0"], "NUM_HEADS is 0; it must be at least 1"),
    "loss weight": (["MODEL.DFM.LOSS.GIOU_WEIGHT", "-1.0"], "GIOU_WEIGHT is -1.0; it must be at least 0"),
    "noise passes": (
        ["MODEL.DFM.SAMPLER.NOISE_PASSES", "2", "MODEL.DFM.SAMPLER.NMS_THRESH", "0.0"],
        "NMS_THRESH is 0, but NOISE_PASSES",
    ),
    "ensemble": (
        ["MODEL.DFM.SAMPLER.ENSEMBLE_STEPS", "True", "MODEL.DFM.SAMPLER.NMS_THRESH", "0.0"],
        "and ENSEMBLE_STEPS merge",
    ),
    "predictors": (
        ["MODEL.DFM.SAMPLER.PREDICTORS", "[0]"],
        "SAMPLER.PREDICTORS needs MODEL.DFM.TIME shared",
    ),
    "time rate": (["MODEL.DFM.TIME_RATE", "60.0"], "TIME_RATE is 60.0; it must be from 0"),
    "gamma": (["MODEL.DFM.LOSS.FOCAL_GAMMA", "0.5"], "set 0 or at least 1"),
    "alpha": (["MODEL.DFM.LOSS.FOCAL_ALPHA", "-3.0"], "FOCAL_ALPHA is -3.0"),
    "three box weights": (["MODEL.DFM.HEAD.BOX_WEIGHTS", "(1.0, 1.0, 1.0)"], "must be 4 numbers above 0"),
    "pixel mean": (["MODEL.PIXEL_MEAN", "[1.0]"], "PIXEL_MEAN is .1.0.; it must have 3 numbers"),
    "pixel std": (["MODEL.PIXEL_STD", "[1.0, 0.0, 1.0]"], "PIXEL_STD .* greater than 0"),
    "no loss": (
        [w for k in ("CLS", "L1", "GIOU") for w in (f"MODEL.DFM.LOSS.{k}_WEIGHT", "0")],
        "no weight above 0",
    ),
    "chosen heads of a cascade": (
        [
            "MODEL.META_ARCHITECTURE",
            "CascadeDetector",
            "MODEL.DFM.UPDATE",
            "joint",
            "MODEL.DFM.TIME",
            "shared",
        ],
        "CascadeDetector asks all its heads in a row",
    ),
    "a predictor twice": (
        ["MODEL.DFM.TIME", "shared", "MODEL.DFM.SAMPLER.PREDICTORS", "[1, 1]"],
        "name each predictor once",
    ),
    "on-policy share": (["MODEL.DFM.ON_POLICY", "1.5"], "ON_POLICY is 1.5; it is a share"),
    "iou above 1": (["MODEL.DFM.SAMPLER.NMS_THRESH", "60.0"], "NMS_THRESH is 60.0; it is an IoU"),
    "seed": (["SEED", "99999999999"], "SEED is 99999999999; it must be less than"),
    "ema": (["SOLVER.EMA_DECAY", "1.0"], "EMA_DECAY is 1.0"),
    "ap": (["TEST.AP", "('coco', 'voc12')"], "'voc12'; choose among coco, voc07, voc"),
    "clip": (["SOLVER.CLIP_GRADIENTS.ENABLED", "True"], "SOLVER.CLIP_GRADIENTS"),
}


def check(opts: list[str]) -> str:
    """What is said about the shapes config with these overrides."""
    with pytest.raises((UserError, ValueError)) as caught:
        validate_config(DETECTION, load_config(DETECTION, SHAPES, opts))
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_our_configs_are_good(path):
    validate_config(DETECTION, load_config(DETECTION, str(path), []))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_named(name):
    opts, said = BAD[name]
    assert re.search(said, check(opts))


@pytest.mark.parametrize("key", CHOICES)
def test_every_choice_is_listed(key):
    message = check([key, "other"])
    assert key in message and ", ".join(CHOICES[key]) in message


@pytest.mark.parametrize("key", LEAST)
def test_every_least_value_holds(key):
    cfg = load_config(DETECTION, SHAPES, [])
    value = type(get_key(cfg, key))(LEAST[key] - 1)
    assert f"{key} is {value}; it must be at least {LEAST[key]}." in check([key, str(value)])


def test_a_whole_number_will_do_for_a_float():
    assert load_config(DETECTION, SHAPES, ["MODEL.DFM.TIME_RATE", "1"]).MODEL.DFM.TIME_RATE == 1.0
