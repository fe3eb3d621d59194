"""The classifier's config keys, besides those of any training, and what its values must be together."""

from collections.abc import Iterator

from dfm_d2.engine.keys import Key

# The meta-architecture of every UPDATE.METHOD.
METHODS = {
    "flow": "FlowClassifier",
    "backprop": "BackpropClassifier",
    "deep_supervision": "BackpropClassifier",
    "forward_forward": "ForwardForwardClassifier",
}
_STOCHASTIC = "the stochastic Forward-Forward lost everywhere and is gone (docs/classification.md)"
_STEPS = "a classifier answers in one step, more were worth nothing (docs/classification.md)"

KEYS = (
    # How a classifier learns; it chooses MODEL.META_ARCHITECTURE.
    Key("UPDATE.METHOD", "flow", choices=tuple(METHODS), gone={"stochastic_forward_forward": _STOCHASTIC}),
    Key("MODEL.PIXEL_MEAN", lengths=(1, 3)),
    # ---- data
    # Side in pixels to which images are resized; 0: they are taken as they are, all of one size.
    Key("INPUT.IMAGE_SIZE", 0, least=0),
    # Greatest shift in pixels, in either direction, of a training image (edges are filled with zeros).
    Key("INPUT.RANDOM_SHIFT", 0, least=0),
    Key("INPUT.RANDOM_FLIP", choices=("none", "horizontal")),
    # ---- the model
    # "cnn": CNN.*; "timm": MODEL.TIMM.*
    Key(
        "MODEL.CLASSIFIER.BACKBONE",
        "cnn",
        choices=("cnn", "timm"),
        gone={"resnet": "it was removed: take timm"},
    ),
    # The number of blocks, each of them consecutive stages of the backbone (of a ViT: layers); 0: one each.
    Key("MODEL.CLASSIFIER.BLOCKS", 0, least=0),
    # Side of the grid to which a block's output is averaged before its predictor (or head) sees it.
    Key("MODEL.CLASSIFIER.POOL", 1, least=1),
    # Of each stage, a residual pair of 3x3 convolutions.
    Key("MODEL.CLASSIFIER.CNN.CHANNELS", (32, 64, 128), least=1, of=int, filled=True),
    Key("MODEL.CLASSIFIER.CNN.STRIDES", (1, 2, 2), least=1, of=int),
    Key("MODEL.CLASSIFIER.CNN.NORM", "BN", choices=("BN", "GN")),
    # x_1 of a class: fixed orthonormal, or learned (normalised; by the read-out term).
    Key("MODEL.CLASSIFIER.EMBEDDING", "orthonormal", choices=("orthonormal", "learned")),
    Key("MODEL.CLASSIFIER.EMBED_DIM", 0, least=0),  # E; 0: K, but at least 16
    Key("MODEL.CLASSIFIER.RADIUS", 1.0, above=0),  # length of an embedding; noise has length sqrt(E)
    Key("MODEL.CLASSIFIER.HIDDEN_DIM", 128, least=2),  # of a block's predictor
    # Points (x_0, t) of the path on which each image trains each block in a step.
    Key("MODEL.CLASSIFIER.NOISE_SAMPLES", 4, least=1),
    # p of t = u^p, u uniform. Near t = 1 the point gives the class away and features learn nothing; above 1
    # more points lie near the noise. The best velocity at a t does not depend on it.
    Key("MODEL.CLASSIFIER.TIME_POWER", 3.0, above=0),
    # A control: the velocity target is x_1 - x_0', x_0' the noise of another image: no transport.
    Key("MODEL.CLASSIFIER.SHUFFLE_X0", False),
    # Weight of the cross-entropy of reading out the endpoint, and the temperature of its logits.
    Key("MODEL.CLASSIFIER.LOSS.READOUT_WEIGHT", 1.0, least=0),
    Key("MODEL.CLASSIFIER.LOSS.READOUT_TEMPERATURE", 0.1, above=0),
    # ---- inference, changeable at test time without retraining: one step, from noise to the mean over the
    # classes that an image may have
    Key("MODEL.CLASSIFIER.SAMPLER.SAMPLES", 4, least=1),  # M, the number of noise samples of an image
    Key("MODEL.CLASSIFIER.SAMPLER.NOISE", 1.0, least=0),  # standard deviation of the noise; 0 is a control
    # Indices of the blocks that answer, negative from the last; empty: all.
    Key("MODEL.CLASSIFIER.SAMPLER.BLOCKS", [], of=int),
    # The weight of a block in the mean velocity: equal, or its own greatest class probability.
    Key("MODEL.CLASSIFIER.SAMPLER.WEIGHTS", "confidence", choices=("uniform", "confidence")),
    Key("MODEL.CLASSIFIER.SAMPLER.SEED", 0),
    # ---- Hinton's Forward-Forward: an image is positive with the probability sigmoid(SHARPNESS (goodness -
    # THRESHOLD)); labels are added to images as waves of LABEL_SCALE standard deviations.
    Key("MODEL.CLASSIFIER.FF.THRESHOLD", 1.0, above=0),
    Key("MODEL.CLASSIFIER.FF.SHARPNESS", 4.0, above=0),
    Key("MODEL.CLASSIFIER.FF.LABEL_SCALE", 1.0, least=0),
)

