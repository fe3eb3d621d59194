"""The detector's config keys, besides those of any training, and what its values must be together."""

from collections.abc import Iterator, Mapping
from typing import Any

from dfm_d2.engine.keys import Key, lookup
from dfm_d2.errors import UserError

KEYS = (
    Key("MODEL.META_ARCHITECTURE", choices=("FlowDetector", "CascadeDetector")),
    Key("MODEL.PIXEL_MEAN", lengths=(3,)),
    Key("MODEL.FPN.IN_FEATURES", of=str),
    Key("MODEL.FPN.OUT_CHANNELS", least=1),
    Key("MODEL.RESNETS.NUM_GROUPS", least=1),
    Key("MODEL.RESNETS.RES2_OUT_CHANNELS", least=1),
    Key("MODEL.RESNETS.STEM_OUT_CHANNELS", least=1),
    Key("MODEL.RESNETS.WIDTH_PER_GROUP", least=1),
    # ---- data
    # An alias of DATASETS.ROOT. The names `voc_root_<split>` read exactly ImageSets/Main/<split>.txt of it.
    Key("DATASETS.VOC_ROOT", ""),
    # COCO json by path: the names `coco_json_train` and `coco_json_val` read these.
    Key("DATASETS.COCO_TRAIN_JSON", ""),
    Key("DATASETS.COCO_TRAIN_IMAGES", ""),
    Key("DATASETS.COCO_VAL_JSON", ""),
    Key("DATASETS.COCO_VAL_IMAGES", ""),
    # 0: no resize. Empty: it, MIN_SIZE_TEST and the two MAX_SIZE are chosen from the training set.
    Key("INPUT.MIN_SIZE_TRAIN", least=0, of=int),
    Key("INPUT.MIN_SIZE_TRAIN_SAMPLING", choices=("choice", "range")),
    Key("INPUT.MAX_SIZE_TRAIN", least=1),
    Key("INPUT.MIN_SIZE_TEST", least=0),
    Key("INPUT.MAX_SIZE_TEST", least=1),
    Key("INPUT.RANDOM_FLIP", choices=("none", "horizontal", "vertical")),
    # Probability of the second branch of the DETR recipe: resize to one of CROP_RESIZE, crop a random window
    # of CROP_SIZE (least and greatest side in pixels), then the usual resize. 0 is off.
    Key("INPUT.DETR_CROP", 0.0, least=0, most=1),
    Key("INPUT.CROP_RESIZE", (400, 500, 600), least=1, of=int, filled=True),
    Key("INPUT.CROP_SIZE", (384, 600), least=1, of=int, lengths=(2,)),
    # ---- the flow
    # D, the number of predictors, each a block of local update.
    Key("MODEL.DFM.NUM_PREDICTORS", 4, least=1),
    # N, the number of proposals, in training; 0: chosen from the training set.
    Key("MODEL.DFM.NUM_PROPOSALS", 100, least=0),
    # s of x = (2 b - 1) s (docs/math.md, equation 4).
    Key("MODEL.DFM.SIGNAL_SCALE", 2.0, above=0, most=1000),
    # Slots of x_1 that each ground-truth box fills at most; the others are background.
    Key("MODEL.DFM.GT_REPEAT", 2, least=1),
    Key("MODEL.DFM.COUPLING", "optimal_transport", choices=("optimal_transport", "independent")),
    Key("MODEL.DFM.ASSIGNMENT", "dynamic_k", choices=("dynamic_k", "path")),
    # S, the intervals of the warped time u, even ones; each has D / S predictors, which are trained on it and
    # average their velocities in it. 1: an ensemble, all answer at every time; D, or 0: a chain.
    Key("MODEL.DFM.INTERVALS", 0, least=0),
    # r of t(u) = (1 - exp(-r u)) / (1 - exp(-r)): the intervals and the sampler's steps are even in u. 0:
    # even in t; more: the first predictors go far and the later ones refine. Above 12 the last intervals
    # would be empty in float32.
    Key("MODEL.DFM.TIME_RATE", 9.0, least=0, most=12),
    # R, the states of an interval that its predictors train at, each image at one of them: where solver steps
    # along detached answers lead, of the intervals before and, for R > 1, of their own. No gradient crosses.
    # 0: on the path.
    Key("MODEL.DFM.ROLLOUT", 1, least=0),
    # How the answers of an interval are averaged.
    # ---- the heads
    Key("MODEL.DFM.HEAD.IN_FEATURES", ["p2", "p3", "p4", "p5"], filled=True),
    Key("MODEL.DFM.HEAD.HIDDEN_DIM", 256, least=1),
    Key("MODEL.DFM.HEAD.NUM_HEADS", 8, least=1),
    Key("MODEL.DFM.HEAD.FEEDFORWARD_DIM", 2048, least=1),
    # Box-feature interaction: Sparse R-CNN's dynamic convolution, or one linear layer over the RoI grid
    # (docs/results.md compares them).
    Key(
        "MODEL.DFM.HEAD.INTERACTION",
        "dynamic_conv",
        choices=("dynamic_conv", "grid_linear"),
        gone={"cross_attention": "it lost to both others and was removed: train with one of them"},
    ),
    Key("MODEL.DFM.HEAD.DYNAMIC_DIM", 64, least=1),
    # Hidden layers of the class and box towers.
    Key("MODEL.DFM.HEAD.NUM_CLS", 0, least=0),
    Key("MODEL.DFM.HEAD.NUM_REG", 1, least=0),
    Key("MODEL.DFM.HEAD.POOLER_RESOLUTION", 7, least=1),
    Key("MODEL.DFM.HEAD.POOLER_SAMPLING_RATIO", 2, least=0),
    # Side in pixels of a box that is pooled from the level of stride 16.
    Key("MODEL.DFM.HEAD.POOLER_CANONICAL_SIZE", 224, least=1),
    # (w_x, w_y, w_w, w_h) by which box deltas are divided.
    Key("MODEL.DFM.HEAD.BOX_WEIGHTS", (2.0, 2.0, 1.0, 1.0), above=0, lengths=(4,)),
    # ---- the loss
    # Of the matching cost alone: the class loss is the quality focal loss, which has none.
    Key("MODEL.DFM.LOSS.FOCAL_ALPHA", 0.25, above=0, below=1),
    Key("MODEL.DFM.LOSS.FOCAL_GAMMA", 2.0, least=0),
    Key("MODEL.DFM.LOSS.CLS_WEIGHT", 2.0, least=0),
    Key("MODEL.DFM.LOSS.L1_WEIGHT", 5.0, least=0),
    Key("MODEL.DFM.LOSS.GIOU_WEIGHT", 2.0, least=0),
    Key("MODEL.DFM.LOSS.VELOCITY_WEIGHT", 0.0, least=0),
    # The bound w_max on (1 - t)^-2, by which the error of a velocity weighs that of its endpoint.
    Key("MODEL.DFM.LOSS.VELOCITY_MAX", 25.0, least=0),
    # Of the class and the GIoU term of what the shared block loses by itself, in training only (docs/math.md,
    # section 5): every cell of the heads' levels answers for the object at whose centre it lies. 0: nothing,
    # as with a frozen backbone.
    Key("MODEL.DFM.DENSE_WEIGHT", 0.0, least=0),
    # ---- the sampler, all of it changeable at test time without retraining
    # K, the number of steps; 0: one an interval.
    Key("MODEL.DFM.SAMPLER.STEPS", 0, least=0),
    Key("MODEL.DFM.SAMPLER.NUM_PROPOSALS", 0, least=0),  # 0: as in training, or chosen with it
    # Which of the D / S predictors of every interval answer, from 0; empty: all.
    Key("MODEL.DFM.SAMPLER.MEMBERS", [], of=int, least=0),
    Key("MODEL.DFM.SAMPLER.SEED", 0),
    # Run the sampler this many times from fresh noise and merge (the control of iteration).
    Key("MODEL.DFM.SAMPLER.NOISE_PASSES", 1, least=1),
    Key("MODEL.DFM.SAMPLER.SCORE_THRESH", 0.0),
    Key("MODEL.DFM.SAMPLER.NMS_THRESH", 0.6, least=0, most=1),  # IoU, per class; 0: off
    # ---- evaluation
    Key("TEST.DETECTIONS_PER_IMAGE", least=1),
)

