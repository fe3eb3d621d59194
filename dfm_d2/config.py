"""Every config key that dfm_d2 adds to Detectron2's, documented where it is added."""

from collections.abc import Sequence
from pathlib import Path

from dfm_d2.framework import CfgNode as CN
from dfm_d2.framework import get_cfg


def add_dfm_config(cfg: CN) -> None:
    """Add the keys of dfm_d2 to a Detectron2 config, in place.

    For those who embed us: ``cfg = get_cfg(); add_dfm_config(cfg); cfg.merge_from_file(path)``.
    """
    _add_data_keys(cfg)
    _add_solver_keys(cfg)
    _add_model_keys(cfg)
    _add_classifier_keys(cfg)


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line before the first word that is a config key, and from there on: KEY VALUE KEY VALUE ...

    An option that takes several words would take the overrides after it, too. A file that is there is no key.
    """
    cfg = get_cfg()
    add_dfm_config(cfg)
    keys = (i for i, word in enumerate(words) if word.split(".")[0] in cfg and not Path(word).exists())
    place = next(keys, len(words))
    return list(words[:place]), list(words[place:])


def _add_data_keys(cfg: CN) -> None:
    # A folder in VOC layout (Annotations/, ImageSets/Main/, JPEGImages/). The dataset names
    # `voc_root_<split>` in DATASETS.TRAIN / DATASETS.TEST read ImageSets/Main/<split>.txt of it.
    cfg.DATASETS.VOC_ROOT = ""
    # Class names in the order of their indices; empty: found in the annotations, sorted.
    cfg.DATASETS.CLASSES = []
    # COCO json by path: the names `coco_json_train` and `coco_json_val` read these.
    cfg.DATASETS.COCO_TRAIN_JSON = ""
    cfg.DATASETS.COCO_TRAIN_IMAGES = ""
    cfg.DATASETS.COCO_VAL_JSON = ""
    cfg.DATASETS.COCO_VAL_IMAGES = ""
    # A broken XML, a missing or truncated image, a box of zero area: "skip" counts and reports
    # them with their file names and goes on without them, "fatal" stops. Registration, before training,
    # finds all of it but truncated images that it did not decode (VERIFY_IMAGES).
    cfg.DATASETS.ON_ERROR = "skip"
    # Decode every image when a data set is registered, so that truncated files are known before training:
    # "auto" for sets of at most 2,000 images (headers only for larger ones), "always", "never".
    cfg.DATASETS.VERIFY_IMAGES = "auto"  # "auto" | "always" | "never"
    # Probability of the second branch of the DETR recipe: resize to one of CROP_RESIZE, crop a random
    # window of CROP_SIZE (least and greatest side in pixels), then the usual resize. 0 is off.
    cfg.INPUT.DETR_CROP = 0.0
    cfg.INPUT.CROP_RESIZE = (400, 500, 600)
    cfg.INPUT.CROP_SIZE = (384, 600)


def _add_solver_keys(cfg: CN) -> None:
    cfg.SOLVER.OPTIMIZER = "adamw"  # "adamw" | "sgd"
    # Learning-rate factor of the backbone (not of the FPN).
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    # Each block's gradient is clipped to this norm, by itself; 0 is off. (Detectron2's
    # SOLVER.CLIP_GRADIENTS would clip over all blocks, which local updates cannot know.)
    cfg.SOLVER.BLOCK_CLIP_NORM = 1.0
    # "auto": bfloat16 where the processor or GPU computes in it, else float32. With SOLVER.AMP.ENABLED only.
    cfg.SOLVER.AMP.DTYPE = "auto"  # "auto" | "bfloat16" | "float16"
    # Exponential moving average of the weights, evaluated and saved beside the weights; 0 is off.
    cfg.SOLVER.EMA_DECAY = 0.0
    # A line of progress and of metrics.json every so many iterations, each the median since the last one.
    cfg.SOLVER.LOG_PERIOD = 20
    # How many of the periodic checkpoints stay on the disk; 0: all.
    cfg.SOLVER.CHECKPOINTS_TO_KEEP = 2
    # Which AP is computed: "coco" (pycocotools), "voc07" (11 points), "voc" (area).
    cfg.TEST.AP = ("coco", "voc07", "voc")
    # Images in a batch of evaluation.
    cfg.TEST.BATCH_SIZE = 1
    # Keep the checkpoint that is best by this metric, for example "bbox/AP50"; empty: do not.
    cfg.TEST.BEST_METRIC = ""


def _add_model_keys(cfg: CN) -> None:
    cfg.MODEL.DFM = CN()
    dfm = cfg.MODEL.DFM
    # K. 0: taken from the training set's classes when tools/train_net.py sets up.
    dfm.NUM_CLASSES = 0
    # D, the number of predictors, each a block of local update.
    dfm.NUM_PREDICTORS = 4
    # N, the number of proposals, in training.
    dfm.NUM_PROPOSALS = 100
    # s of x = (2 b - 1) s (docs/math.md, equation 4).
    dfm.SIGNAL_SCALE = 2.0
    # Slots of x_1 that each ground-truth box fills at most; the others are background.
    dfm.GT_REPEAT = 2
    dfm.COUPLING = "optimal_transport"  # "optimal_transport" | "independent"
    dfm.ASSIGNMENT = "dynamic_k"  # "dynamic_k" | "path"
    # "partitioned": predictor floor(u D) answers at t(u); "shared": every predictor answers at every t.
    dfm.TIME = "partitioned"
    # r of t(u) = (1 - exp(-r u)) / (1 - exp(-r)): the intervals of partitioned time and the sampler's steps
    # are even in u. 0: even in t; more: the first predictor goes far and the later ones refine.
    dfm.TIME_RATE = 9.0
    # sigma: the inputs x_t of training lie on the path to x_1 + sigma (w, h, w, h) xi, xi ~ N(0, I), as those
    # of inference lie on the path to an endpoint that is not exact. Targets stay exact. 0: off.
    dfm.ENDPOINT_NOISE = 0.0
    # Share of the images on which predictor d + 1 trains, in place of the path, where a solver step of
    # predictor d's detached answer leads: the states of inference. No gradient crosses. TIME "partitioned".
    dfm.ON_POLICY = 1.0
    # Share of the images on which training starts at t = 0, as inference does; the others draw t.
    dfm.FROM_NOISE = 0.0
    # What a predictor's box branch answers: the endpoint x_1, or the velocity.
    dfm.PREDICTION = "endpoint"  # "endpoint" | "velocity"
    # How the D answers of TIME "shared" are averaged.
    dfm.AGGREGATION = "uniform"  # "uniform" | "confidence"
    # "triton": the kernels of docs/kernels.md, an error where one cannot run; "auto": for CUDA tensors that
    # they take. With either the sampler is one CUDA graph for each padded shape that comes back (but with
    # SAMPLER.RENEWAL_THRESH). "torch" stays the default until they have been measured on a GPU.
    dfm.KERNELS = "torch"  # "auto" | "torch" | "triton"
    # Who is updated when (docs/math.md, section 5). "parallel": on a GPU all predictors at once, batched,
    # with the memory of "joint"; if they train on-policy, after a pass without gradients.
    dfm.UPDATE = "sequential"  # "sequential" | "joint" | "parallel"
    # "frozen": the backbone (FPN included) neither learns nor moves the statistics of its batch norms.
    # "local": each stage of the ResNet is a block with a predictor of its own (in training only) and detached
    # input, the FPN the shared block. docs/results.md has what that costs.
    dfm.BACKBONE_UPDATE = "accumulate"  # "accumulate" | "frozen" | "local"
    # With UPDATE "parallel": processes that share out the predictors of the same images (docs/scaling.md). It
    # divides their number; 1: each process has all predictors.
    dfm.PREDICTOR_RANKS = 1
    # Step each block's optimizer right after its backward and free its gradients.
    dfm.STEP_IN_BACKWARD = False
    # Seed of noise and t in training; the sampler has its own.
    dfm.SEED = 0

    dfm.HEAD = CN()
    dfm.HEAD.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    dfm.HEAD.HIDDEN_DIM = 256
    dfm.HEAD.NUM_HEADS = 8
    dfm.HEAD.FEEDFORWARD_DIM = 2048
    # Box-feature interaction: Sparse R-CNN's dynamic convolution, cross-attention over the RoI grid, or one
    # linear layer over it (docs/results.md compares them).
    dfm.HEAD.INTERACTION = "dynamic_conv"  # "dynamic_conv" | "cross_attention" | "grid_linear"
    dfm.HEAD.DYNAMIC_DIM = 64
    # Hidden layers of the class and box towers.
    dfm.HEAD.NUM_CLS = 0
    dfm.HEAD.NUM_REG = 1
    dfm.HEAD.POOLER_RESOLUTION = 7
    dfm.HEAD.POOLER_SAMPLING_RATIO = 2
    # Side in pixels of a box that is pooled from the level of stride 16.
    dfm.HEAD.POOLER_CANONICAL_SIZE = 224
    # (w_x, w_y, w_w, w_h) by which box deltas are divided.
    dfm.HEAD.BOX_WEIGHTS = (2.0, 2.0, 1.0, 1.0)

    dfm.LOSS = CN()
    dfm.LOSS.CLS = "focal"  # "focal" | "quality_focal"
    dfm.LOSS.FOCAL_ALPHA = 0.25
    dfm.LOSS.FOCAL_GAMMA = 2.0
    dfm.LOSS.CLS_WEIGHT = 2.0
    dfm.LOSS.L1_WEIGHT = 5.0
    dfm.LOSS.GIOU_WEIGHT = 2.0
    # Weight of the velocity term, and its bound w_max on (1 - t)^-2.
    dfm.LOSS.VELOCITY_WEIGHT = 0.0
    dfm.LOSS.VELOCITY_MAX = 25.0

    # The sampler, all of it changeable at test time without retraining.
    dfm.SAMPLER = CN()
    # Heun's correction divides by 1 - t_next: a small TIME_RATE suits it best.
    dfm.SAMPLER.METHOD = "euler"  # "euler" | "heun"
    # K, the number of steps; 0: D for TIME "partitioned", 1 for "shared".
    dfm.SAMPLER.STEPS = 0
    # An explicit time grid from 0 to 1 (STEPS is then ignored); empty: uniform.
    dfm.SAMPLER.TIME_GRID = []
    dfm.SAMPLER.NUM_PROPOSALS = 0  # 0: as in training
    # Indices of the predictors that answer (TIME "shared" only); empty: all.
    dfm.SAMPLER.PREDICTORS = []
    dfm.SAMPLER.SEED = 0
    # Concatenate the detections of all steps instead of taking the last step's.
    dfm.SAMPLER.ENSEMBLE_STEPS = False
    # Run the sampler this many times from fresh noise and merge (the control of iteration).
    dfm.SAMPLER.NOISE_PASSES = 1
    # Replace proposals whose best score is below this by fresh noise after each step, per image; 0: off.
    dfm.SAMPLER.RENEWAL_THRESH = 0.0
    dfm.SAMPLER.SCORE_THRESH = 0.0
    dfm.SAMPLER.NMS_THRESH = 0.6  # per class; 0: off


def _add_classifier_keys(cfg: CN) -> None:
    """Keys of tools/train_classifier.py (docs/classification.md). Of MODEL.DFM classifiers use NUM_CLASSES,
    UPDATE, STEP_IN_BACKWARD, PREDICTION, LOSS.VELOCITY_MAX and SEED."""
    cfg.UPDATE = CN()
    # How a classifier learns; it chooses MODEL.META_ARCHITECTURE.
    cfg.UPDATE.METHOD = "flow"  # "flow" | "backprop" | "forward_forward" | "stochastic_forward_forward"
    # What the names `root_<split>` read: a folder or a tar of <split>/<class>/<image>, or a folder of idx
    # files (gzip or not). Where torchvision's CIFAR lies or is downloaded to.
    cfg.DATASETS.ROOT = ""
    # Share of the training images that is not trained on: the temperature of the probabilities is fitted
    # on it before each evaluation. 0: the temperature is LOSS.READOUT_TEMPERATURE.
    cfg.DATASETS.HOLD_OUT = 0.0
    # Side in pixels to which images are resized; 0: they are taken as they are, all of one size.
    cfg.INPUT.IMAGE_SIZE = 0
    # Greatest shift in pixels, in either direction, of a training image (edges are filled with zeros).
    cfg.INPUT.RANDOM_SHIFT = 0

    cfg.MODEL.CLASSIFIER = CN()
    c = cfg.MODEL.CLASSIFIER
    # "cnn": CNN.*; "resnet": Detectron2's, by MODEL.RESNETS; "timm": TIMM.*
    c.BACKBONE = "cnn"  # "cnn" | "resnet" | "timm"
    # The number of blocks, each of them consecutive stages of the backbone (of a ViT: layers); 0: one each.
    c.BLOCKS = 0
    # Side of the grid to which a block's output is averaged before its predictor (or head) sees it.
    c.POOL = 1
    c.CNN = CN()
    c.CNN.CHANNELS = (32, 64, 128)  # of each stage, a residual pair of 3x3 convolutions
    c.CNN.STRIDES = (1, 2, 2)
    c.CNN.NORM = "BN"  # "BN" | "GN"
    c.TIMM = CN()
    c.TIMM.NAME = "vit_tiny_patch16_224"
    # Options of timm's constructor, such as ["img_size=32", "patch_size=4", "depth=6"].
    c.TIMM.OPTIONS = []
    # Pretrained weights: empty for none, "hub" where there is a network, or a file of timm's state dict.
    c.TIMM.WEIGHTS = ""
    # x_1 of a class: fixed orthonormal, learned (normalised; by the read-out term), or EMBEDDING_FILE's rows.
    c.EMBEDDING = "orthonormal"  # "orthonormal" | "learned" | "given"
    c.EMBEDDING_FILE = ""  # a .npy or a text file of numbers, one row a class
    c.EMBED_DIM = 0  # E; 0: K, but at least 16
    c.RADIUS = 1.0  # length of an embedding; noise has length sqrt(E)
    c.HIDDEN_DIM = 128  # of a block's predictor
    # Points (x_0, t) of the path on which each image trains each block in a step.
    c.NOISE_SAMPLES = 4
    # p of t = u^p, u uniform. Near t = 1 the point gives the class away and features learn nothing; above 1
    # more points lie near the noise. The best velocity at a t does not depend on it.
    c.TIME_POWER = 3.0
    # A control: the velocity target is x_1 - x_0' x_0' the noise of another image: no transport.
    c.SHUFFLE_X0 = False

    c.LOSS = CN()
    # Weight of the endpoint error at t: min((1 - t)^-2, MODEL.DFM.LOSS.VELOCITY_MAX), or 1.
    c.LOSS.WEIGHTING = "plain"  # "velocity" | "plain"
    # Weight of the cross-entropy of reading out the endpoint, and the temperature of its logits.
    c.LOSS.READOUT_WEIGHT = 1.0
    c.LOSS.READOUT_TEMPERATURE = 0.1

    # Inference, changeable at test time without retraining.
    c.SAMPLER = CN()
    c.SAMPLER.METHOD = "euler"  # "euler" | "heun"
    # K. One step answers the mean over the classes that an image may have; with many steps and one sample the
    # flow draws one of them, which is less often right (docs/classification.md).
    c.SAMPLER.STEPS = 1
    c.SAMPLER.SAMPLES = 4  # M, the number of noise samples of an image
    c.SAMPLER.NOISE = 1.0  # standard deviation of the noise; 0 is a control
    c.SAMPLER.BLOCKS = []  # indices of the blocks that answer, negative from the last; empty: all
    # "velocity": blocks move one state by the mean of their velocities; "probability": each moves its own,
    # and the class probabilities are averaged.
    c.SAMPLER.AGGREGATION = "velocity"  # "velocity" | "probability"
    # The weight of a block in that mean: equal, or its own greatest class probability.
    c.SAMPLER.WEIGHTS = "confidence"  # "uniform" | "confidence"
    c.SAMPLER.SEED = 0

    c.FF = CN()
    # Hinton's Forward-Forward: an image is positive with the probability sigmoid(SHARPNESS (goodness -
    # THRESHOLD)); labels are added to images as waves of LABEL_SCALE standard deviations.
    c.FF.THRESHOLD = 1.0
    c.FF.SHARPNESS = 4.0
    c.FF.LABEL_SCALE = 1.0
    # The stochastic variant: noisy copies of an image, the noise on a block's input, and the weight of the
    # dimension of the copies against that of the batch.
    c.FF.COPIES = 4
    c.FF.NOISE = 0.3
    c.FF.COPY_WEIGHT = 1.0