# Of earlier config files, as `merge_config_file` takes it.
_OF_DETECTORS = {
    "DATASETS": "COCO_TRAIN_IMAGES COCO_TRAIN_JSON COCO_VAL_IMAGES COCO_VAL_JSON VOC_ROOT",
    "INPUT": "CROP_RESIZE CROP_SIZE DETR_CROP",
    "TEST": "AP",
    "MODEL.DFM": "AGGREGATION ASSIGNMENT COUPLING ENDPOINT_NOISE FROM_NOISE GT_REPEAT NUM_PREDICTORS "
    "NUM_PROPOSALS ON_POLICY SIGNAL_SCALE TIME TIME_RATE",
    "MODEL.DFM.HEAD": "BOX_WEIGHTS DYNAMIC_DIM FEEDFORWARD_DIM HIDDEN_DIM INTERACTION IN_FEATURES NUM_CLS "
    "NUM_HEADS NUM_REG POOLER_CANONICAL_SIZE POOLER_RESOLUTION POOLER_SAMPLING_RATIO",
    "MODEL.DFM.LOSS": "CLS CLS_WEIGHT FOCAL_ALPHA FOCAL_GAMMA GIOU_WEIGHT L1_WEIGHT VELOCITY_MAX "
    "VELOCITY_WEIGHT",
    "MODEL.DFM.SAMPLER": "ENSEMBLE_STEPS METHOD NMS_THRESH NOISE_PASSES NUM_PROPOSALS PREDICTORS "
    "RENEWAL_THRESH SCORE_THRESH SEED STEPS TIME_GRID",
}
REMOVED = {
    f"{section}.{name}": (..., "detectors have it")
    for section, names in _OF_DETECTORS.items()
    for name in names.split()
} | {
    "MODEL.CLASSIFIER.EMBEDDING_FILE": ("", "choose MODEL.CLASSIFIER.EMBEDDING orthonormal or learned"),
    "MODEL.CLASSIFIER.TIMM": (
        {"NAME": "vit_tiny_patch16_224", "OPTIONS": [], "WEIGHTS": ""},
        "it is MODEL.TIMM now, which detectors have, too",
    ),
    "MODEL.CLASSIFIER.FF.COPIES": (4, _STOCHASTIC),
    "MODEL.CLASSIFIER.FF.NOISE": (0.3, _STOCHASTIC),
    "MODEL.CLASSIFIER.FF.COPY_WEIGHT": (1.0, _STOCHASTIC),
    "MODEL.DFM.PREDICTION": ("endpoint", "predictors answer the endpoint"),
    "MODEL.CLASSIFIER.LOSS.WEIGHTING": ("plain", "the endpoint error weighs the same at every t"),
    "MODEL.CLASSIFIER.SAMPLER.STEPS": (1, _STEPS),
    "MODEL.CLASSIFIER.SAMPLER.METHOD": ("euler", _STEPS),
    "MODEL.CLASSIFIER.SAMPLER.AGGREGATION": ("velocity", "blocks move one state by their mean velocity"),
}


def choose_method(cfg) -> None:
    """Set MODEL.META_ARCHITECTURE, and what goes with it, by UPDATE.METHOD.

    A method whose blocks depend on each other is updated jointly, whatever MODEL.DFM.UPDATE says.
    """
    method = cfg.UPDATE.METHOD
    if method in METHODS:
        cfg.MODEL.META_ARCHITECTURE = METHODS[method]
    if METHODS.get(method) == "BackpropClassifier":
        cfg.MODEL.DFM.UPDATE = "joint"
        cfg.MODEL.DFM.STEP_IN_BACKWARD = False


def problems(cfg) -> Iterator[str]:
    """One error message for each value that cannot work together with others; each by itself is allowed."""
    c, dfm, method = cfg.MODEL.CLASSIFIER, cfg.MODEL.DFM, cfg.UPDATE.METHOD
    channels, strides, named = list(c.CNN.CHANNELS), list(c.CNN.STRIDES), list(c.SAMPLER.BLOCKS)
    size, shift, architecture = cfg.INPUT.IMAGE_SIZE, cfg.INPUT.RANDOM_SHIFT, cfg.MODEL.META_ARCHITECTURE
    if architecture != METHODS[method]:
        yield f"MODEL.META_ARCHITECTURE is {architecture}; leave it to UPDATE.METHOD {method}."
    if dfm.BACKBONE_UPDATE != "accumulate":
        yield "MODEL.DFM.BACKBONE_UPDATE is for detectors, all classifiers are local: leave it at accumulate."
    if dfm.PREDICTOR_RANKS > 1:
        yield f"MODEL.DFM.PREDICTOR_RANKS is {dfm.PREDICTOR_RANKS}; a classifier has no predictors to share."
    if c.HIDDEN_DIM % 2:
        yield f"MODEL.CLASSIFIER.HIDDEN_DIM is {c.HIDDEN_DIM}; it must be even."
    if c.EMBEDDING == "learned" and c.LOSS.READOUT_WEIGHT == 0:  # nothing else would keep classes apart
        yield "MODEL.CLASSIFIER.EMBEDDING learned needs LOSS.READOUT_WEIGHT above 0."
    if len(channels) != len(strides):
        yield f"MODEL.CLASSIFIER.CNN.CHANNELS is {channels}, STRIDES {strides}; give both for each stage."
    if len(set(named)) < len(named):
        yield f"MODEL.CLASSIFIER.SAMPLER.BLOCKS is {named}; name each block once (empty: all)."
    if c.SHUFFLE_X0 and cfg.SOLVER.IMS_PER_BATCH < 2:  # one image has no other's noise
        yield "MODEL.CLASSIFIER.SHUFFLE_X0 needs SOLVER.IMS_PER_BATCH of at least 2."
    if 0 < size <= shift:
        yield f"INPUT.RANDOM_SHIFT is {shift}; it must be less than INPUT.IMAGE_SIZE {size}."
