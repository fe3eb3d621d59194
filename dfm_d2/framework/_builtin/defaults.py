"""Default values of the Detectron2 config keys that dfm_d2 honours, under Detectron2's names.

A contract test holds that each key exists in the real Detectron2 with the same default.
"""

from dfm_d2.framework._builtin.config import CfgNode as CN


def get_cfg() -> CN:
    """Return a new config with the default values."""
    cfg = CN()
    cfg.VERSION = 2

    cfg.MODEL = CN()
    cfg.MODEL.DEVICE = "cuda"
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.WEIGHTS = ""
    # In the channel order of INPUT.FORMAT, on the 0-255 scale.
    cfg.MODEL.PIXEL_MEAN = [103.530, 116.280, 123.675]
    cfg.MODEL.PIXEL_STD = [1.0, 1.0, 1.0]

    cfg.MODEL.BACKBONE = CN()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 2  # 0: nothing, 1: the stem, 2: the stem and res2, ...

    cfg.MODEL.FPN = CN()
    cfg.MODEL.FPN.IN_FEATURES = []
    cfg.MODEL.FPN.OUT_CHANNELS = 256
    cfg.MODEL.FPN.NORM = ""
    cfg.MODEL.FPN.FUSE_TYPE = "sum"  # "sum" | "avg"

    cfg.MODEL.RESNETS = CN()
    cfg.MODEL.RESNETS.DEPTH = 50
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
    cfg.MODEL.RESNETS.NUM_GROUPS = 1
    cfg.MODEL.RESNETS.NORM = "FrozenBN"  # "FrozenBN" | "BN" | "GN" | ""
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 64
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = True  # True: MSRA weights; False: torchvision weights
    cfg.MODEL.RESNETS.RES5_DILATION = 1
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 256  # 64 for depth 18 and 34
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 64
    cfg.INPUT = CN()
    cfg.INPUT.MIN_SIZE_TRAIN = (800,)
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"  # "choice" | "range"
    cfg.INPUT.MAX_SIZE_TRAIN = 1333
    cfg.INPUT.MIN_SIZE_TEST = 800  # 0: no resize
    cfg.INPUT.MAX_SIZE_TEST = 1333
    cfg.INPUT.RANDOM_FLIP = "horizontal"  # "none" | "horizontal" | "vertical"
    cfg.INPUT.FORMAT = "BGR"

    cfg.DATASETS = CN()
    cfg.DATASETS.TRAIN = ()
    cfg.DATASETS.TEST = ()

    cfg.DATALOADER = CN()
    cfg.DATALOADER.NUM_WORKERS = 4
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    cfg.SOLVER = CN()
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupMultiStepLR"  # "WarmupMultiStepLR" | "WarmupCosineLR"
    cfg.SOLVER.MAX_ITER = 40000
    cfg.SOLVER.BASE_LR = 0.001
    cfg.SOLVER.BASE_LR_END = 0.0
    cfg.SOLVER.MOMENTUM = 0.9
    cfg.SOLVER.NESTEROV = False
    cfg.SOLVER.WEIGHT_DECAY = 0.0001
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.0
    cfg.SOLVER.WEIGHT_DECAY_BIAS = None  # None: WEIGHT_DECAY
    cfg.SOLVER.BIAS_LR_FACTOR = 1.0
    cfg.SOLVER.GAMMA = 0.1
    cfg.SOLVER.STEPS = (30000,)
    cfg.SOLVER.WARMUP_FACTOR = 1.0 / 1000
    cfg.SOLVER.WARMUP_ITERS = 1000
    cfg.SOLVER.WARMUP_METHOD = "linear"  # "linear" | "constant"
    cfg.SOLVER.RESCALE_INTERVAL = False
    cfg.SOLVER.CHECKPOINT_PERIOD = 5000
    cfg.SOLVER.IMS_PER_BATCH = 16
    cfg.SOLVER.AMP = CN()
    cfg.SOLVER.AMP.ENABLED = False

    cfg.TEST = CN()
    cfg.TEST.EVAL_PERIOD = 0  # iterations; 0: only after training
    cfg.TEST.DETECTIONS_PER_IMAGE = 100
    cfg.OUTPUT_DIR = "./output"
    cfg.SEED = -1  # negative: a random one
    cfg.CUDNN_BENCHMARK = False
    return cfg
