"""Bad config values of a classifier, found before anything is built."""

from collections.abc import Iterator

from dfm_d2.classification.backbone import BACKBONES
from dfm_d2.classification.flow_classifier import EMBEDDINGS
from dfm_d2.classification.loss import WEIGHTINGS
from dfm_d2.classification.sampler import SAMPLER_AGGREGATIONS, WEIGHTS
from dfm_d2.flow import ODESolver
from dfm_d2.framework import CfgNode

# The meta-architecture of every UPDATE.METHOD.
METHODS = {
    "flow": "FlowClassifier",
    "backprop": "BackpropClassifier",
    "forward_forward": "ForwardForwardClassifier",
    "stochastic_forward_forward": "StochasticForwardForwardClassifier",
}

CLASSIFIER_CHOICES: dict[str, tuple[str, ...]] = {
    "MODEL.CLASSIFIER.BACKBONE": BACKBONES,
    "MODEL.CLASSIFIER.CNN.NORM": ("BN", "GN"),
    "MODEL.CLASSIFIER.EMBEDDING": EMBEDDINGS,
    "MODEL.CLASSIFIER.LOSS.WEIGHTING": WEIGHTINGS,
    "MODEL.CLASSIFIER.SAMPLER.AGGREGATION": SAMPLER_AGGREGATIONS,
    "MODEL.CLASSIFIER.SAMPLER.METHOD": ODESolver.METHODS,
    "MODEL.CLASSIFIER.SAMPLER.WEIGHTS": WEIGHTS,
    "UPDATE.METHOD": tuple(METHODS),
}

CLASSIFIER_LEAST: dict[str, float] = {
    "INPUT.IMAGE_SIZE": 0,
    "INPUT.RANDOM_SHIFT": 0,
    "MODEL.CLASSIFIER.BLOCKS": 0,
    "MODEL.CLASSIFIER.EMBED_DIM": 0,
    "MODEL.CLASSIFIER.FF.COPIES": 2,
    "MODEL.CLASSIFIER.FF.COPY_WEIGHT": 0.0,
    "MODEL.CLASSIFIER.FF.LABEL_SCALE": 0.0,
    "MODEL.CLASSIFIER.FF.NOISE": 0.0,
    "MODEL.CLASSIFIER.HIDDEN_DIM": 2,
    "MODEL.CLASSIFIER.LOSS.READOUT_WEIGHT": 0.0,
    "MODEL.CLASSIFIER.NOISE_SAMPLES": 1,
    "MODEL.CLASSIFIER.POOL": 1,
    "MODEL.CLASSIFIER.SAMPLER.NOISE": 0.0,
    "MODEL.CLASSIFIER.SAMPLER.SAMPLES": 1,
    "MODEL.CLASSIFIER.SAMPLER.STEPS": 1,
}


def choose_method(cfg: CfgNode) -> None:
    """Set MODEL.META_ARCHITECTURE, and what goes with it, by UPDATE.METHOD; ValueError for another one.

    A method whose blocks depend on each other is updated jointly, whatever MODEL.DFM.UPDATE says.
    """
    method = cfg.UPDATE.METHOD
    if method not in METHODS:
        raise ValueError(f"UPDATE.METHOD is {method!r}; choose one of {', '.join(METHODS)}.")
    cfg.MODEL.META_ARCHITECTURE = METHODS[method]
    if method == "backprop":
        cfg.MODEL.DFM.UPDATE = "joint"
        cfg.MODEL.DFM.STEP_IN_BACKWARD = False


