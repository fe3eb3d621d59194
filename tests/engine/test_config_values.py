"""Config values: each key is declared with what it may be, and a bad value is one line that says so."""

from pathlib import Path

import pytest
import yaml

from dfm_d2.classification.task import CLASSIFICATION
from dfm_d2.detection.task import DETECTION
from dfm_d2.engine.config import KEYS
from dfm_d2.engine.keys import get_key
from dfm_d2.engine.setup import load_config, validate_config
from dfm_d2.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
OLD = Path(__file__).parent / "old_configs"
GOOD = {DETECTION: f"{CONFIGS}/shapes_flow_r18.yaml", CLASSIFICATION: f"{CONFIGS}/digits_flow_cnn.yaml"}
OLD_FILES = {DETECTION: f"{OLD}/detector.yaml", CLASSIFICATION: f"{OLD}/classifier.yaml"}
# Keys that are younger than the old files, and the values with which a run is what it was.
LATER = {
    "DATASETS.MAX_BYTES": 2**30,
    "MODEL.DFM.DENSE_WEIGHT": 0.0,
    "MODEL.DFM.INTERVALS": 0,
    "MODEL.DFM.ROLLOUT": 1,
    "MODEL.DFM.SAMPLER.MEMBERS": [],
    "MODEL.TIMM.NAME": "vit_tiny_patch16_224",
    "MODEL.TIMM.OPTIONS": [],
    "MODEL.TIMM.WEIGHTS": "",
    "MODEL.TIMM.FROZEN_NORM": False,
    "SOLVER.LAYER_DECAY": 1.0,
}
CASCADE = "MODEL.META_ARCHITECTURE CascadeDetector"
MULTI_STEP = "SOLVER.LR_SCHEDULER_NAME WarmupMultiStepLR"