# Keys that say what the weights mean and that their names and shapes do not show.
_OF_HEADS = "IN_FEATURES BOX_WEIGHTS POOLER_CANONICAL_SIZE"
MEANING = (
    *(f"MODEL.DFM.{name}" for name in "PREDICTION SIGNAL_SCALE INTERVALS TIME_RATE".split()),
    *(f"MODEL.DFM.HEAD.{name}" for name in _OF_HEADS.split()),
)


def meant(config: Mapping[str, Any], key: str) -> Any:
    """What a key of a config says about the weights; None: nothing."""
    value = lookup(config, key)
    if key == "MODEL.DFM.INTERVALS" and value == 0:
        return lookup(config, "MODEL.DFM.NUM_PREDICTORS")
    if key == "MODEL.DFM.ROLLOUT" and value is not None:
        return min(value, 1)  # above 0 queries cross
    return value


_ROLLOUT = "MODEL.DFM.ROLLOUT trains at the states of inference"
_OF_CLASSIFIERS = (..., "classifiers have it")
# What config files of earlier versions have, as `merge_config_file` takes it.
REMOVED = {
    "MODEL.DFM.TIME": ("partitioned", "MODEL.DFM.INTERVALS is 0 for 'partitioned' and 1 for 'shared'"),
    "MODEL.DFM.SAMPLER.PREDICTORS": ([], "MODEL.DFM.SAMPLER.MEMBERS chooses predictors of every interval"),
    "MODEL.DFM.SAMPLER.METHOD": ("euler", "Heun's steps lost, at nearly twice the evaluations"),
    "MODEL.DFM.AGGREGATION": ("uniform", "members answer their mean; weights by confidence gained nothing"),
    "MODEL.DFM.ON_POLICY": (1.0, "MODEL.DFM.ROLLOUT 0 trains on the path"),
    "MODEL.DFM.LOSS.CLS": (..., "the class loss is the quality focal loss, which was better by 3 AP50"),
    "MODEL.DFM.ENDPOINT_NOISE": (0.0, _ROLLOUT),
    "MODEL.DFM.FROM_NOISE": (0.0, _ROLLOUT),
    "MODEL.DFM.SAMPLER.ENSEMBLE_STEPS": (False, "MODEL.DFM.SAMPLER.NOISE_PASSES merges several passes"),
    "MODEL.DFM.SAMPLER.RENEWAL_THRESH": (0.0, "MODEL.DFM.SAMPLER.NUM_PROPOSALS gives more proposals"),
    "MODEL.DFM.PREDICTION": ("endpoint", "predictors answer the endpoint, which was better by 8 AP50"),
    "MODEL.DFM.SAMPLER.TIME_GRID": ([], "MODEL.DFM.SAMPLER.STEPS are even in the warped time"),
    "TEST.AP": (..., "every AP is computed"),
    "INPUT.IMAGE_SIZE": _OF_CLASSIFIERS,
    "INPUT.RANDOM_SHIFT": _OF_CLASSIFIERS,
    "MODEL.CLASSIFIER": _OF_CLASSIFIERS,
    "UPDATE": _OF_CLASSIFIERS,
}