def classifier_problems(cfg: CfgNode) -> Iterator[str]:
    """One sentence for each value that cannot work together with others."""
    c, dfm, name = cfg.MODEL.CLASSIFIER, cfg.MODEL.DFM, cfg.MODEL.META_ARCHITECTURE
    if name in METHODS.values() and name != METHODS[cfg.UPDATE.METHOD]:
        yield (
            f"UPDATE.METHOD {cfg.UPDATE.METHOD} is {METHODS[cfg.UPDATE.METHOD]}, but MODEL.META_ARCHITECTURE "
            f"is {name}: train with tools/train_classifier.py, which sets the second by the first."
        )
    if dfm.BACKBONE_UPDATE != "accumulate":
        yield (
            f"MODEL.DFM.BACKBONE_UPDATE is {dfm.BACKBONE_UPDATE!r}, but every block of a classifier is "
            "updated by its own loss already: leave it at accumulate."
        )
    if dfm.PREDICTOR_RANKS > 1:
        yield f"MODEL.DFM.PREDICTOR_RANKS is {dfm.PREDICTOR_RANKS}; a classifier has no predictors to share."
    if not 0 <= cfg.DATASETS.HOLD_OUT < 1:
        yield f"DATASETS.HOLD_OUT is {cfg.DATASETS.HOLD_OUT}; it is a share, from 0 to less than 1."
    for key in ("LOSS.READOUT_TEMPERATURE", "RADIUS", "TIME_POWER", "FF.THRESHOLD", "FF.SHARPNESS"):
        node = c
        for part in key.split("."):
            node = node[part]
        if not node > 0:
            yield f"MODEL.CLASSIFIER.{key} is {node}; it must be greater than 0."
    if c.HIDDEN_DIM % 2:
        yield f"MODEL.CLASSIFIER.HIDDEN_DIM is {c.HIDDEN_DIM}; it must be even."
    if c.EMBEDDING == "learned" and c.LOSS.READOUT_WEIGHT == 0:
        yield (
            "MODEL.CLASSIFIER.EMBEDDING learned needs LOSS.READOUT_WEIGHT above 0: nothing else keeps the "
            "embeddings of classes apart."
        )
    if not c.CNN.CHANNELS or len(c.CNN.CHANNELS) != len(c.CNN.STRIDES):
        yield (
            f"MODEL.CLASSIFIER.CNN.CHANNELS is {list(c.CNN.CHANNELS)}, STRIDES {list(c.CNN.STRIDES)}; give "
            "both for each stage."
        )
    for key in ("CHANNELS", "STRIDES"):
        if not all(isinstance(value, int) and value >= 1 for value in c.CNN[key]):
            yield f"MODEL.CLASSIFIER.CNN.{key} is {list(c.CNN[key])}; give whole numbers of at least 1."
    named = list(c.SAMPLER.BLOCKS)
    if not all(isinstance(index, int) for index in named) or len(set(named)) < len(named):
        yield (
            f"MODEL.CLASSIFIER.SAMPLER.BLOCKS is {named}; name each block once, by its index (empty: all)."
        )
    if cfg.UPDATE.METHOD == "stochastic_forward_forward" and cfg.SOLVER.IMS_PER_BATCH < 2:
        yield (
            "UPDATE.METHOD stochastic_forward_forward needs SOLVER.IMS_PER_BATCH of at least 2: it compares "
            "the images of a batch."
        )
    if c.SHUFFLE_X0 and cfg.SOLVER.IMS_PER_BATCH < 2:
        yield (
            "MODEL.CLASSIFIER.SHUFFLE_X0 needs SOLVER.IMS_PER_BATCH of at least 2: one image has no other's "
            "noise, and the control would be what it controls."
        )
    if 0 < cfg.INPUT.IMAGE_SIZE <= cfg.INPUT.RANDOM_SHIFT:
        yield (
            f"INPUT.RANDOM_SHIFT is {cfg.INPUT.RANDOM_SHIFT}; it must be less than INPUT.IMAGE_SIZE "
            f"{cfg.INPUT.IMAGE_SIZE}."
        )
    if cfg.INPUT.RANDOM_FLIP not in ("none", "horizontal"):
        yield f"INPUT.RANDOM_FLIP is {cfg.INPUT.RANDOM_FLIP!r}; choose one of none, horizontal."


def check_classifier_start(cfg: CfgNode) -> None:
    """ValueError if training from scratch would leave random layers untrained."""
    if cfg.MODEL.CLASSIFIER.BACKBONE != "resnet" or cfg.MODEL.WEIGHTS:
        return
    if cfg.MODEL.RESNETS.NORM == "FrozenBN" or cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        raise ValueError(
            "Training from scratch would keep random layers frozen: set MODEL.RESNETS.NORM to GN or BN and "
            "MODEL.BACKBONE.FREEZE_AT to 0, or give MODEL.WEIGHTS."
        )