# Overrides of the config of the demo, and a part of what is said about them. "D.": "MODEL.DFM.".
BAD_DETECTORS = {
    "MODEL.META_ARCHITECTURE FlowDetectr": "'FlowDetectr'; choose one of FlowDetector, CascadeDetector.",
    "MODEL.META_ARCHITECTURE FlowClassifier": "'FlowClassifier'; choose one of",
    CASCADE: "gradients cross a CascadeDetector: set joint.",
    f"{CASCADE} D.UPDATE joint D.INTERVALS 1": "CascadeDetector asks all its heads",
    f"{CASCADE} D.UPDATE joint D.BACKBONE_UPDATE local": "BACKBONE_UPDATE local is for FlowDetector",
    "D.UPDATE parallel D.PREDICTOR_RANKS 5": "is above NUM_PREDICTORS 4: give each rank one.",
    "D.PREDICTOR_RANKS 2": "PREDICTOR_RANKS is 2, which needs MODEL.DFM.UPDATE parallel.",
    "D.UPDATE joint D.STEP_IN_BACKWARD True": "STEP_IN_BACKWARD needs MODEL.DFM.UPDATE sequential",
    "D.SIGNAL_SCALE 0": "SIGNAL_SCALE is 0.0; it must be greater than 0 and at most 1000.",
    "D.TIME_RATE 60": "TIME_RATE is 60.0; it must be at least 0 and at most 12.",
    "D.ON_POLICY 0.5": "MODEL.DFM.ROLLOUT 0 trains on the path",
    "D.ROLLOUT -1": "ROLLOUT is -1; it must be at least 0.",
    "D.TIME shared": "MODEL.DFM.INTERVALS is 0 for 'partitioned' and 1 for 'shared'",
    "D.INTERVALS 3": "NUM_PREDICTORS is 4; it must be a multiple of INTERVALS 3.",
    "D.SAMPLER.NMS_THRESH 60": "NMS_THRESH is 60.0; it must be at least 0 and at most 1.",
    "D.LOSS.FOCAL_ALPHA -3": "FOCAL_ALPHA is -3.0; it must be greater than 0",
    "D.LOSS.GIOU_WEIGHT -1": "GIOU_WEIGHT is -1.0; it must be at least 0.",
    "D.HEAD.NUM_HEADS 0": "NUM_HEADS is 0; it must be at least 1.",
    "D.SIGNAL_SCALE nan": "SIGNAL_SCALE to 'nan': it must be a finite number.",
    "SOLVER.BASE_LR .inf": "BASE_LR to '.inf': it must be a finite number.",
    "D.SAMPLER.SCORE_THRESH 1e999": "SCORE_THRESH to '1e999': it must be a finite number.",
    "D.HEAD.IN_FEATURES []": "IN_FEATURES is []; it must not be empty.",
    "D.HEAD.NUM_HEADS 3": "NUM_HEADS is 3; it must divide HIDDEN_DIM 128.",
    "D.HEAD.BOX_WEIGHTS (1.0,1.0,1.0)": "it must have 4 numbers.",
    "D.LOSS.FOCAL_GAMMA 0.5": "set 0 or at least 1",
    "D.SAMPLER.MEMBERS ['a']": "each must be a whole number.",
    "D.LOSS.CLS_WEIGHT 0 D.LOSS.L1_WEIGHT 0 D.LOSS.GIOU_WEIGHT 0": "no weight above 0",
    "D.SAMPLER.NOISE_PASSES 2 D.SAMPLER.NMS_THRESH 0": "NMS_THRESH is 0, but NOISE_PASSES",
    "D.SAMPLER.PREDICTORS [0]": "MODEL.DFM.SAMPLER.MEMBERS chooses",
    "D.INTERVALS 1 D.SAMPLER.MEMBERS [1,1]": "name each predictor once",
    "D.INTERVALS 2 D.SAMPLER.MEMBERS [2]": "predictors go from 0 to 1",
    "INPUT.MIN_SIZE_TRAIN () INPUT.MIN_SIZE_TRAIN_SAMPLING range": "range wants (low, high).",
    "INPUT.DETR_CROP 1.0 INPUT.CROP_SIZE (600,384)": "CROP_SIZE is (600, 384); it must be (least, greatest).",
    "INPUT.MIN_SIZE_TRAIN_SAMPLING range": "MIN_SIZE_TRAIN_SAMPLING range wants (low, high).",
    "MODEL.PIXEL_MEAN [1.0]": "PIXEL_MEAN is [1.0]; it must have 3 numbers.",
    "MODEL.PIXEL_STD [1.0,0.0,1.0]": "each must be greater than 0.",
    "MODEL.PIXEL_STD [1.0]": "must have as many numbers.",
    "MODEL.DEVICE gpu": "MODEL.DEVICE is 'gpu': set it to cpu, cuda or cuda:0.",
    "MODEL.DEVICE mps": "MODEL.DEVICE is 'mps': set it to cpu",
    "MODEL.DEVICE cuda:99999999999": "MODEL.DEVICE is 'cuda:99999999999': set it to cpu",
    "MODEL.DEVICE cpu:\u0663": "set it to cpu, cuda or cuda:0.",
    f"{MULTI_STEP} SOLVER.STEPS (5,3)": "SOLVER.STEPS is (5, 3); they must increase",
    f"{MULTI_STEP} SOLVER.STEPS (-1,)": "SOLVER.STEPS is (-1,); they must increase, begin above 0",
    f"{MULTI_STEP} SOLVER.MAX_ITER 9 SOLVER.STEPS (9,)": "SOLVER.STEPS is (9,); they must increase",
    "SOLVER.MOMENTUM -1": "MOMENTUM is -1.0; it must be at least 0 and less than 1.",
    "SOLVER.OPTIMIZER sgd SOLVER.NESTEROV True SOLVER.MOMENTUM 0": "NESTEROV needs SOLVER.MOMENTUM above 0.",
    "SOLVER.BASE_LR_END 1.0": "SOLVER.BASE_LR_END is 1.0; it must be at most BASE_LR 0.001.",
    "SEED 99999999999": "SEED to '99999999999': it must be a whole number below 2**31.",
    "SOLVER.CLIP_GRADIENTS.ENABLED True": "SOLVER.CLIP_GRADIENTS",
    "D.HEAD.INTERACTION cross_attention": "it lost to both others and was removed",
    "SOLVER.EMA_DECAY 0.99": "this option was removed: averaged weights were no better",
    "TEST.BEST_METRIC bbox/AP50": "this option was removed: SOLVER.CHECKPOINTS_TO_KEEP 0 keeps all",
    "D.ENDPOINT_NOISE 0.1": "this option was removed: MODEL.DFM.ROLLOUT trains at the states of inference.",
    "D.FROM_NOISE 1.0": "this option was removed: MODEL.DFM.ROLLOUT",
    "D.SAMPLER.ENSEMBLE_STEPS True": "this option was removed: MODEL.DFM.SAMPLER.NOISE_PASSES merges",
    "C.TYPO 3": "MODEL.CLASSIFIER.TYPO, which is no key of this tool: classifiers have it.",
    "UPDATE.TYPO 3": "UPDATE.TYPO, which is no key of this tool: classifiers have it.",
    "TEST.AP.FOO 3": "TEST.AP.FOO, which is no key of this tool: every AP is computed.",
    "D.SAMPLER.RENEWAL_THRESH 0.5": "this option was removed: MODEL.DFM.SAMPLER.NUM_PROPOSALS",
}
for key in "BACKBONE_MULTIPLIER WEIGHT_DECAY WEIGHT_DECAY_BIAS GAMMA WARMUP_FACTOR".split():
    BAD_DETECTORS[f"SOLVER.{key} -1"] = f"{key} is -1.0; it must be at least 0."