def problems(cfg) -> Iterator[str]:
    """One error message for each value that cannot work together with others; each by itself is allowed."""
    dfm, sizes = cfg.MODEL.DFM, tuple(cfg.INPUT.MIN_SIZE_TRAIN)
    head, loss, sampler = dfm.HEAD, dfm.LOSS, dfm.SAMPLER
    members, count = list(sampler.MEMBERS), dfm.NUM_PREDICTORS
    intervals = dfm.INTERVALS or count
    if cfg.MODEL.META_ARCHITECTURE == "CascadeDetector":
        if dfm.UPDATE != "joint":
            yield f"MODEL.DFM.UPDATE is {dfm.UPDATE!r}, but gradients cross a CascadeDetector: set joint."
        if dfm.BACKBONE_UPDATE == "local":
            yield "MODEL.DFM.BACKBONE_UPDATE local is for FlowDetector, not CascadeDetector: set accumulate."
        if dfm.INTERVALS or members:
            yield "CascadeDetector asks all its heads: leave MODEL.DFM.INTERVALS and SAMPLER.MEMBERS alone."
    elif count % intervals:
        yield f"MODEL.DFM.NUM_PREDICTORS is {count}; it must be a multiple of INTERVALS {intervals}."
    elif any(e >= count // intervals for e in members):
        most = count // intervals - 1
        yield f"MODEL.DFM.SAMPLER.MEMBERS is {members}; an interval's predictors go from 0 to {most}."
    if dfm.PREDICTOR_RANKS > dfm.NUM_PREDICTORS:
        yield f"MODEL.DFM.PREDICTOR_RANKS is above NUM_PREDICTORS {dfm.NUM_PREDICTORS}: give each rank one."
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and len(sizes) != 2:
        yield f"INPUT.MIN_SIZE_TRAIN is {sizes}, but MIN_SIZE_TRAIN_SAMPLING range wants (low, high)."
    if cfg.INPUT.DETR_CROP and cfg.INPUT.CROP_SIZE[0] > cfg.INPUT.CROP_SIZE[1]:
        yield f"INPUT.CROP_SIZE is {cfg.INPUT.CROP_SIZE}; it must be (least, greatest)."
    if 0 < loss.FOCAL_GAMMA < 1:  # the gradient of a saturated class would be infinite
        yield f"MODEL.DFM.LOSS.FOCAL_GAMMA is {loss.FOCAL_GAMMA}; set 0 or at least 1."
    if not any(loss[name] for name in ("CLS_WEIGHT", "L1_WEIGHT", "GIOU_WEIGHT", "VELOCITY_WEIGHT")):
        yield "MODEL.DFM.LOSS has no weight above 0: set one of CLS_WEIGHT, L1_WEIGHT, GIOU_WEIGHT."
    if head.HIDDEN_DIM % head.NUM_HEADS:
        yield f"MODEL.DFM.HEAD.NUM_HEADS is {head.NUM_HEADS}; it must divide HIDDEN_DIM {head.HIDDEN_DIM}."
    if sampler.NMS_THRESH == 0 and sampler.NOISE_PASSES > 1:
        yield "MODEL.DFM.SAMPLER.NMS_THRESH is 0, but NOISE_PASSES merges detections by NMS: set it to 0.6."
    if len(set(members)) < len(members):
        yield f"MODEL.DFM.SAMPLER.MEMBERS is {members}; name each predictor once."


def check_start(cfg) -> None:
    """UserError if training from scratch (``MODEL.WEIGHTS`` empty) would leave random layers untrained."""
    norms = cfg.MODEL.RESNETS.NORM == "FrozenBN", "MODEL.RESNETS.NORM BN or GN"
    weights = cfg.MODEL.WEIGHTS
    if "timm" in cfg.MODEL.BACKBONE.NAME:
        norms = cfg.MODEL.TIMM.FROZEN_NORM, "MODEL.TIMM.FROZEN_NORM False"
        weights = weights or cfg.MODEL.TIMM.WEIGHTS
    frozen = (
        norms,
        (cfg.MODEL.BACKBONE.FREEZE_AT > 0, "MODEL.BACKBONE.FREEZE_AT 0"),
        (cfg.MODEL.DFM.BACKBONE_UPDATE == "frozen", "MODEL.DFM.BACKBONE_UPDATE accumulate"),
    )
    for is_frozen, remedy in frozen:
        if is_frozen and not weights:
            raise UserError(f"Random layers would stay frozen: set {remedy}, or give MODEL.WEIGHTS.")
