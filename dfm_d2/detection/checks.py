"""Bad config values, found before anything is built."""

from collections.abc import Iterator
from typing import Any

from dfm_kernels import BACKENDS

import dfm_d2.registry  # noqa: F401  (registers the meta-architectures)
from dfm_d2.classification.checks import CLASSIFIER_CHOICES, CLASSIFIER_LEAST, classifier_problems
from dfm_d2.detection.assignment import ASSIGNMENTS
from dfm_d2.detection.coupling import COUPLINGS
from dfm_d2.detection.evaluation.evaluator import AP_KINDS
from dfm_d2.detection.head import INTERACTIONS
from dfm_d2.detection.loss import CLASS_LOSSES
from dfm_d2.detection.stack import TIMES
from dfm_d2.engine.optimizer import OPTIMIZERS
from dfm_d2.engine.precision import AMP_DTYPES
from dfm_d2.flow import AGGREGATIONS, PREDICTIONS, ODESolver
from dfm_d2.framework import META_ARCH_REGISTRY, CfgNode
from dfm_d2.local_update.updates import BACKBONE_UPDATES, UPDATES

# Keys that are one of a few words.
CHOICES: dict[str, tuple[str, ...]] = {
    "DATASETS.ON_ERROR": ("skip", "fatal"),
    "INPUT.FORMAT": ("BGR", "RGB"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "MODEL.DFM.AGGREGATION": AGGREGATIONS,
    "MODEL.DFM.ASSIGNMENT": ASSIGNMENTS,
    "MODEL.DFM.BACKBONE_UPDATE": BACKBONE_UPDATES,
    "MODEL.DFM.COUPLING": COUPLINGS,
    "MODEL.DFM.HEAD.INTERACTION": INTERACTIONS,
    "MODEL.DFM.KERNELS": BACKENDS,
    "MODEL.DFM.LOSS.CLS": CLASS_LOSSES,
    "MODEL.DFM.PREDICTION": PREDICTIONS,
    "MODEL.DFM.SAMPLER.METHOD": ODESolver.METHODS,
    "MODEL.DFM.TIME": TIMES,
    "MODEL.DFM.UPDATE": tuple(UPDATES),
    "SOLVER.AMP.DTYPE": AMP_DTYPES,
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR"),
    "SOLVER.OPTIMIZER": OPTIMIZERS,
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    **CLASSIFIER_CHOICES,
}

# Keys with a least value.
LEAST: dict[str, float] = {
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MAX_SIZE_TEST": 1,
    "INPUT.MAX_SIZE_TRAIN": 1,
    "INPUT.MIN_SIZE_TEST": 0,
    "MODEL.DFM.ENDPOINT_NOISE": 0.0,
    "MODEL.DFM.GT_REPEAT": 1,
    "MODEL.DFM.HEAD.DYNAMIC_DIM": 1,
    "MODEL.DFM.HEAD.FEEDFORWARD_DIM": 1,
    "MODEL.DFM.HEAD.HIDDEN_DIM": 1,
    "MODEL.DFM.HEAD.NUM_CLS": 0,
    "MODEL.DFM.HEAD.NUM_HEADS": 1,
    "MODEL.DFM.HEAD.NUM_REG": 0,
    "MODEL.DFM.HEAD.POOLER_CANONICAL_SIZE": 1,
    "MODEL.DFM.HEAD.POOLER_RESOLUTION": 1,
    "MODEL.DFM.HEAD.POOLER_SAMPLING_RATIO": 0,
    "MODEL.DFM.LOSS.CLS_WEIGHT": 0.0,
    "MODEL.DFM.LOSS.FOCAL_GAMMA": 0.0,
    "MODEL.DFM.LOSS.GIOU_WEIGHT": 0.0,
    "MODEL.DFM.LOSS.L1_WEIGHT": 0.0,
    "MODEL.DFM.LOSS.VELOCITY_MAX": 0.0,
    "MODEL.DFM.LOSS.VELOCITY_WEIGHT": 0.0,
    "MODEL.DFM.NUM_CLASSES": 0,
    "MODEL.DFM.NUM_PREDICTORS": 1,
    "MODEL.DFM.NUM_PROPOSALS": 1,
    "MODEL.DFM.PREDICTOR_RANKS": 1,
    "MODEL.DFM.SAMPLER.NMS_THRESH": 0.0,
    "MODEL.DFM.SAMPLER.NOISE_PASSES": 1,
    "MODEL.DFM.SAMPLER.NUM_PROPOSALS": 0,
    "MODEL.DFM.SAMPLER.STEPS": 0,
    "SOLVER.BLOCK_CLIP_NORM": 0.0,
    "SOLVER.CHECKPOINTS_TO_KEEP": 0,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.LOG_PERIOD": 1,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.WARMUP_ITERS": 0,
    "TEST.BATCH_SIZE": 1,
    "TEST.DETECTIONS_PER_IMAGE": 1,
    "TEST.EVAL_PERIOD": 0,
    **CLASSIFIER_LEAST,
}


def get_key(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted key."""
    node = cfg
    for part in key.split("."):
        node = node[part]
    return node


def config_problems(cfg: CfgNode) -> Iterator[str]:
    """One error message for each value that cannot work."""
    for key, choices in CHOICES.items():
        value = get_key(cfg, key)
        if value not in choices:
            yield f"{key} is {value!r}; choose one of {', '.join(choices)}."
    for key, least in LEAST.items():
        value = get_key(cfg, key)
        if not value >= least:
            yield f"{key} is {value}; it must be at least {least}."
    if not cfg.SOLVER.BASE_LR > 0:
        yield f"SOLVER.BASE_LR is {cfg.SOLVER.BASE_LR}; it must be greater than 0."
    if not cfg.SEED < 2**31:
        yield f"SEED is {cfg.SEED}; it must be less than {2**31} (negative: a random one)."
    if not 0.0 <= cfg.SOLVER.EMA_DECAY < 1.0:
        yield f"SOLVER.EMA_DECAY is {cfg.SOLVER.EMA_DECAY}; it must be at least 0 (off) and less than 1."
    unknown = [kind for kind in cfg.TEST.AP if kind not in AP_KINDS]
    if unknown:
        yield f"TEST.AP names {unknown[0]!r}; choose among {', '.join(AP_KINDS)}."
    if "CLIP_GRADIENTS" in cfg.SOLVER and cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        yield (
            "SOLVER.CLIP_GRADIENTS would clip over all blocks, which local updates cannot know; "
            "set SOLVER.BLOCK_CLIP_NORM instead."
        )
    yield from _model_problems(cfg)
    yield from _sampler_problems(cfg.MODEL.DFM)
    if is_classifier(cfg):
        yield from classifier_problems(cfg)


def _model_problems(cfg: CfgNode) -> Iterator[str]:
    dfm, name = cfg.MODEL.DFM, cfg.MODEL.META_ARCHITECTURE
    # Those of ours and of whoever embeds us; Detectron2's own cannot be trained block by block.
    ours = [(key, model) for key, model in META_ARCH_REGISTRY if hasattr(model, "is_local")]
    known = dict(sorted(ours, key=lambda entry: getattr(entry[1], "task", "")))  # detectors first
    if name not in known:
        yield f"MODEL.META_ARCHITECTURE is {name!r}; choose one of {', '.join(known)}."
    elif not known[name].is_local and dfm.UPDATE != "joint":
        yield (
            f"MODEL.DFM.UPDATE is {dfm.UPDATE!r}, but {name} passes gradients between its predictors: "
            "set MODEL.DFM.UPDATE joint."
        )
    elif not known[name].is_local and dfm.BACKBONE_UPDATE == "local":
        yield f"MODEL.DFM.BACKBONE_UPDATE local needs independent predictors, not {name}: set accumulate."
    elif not known[name].is_local and (dfm.TIME != "partitioned" or dfm.SAMPLER.PREDICTORS):
        yield f"{name} asks all its heads in a row: leave MODEL.DFM.TIME and SAMPLER.PREDICTORS as they are."
    if dfm.PREDICTOR_RANKS > 1 and dfm.UPDATE != "parallel":
        yield f"MODEL.DFM.PREDICTOR_RANKS is {dfm.PREDICTOR_RANKS}, which needs MODEL.DFM.UPDATE parallel."
    for key in ("ON_POLICY", "FROM_NOISE"):
        if not 0 <= dfm[key] <= 1:
            yield f"MODEL.DFM.{key} is {dfm[key]}; it is a share, from 0 to 1."
    if not dfm.SIGNAL_SCALE > 0:
        yield f"MODEL.DFM.SIGNAL_SCALE is {dfm.SIGNAL_SCALE}; it must be greater than 0."
    # Beyond, the last intervals of time are empty in float32.
    if not 0 <= dfm.TIME_RATE <= 12:
        yield f"MODEL.DFM.TIME_RATE is {dfm.TIME_RATE}; it must be from 0 (even in t) to 12."
    if 0 < dfm.LOSS.FOCAL_GAMMA < 1:
        yield (
            f"MODEL.DFM.LOSS.FOCAL_GAMMA is {dfm.LOSS.FOCAL_GAMMA}; set 0 or at least 1: between them the "
            "gradient of a saturated class is infinite."
        )
    if not 0 < dfm.LOSS.FOCAL_ALPHA < 1:
        yield f"MODEL.DFM.LOSS.FOCAL_ALPHA is {dfm.LOSS.FOCAL_ALPHA}; it must be between 0 and 1."
    weights = ("CLS_WEIGHT", "L1_WEIGHT", "GIOU_WEIGHT", "VELOCITY_WEIGHT")
    if not any(dfm.LOSS[key] > 0 for key in weights):
        yield f"MODEL.DFM.LOSS has no weight above 0; set one of {', '.join(weights)}."
    numbers = (1, 3) if is_classifier(cfg) else (3,)
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        if len(cfg.MODEL[key]) not in numbers:
            allowed = " or ".join(map(str, numbers))
            yield f"MODEL.{key} is {list(cfg.MODEL[key])}; it must have {allowed} numbers."
    if len(cfg.MODEL.PIXEL_MEAN) != len(cfg.MODEL.PIXEL_STD):
        yield "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD must have as many numbers."
    if not all(value > 0 for value in cfg.MODEL.PIXEL_STD):
        yield f"MODEL.PIXEL_STD is {list(cfg.MODEL.PIXEL_STD)}; each must be greater than 0."
    head = dfm.HEAD
    if len(head.BOX_WEIGHTS) != 4 or not all(value > 0 for value in head.BOX_WEIGHTS):
        yield f"MODEL.DFM.HEAD.BOX_WEIGHTS is {list(head.BOX_WEIGHTS)}; it must be 4 numbers above 0."
    if not head.IN_FEATURES:
        yield "MODEL.DFM.HEAD.IN_FEATURES is empty; name outputs of the backbone, such as p2."
    if head.HIDDEN_DIM % head.NUM_HEADS:
        yield (
            f"MODEL.DFM.HEAD.NUM_HEADS is {head.NUM_HEADS}; it must divide MODEL.DFM.HEAD.HIDDEN_DIM "
            f"{head.HIDDEN_DIM}."
        )


def is_classifier(cfg: CfgNode) -> bool:
    """Whether MODEL.META_ARCHITECTURE is a classifier."""
    models = dict(META_ARCH_REGISTRY)
    return getattr(models.get(cfg.MODEL.META_ARCHITECTURE), "task", "") == "classification"


def _sampler_problems(dfm: CfgNode) -> Iterator[str]:
    grid = list(dfm.SAMPLER.TIME_GRID)
    if grid and (grid[0] != 0 or grid[-1] != 1 or any(a >= b for a, b in zip(grid, grid[1:]))):
        yield f"MODEL.DFM.SAMPLER.TIME_GRID is {grid}; it must increase from 0 to 1."
    if dfm.SAMPLER.NMS_THRESH == 0 and (dfm.SAMPLER.NOISE_PASSES > 1 or dfm.SAMPLER.ENSEMBLE_STEPS):
        yield (
            "MODEL.DFM.SAMPLER.NMS_THRESH is 0, but NOISE_PASSES and ENSEMBLE_STEPS merge detections by NMS: "
            "set it, for example to 0.6."
        )
    if dfm.SAMPLER.NMS_THRESH > 1:
        yield f"MODEL.DFM.SAMPLER.NMS_THRESH is {dfm.SAMPLER.NMS_THRESH}; it is an IoU, at most 1 (0: off)."
    predictors = list(dfm.SAMPLER.PREDICTORS)
    if len(set(predictors)) < len(predictors):
        yield f"MODEL.DFM.SAMPLER.PREDICTORS is {predictors}; name each predictor once."
    if predictors and dfm.TIME == "partitioned":
        yield "MODEL.DFM.SAMPLER.PREDICTORS needs MODEL.DFM.TIME shared: partitioned time needs them all."
    if any(not 0 <= index < dfm.NUM_PREDICTORS for index in predictors):
        yield (
            f"MODEL.DFM.SAMPLER.PREDICTORS is {predictors}; indices go from 0 to {dfm.NUM_PREDICTORS - 1} "
            "(MODEL.DFM.NUM_PREDICTORS - 1)."
        )


def check_detector_start(cfg: CfgNode) -> None:
    """ValueError if training from scratch (``MODEL.WEIGHTS`` empty) would leave random layers untrained."""
    if cfg.MODEL.WEIGHTS:
        return
    if cfg.MODEL.RESNETS.NORM == "FrozenBN":
        raise ValueError(
            "MODEL.RESNETS.NORM FrozenBN cannot train from scratch, its statistics never move; "
            "set it to GN or BN, or give MODEL.WEIGHTS."
        )
    if cfg.MODEL.BACKBONE.FREEZE_AT > 0 or cfg.MODEL.DFM.BACKBONE_UPDATE == "frozen":
        key = (
            "MODEL.BACKBONE.FREEZE_AT 0" if cfg.MODEL.BACKBONE.FREEZE_AT > 0 else "BACKBONE_UPDATE accumulate"
        )
        raise ValueError(
            f"Training from scratch would keep random layers frozen: set {key}, or give MODEL.WEIGHTS."
        )