# Of the digits' config. "C.": "MODEL.CLASSIFIER.".
BAD_CLASSIFIERS = {
    "D.BACKBONE_UPDATE frozen": "leave it at accumulate",
    "D.UPDATE parallel D.PREDICTOR_RANKS 2": "a classifier has no predictors to share",
    "C.BACKBONE resnet": "it was removed: take timm",
    "C.EMBEDDING learned C.LOSS.READOUT_WEIGHT 0": "learned needs LOSS.READOUT_WEIGHT above 0",
    "C.CNN.STRIDES (1,)": "give both for each stage",
    "C.CNN.STRIDES (1,0,1)": "each must be at least 1.",
    "C.HIDDEN_DIM 3": "it must be even.",
    "C.SAMPLER.BLOCKS [0,0]": "name each block once",
    "C.SAMPLER.BLOCKS ['b']": "each must be a whole number.",
    "C.SHUFFLE_X0 True SOLVER.IMS_PER_BATCH 1": "SHUFFLE_X0 needs SOLVER.IMS_PER_BATCH of at least 2",
    "UPDATE.METHOD stochastic_forward_forward": "the stochastic Forward-Forward lost everywhere and is gone",
    "C.SAMPLER.AGGREGATION probability": "this option was removed: blocks move one state",
    "C.TIMM.NAME resnet18": "this option was removed: it is MODEL.TIMM now",
    "C.SAMPLER.STEPS 4": "this option was removed: a classifier answers in one step",
    "C.SAMPLER.METHOD heun": "this option was removed: a classifier answers in one step",
    "D.SAMPLER.STEPS 8": "SAMPLER.STEPS, which is no key of this tool: detectors have it.",
    "D.SAMPLER.RENEWAL_THRESH 0.5": "which is no key of this tool",
    "DATASETS.VOC_ROOT /nope": "DATASETS.VOC_ROOT, which is no key of this tool",
    "D.HEAD.HIDEN_DIM 3": "the unknown key MODEL.DFM.HEAD.HIDEN_DIM",
    "INPUT.RANDOM_SHIFT 9 INPUT.IMAGE_SIZE 9": "RANDOM_SHIFT is 9; it must be less than INPUT.IMAGE_SIZE",
    "MODEL.PIXEL_MEAN [1.0,2.0]": "it must have 1 or 3 numbers.",
}
BAD = [(DETECTION, *case) for case in BAD_DETECTORS.items()]
BAD += [(CLASSIFICATION, *case) for case in BAD_CLASSIFIERS.items()]


