"""Explicit constructor arguments of the detectors from a config."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

from dfm_kernels import set_backend

import dfm_d2.detection.timm_backbones  # noqa: F401  (registers them)
from dfm_d2.detection.assignment import DynamicK
from dfm_d2.detection.dense import DensePredictor
from dfm_d2.detection.head import FeaturePooler, FlowHead, StagePredictor
from dfm_d2.detection.loss import BlockLoss
from dfm_d2.detection.sampler import BoxSampler, SamplerSettings
from dfm_d2.detection.stack import PredictorStack
from dfm_d2.errors import UserError
from dfm_d2.flow import BoxSpace
from dfm_d2.framework import BACKBONE_REGISTRY, build_backbone


def detector_arguments(cfg) -> dict:
    """Arguments of FlowDetector and CascadeDetector. Sets the backend of the process to MODEL.DFM.KERNELS.

    Raises:
        UserError: a key has a value that cannot be built; the message names it.
    """
    dfm = cfg.MODEL.DFM
    if dfm.NUM_CLASSES < 1:
        raise UserError(
            f"MODEL.DFM.NUM_CLASSES must be at least 1, got {dfm.NUM_CLASSES} "
            "(0 is filled in from the data set by tools/train_net.py)"
        )
    if not dfm.NUM_PROPOSALS or not cfg.INPUT.MIN_SIZE_TRAIN:
        raise UserError(
            "MODEL.DFM.NUM_PROPOSALS 0 and an empty INPUT.MIN_SIZE_TRAIN are chosen from the data by "
            "tools/train_net.py: take the config.yaml that it wrote into OUTPUT_DIR."
        )
    if cfg.MODEL.BACKBONE.NAME not in BACKBONE_REGISTRY:
        names = ", ".join(name for name, _ in BACKBONE_REGISTRY)
        raise UserError(f"MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME!r}; choose one of {names}.")
    try:
        backbone = build_backbone(cfg)
    except (AssertionError, KeyError, ValueError) as error:  # Detectron2 asserts
        said = str(error) or "check MODEL.RESNETS and MODEL.FPN."
        if isinstance(error, KeyError):
            said = f"{error.args[0]!r} is not known: see the keys NORM"
        raise UserError(f"no backbone can be built: {said}") from error
    set_backend(dfm.KERNELS)
    criterion = BlockLoss(dfm.SIGNAL_SCALE, **_lower(dfm.LOSS))
    space = BoxSpace(dfm.SIGNAL_SCALE, tuple(dfm.HEAD.BOX_WEIGHTS))
    return {
        "backbone": backbone,
        "in_features": dfm.HEAD.IN_FEATURES,
        "predictors": _predictors(cfg, backbone),
        "stage_predictors": _stage_predictors(cfg, backbone),
        "dense_predictor": _dense_predictor(cfg, backbone, space, criterion),
        "num_classes": dfm.NUM_CLASSES,
        "space": space,
        "sampler": BoxSampler(sampler_settings(cfg)),
        "criterion": criterion,
        "assigner": DynamicK(criterion),
        "num_proposals": dfm.NUM_PROPOSALS,
        "gt_repeat": dfm.GT_REPEAT,
        "rollout": 0 if _is_cascade(cfg) else dfm.ROLLOUT,
        "coupling": dfm.COUPLING,
        "assignment": dfm.ASSIGNMENT,
        "seed": dfm.SEED,
        "freeze_backbone": dfm.BACKBONE_UPDATE == "frozen",
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
    }


def _lower(node) -> dict:
    """Keys of a config as constructor arguments of the same names."""
    return {name.lower(): value for name, value in node.items()}


def sampler_settings(cfg) -> SamplerSettings:
    """The sampler of a config; STEPS 0 is one step an interval."""
    dfm, given = cfg.MODEL.DFM, _lower(cfg.MODEL.DFM.SAMPLER)
    given["num_proposals"] = given["num_proposals"] or dfm.NUM_PROPOSALS
    given["steps"] = given["steps"] or _intervals(cfg)
    given["members"] = tuple(given["members"])
    kept = cfg.TEST.DETECTIONS_PER_IMAGE
    return SamplerSettings(**given, detections_per_image=kept)


def _is_cascade(cfg) -> bool:
    """Its heads have one time, from all of [0, 1], not warped, and no rollout."""
    return cfg.MODEL.META_ARCHITECTURE == "CascadeDetector"


def _intervals(cfg) -> int:
    """S."""
    return 1 if _is_cascade(cfg) else cfg.MODEL.DFM.INTERVALS or cfg.MODEL.DFM.NUM_PREDICTORS


def _predictors(cfg, backbone) -> PredictorStack:
    dfm, head = cfg.MODEL.DFM, cfg.MODEL.DFM.HEAD
    shapes = backbone.output_shape()
    missing = [name for name in head.IN_FEATURES if name not in shapes]
    if missing:
        raise UserError(f"MODEL.DFM.HEAD.IN_FEATURES names {missing}, the backbone has {sorted(shapes)}")
    strides = [shapes[name].stride for name in head.IN_FEATURES]
    if any(coarse != 2 * fine for fine, coarse in zip(strides, strides[1:])):
        raise UserError(
            f"MODEL.DFM.HEAD.IN_FEATURES is {list(head.IN_FEATURES)} with the strides {strides}; pooling "
            "needs levels from fine to coarse, each stride twice the one before."
        )
    channels = {shapes[name].channels for name in head.IN_FEATURES}
    if channels != {head.HIDDEN_DIM}:
        raise UserError(
            f"MODEL.DFM.HEAD.HIDDEN_DIM is {head.HIDDEN_DIM}, but the features {list(head.IN_FEATURES)} have "
            f"{sorted(channels)} channels: set it equal to MODEL.FPN.OUT_CHANNELS"
        )
    rate = 0.0 if _is_cascade(cfg) else dfm.TIME_RATE
    numbers = dfm.NUM_PREDICTORS, _intervals(cfg), rate, dfm.ROLLOUT > 0
    return PredictorStack(_head_maker(cfg, strides), *numbers)


def _stage_predictors(cfg, backbone) -> dict[str, StagePredictor]:
    """A predictor for every stage of the backbone that learns; none but with BACKBONE_UPDATE "local"."""
    if cfg.MODEL.DFM.BACKBONE_UPDATE != "local":
        return {}
    bottom_up = getattr(backbone, "bottom_up", None)
    shapes = {} if bottom_up is None else bottom_up.output_shape()
    stages = [name for name in shapes if name != "stem" and hasattr(bottom_up, name)]
    if not stages:
        raise UserError(
            f"MODEL.DFM.BACKBONE_UPDATE local needs a pyramid on stages, which MODEL.BACKBONE.NAME "
            f"{cfg.MODEL.BACKBONE.NAME} does not build: set it to accumulate."
        )
    owner = owners_in_bottom_up(bottom_up, stages)
    learning = {owner.get(n.split(".")[0]) for n, p in bottom_up.named_parameters() if p.requires_grad}
    dim = cfg.MODEL.DFM.HEAD.HIDDEN_DIM
    return {
        name: StagePredictor(shapes[name].channels, dim, _head_maker(cfg, [shapes[name].stride])())
        for name in stages
        if name in learning
    }


def _dense_predictor(cfg, backbone, space: BoxSpace, criterion: BlockLoss) -> DensePredictor | None:
    dfm, head = cfg.MODEL.DFM, cfg.MODEL.DFM.HEAD
    learns = dfm.BACKBONE_UPDATE != "frozen" and any(p.requires_grad for p in backbone.parameters())
    if dfm.DENSE_WEIGHT == 0 or not learns:
        return None
    weights = {"cls_weight": dfm.DENSE_WEIGHT, "giou_weight": dfm.DENSE_WEIGHT}
    shapes = backbone.output_shape()
    return DensePredictor(
        dim=head.HIDDEN_DIM,
        num_classes=dfm.NUM_CLASSES,
        strides=[shapes[name].stride for name in head.IN_FEATURES],
        canonical_size=head.POOLER_CANONICAL_SIZE,
        space=space,
        criterion=dataclasses.replace(criterion, **weights, l1_weight=0.0, velocity_weight=0.0),
    )


def owners_in_bottom_up(bottom_up, stages: Sequence[str]) -> dict[str, str]:
    """{child of the backbone: stage whose block it belongs to}; the stem belongs to the first stage."""
    owner, waiting = {}, []
    for child, _ in bottom_up.named_children():
        waiting.append(child)
        if child in stages:
            owner |= dict.fromkeys(waiting, child)
            waiting = []
    return owner


def _head_maker(cfg, strides: Sequence[int]) -> Callable[[], FlowHead]:
    """Makes heads on levels of these strides, which share one pooler."""
    head, given = cfg.MODEL.DFM.HEAD, _lower(cfg.MODEL.DFM.HEAD)
    options = (head.POOLER_RESOLUTION, head.POOLER_SAMPLING_RATIO, head.POOLER_CANONICAL_SIZE)
    pooler = FeaturePooler([1.0 / stride for stride in strides], *options)
    names = ("num_heads", "feedforward_dim", "interaction", "dynamic_dim", "num_cls", "num_reg")
    sizes = {"num_classes": cfg.MODEL.DFM.NUM_CLASSES, "dim": head.HIDDEN_DIM}
    return partial(FlowHead, pooler=pooler, **sizes, **{name: given[name] for name in names})