def said_of(task, overrides: str, file: str = "") -> str:
    """What is said about a good config, or that file, with these overrides."""
    names = {"D.": "MODEL.DFM.", "C.": "MODEL.CLASSIFIER."}
    words = [names.get(word[:2], word[:2]) + word[2:] for word in overrides.split()]
    with pytest.raises(UserError) as caught:
        validate_config(task, load_config(task, file or GOOD[task], words))
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_our_configs_are_good():
    for path in CONFIGS.glob("*.yaml"):
        task = CLASSIFICATION if path.name.startswith(("cifar", "digits", "mnist")) else DETECTION
        validate_config(task, load_config(task, str(path), []))


@pytest.mark.parametrize(("task", "overrides", "said"), BAD, ids=[case[1] for case in BAD])
def test_a_bad_value_is_named(task, overrides, said):
    assert said in said_of(task, overrides)


def test_choices_and_bounds_are_those_of_the_key():
    def problem(value):
        """Of the value, or of a list of it for a key that holds one."""
        is_list = isinstance(key.default, (list, tuple))
        return key.problem([value] * (key.lengths or (1,))[0] if is_list else value)

    for key in KEYS + DETECTION.keys + CLASSIFICATION.keys:
        # Words of the message, the bound, a value that is out of it and one that is not.
        bounds = [("at least", key.least, -1, 0), ("greater than", key.above, 0, 0.5)]
        bounds += [("at most", key.most, 1, 0), ("less than", key.below, 0, -0.5)]
        for words, bound, out, within in bounds:
            if bound is not None:
                assert words in problem(bound + out) and problem(float("nan"))
                assert not problem(bound + within)
        if key.of:
            assert "each must be" in key.problem([None]) and key.problem([[1]])
        assert key.of or key.default not in ([], ()), key.name
        if key.choices:
            assert ", ".join(key.choices) in problem("other") and not problem(key.choices[0])


@pytest.mark.parametrize("task", OLD_FILES)
def test_a_config_file_of_an_earlier_version_means_the_same(task, tmp_path):
    """It has the keys of both tasks and options that are gone."""
    cfg = load_config(task, OLD_FILES[task], [])
    validate_config(task, cfg)
    old, new = (yaml.safe_load(text) for text in (Path(OLD_FILES[task]).read_text(), cfg.dump()))
    for key in (*KEYS, *task.keys):
        wanted = LATER[key.name] if key.name in LATER else get_key(old, key.name)
        assert get_key(new, key.name) == wanted, key.name
    assert "BLOCKS" in old["MODEL"]["CLASSIFIER"]["SAMPLER"] and "NUM_HEADS" in old["MODEL"]["DFM"]["HEAD"]
    assert ("CLASSIFIER" in new["MODEL"]) != ("HEAD" in new["MODEL"]["DFM"])
    (tmp_path / "again.yaml").write_text(cfg.dump())
    assert yaml.safe_load(load_config(task, str(tmp_path / "again.yaml"), []).dump()) == new


def test_a_removed_option_of_an_old_file_is_one_message(tmp_path):
    old = yaml.safe_load(Path(OLD_FILES[DETECTION]).read_text())
    old["MODEL"]["DFM"]["SAMPLER"]["RENEWAL_THRESH"] = 0.1
    old["MODEL"]["CLASSIFIER"]["POOL"] = 7  # no matter for a detector
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    said = said_of(DETECTION, "", str(tmp_path / "old.yaml"))
    assert "sets MODEL.DFM.SAMPLER.RENEWAL_THRESH to 0.1, but this option was removed" in said
    assert "MODEL.DFM.NO_SUCH" in said_of(CLASSIFICATION, "MODEL.DFM.NO_SUCH 1")
