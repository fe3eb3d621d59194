"""The config node, the default config and the `@configurable` decorator."""

import functools
import inspect

from fvcore.common.config import CfgNode as _CfgNode

from dfm_d2.framework._builtin.utils import PathManager
from dfm_d2.framework._config_files import merge_config_file

# The keys of Detectron2 that dfm_d2 honours, under its names and with its defaults.
_DEFAULTS = {
    "VERSION": 2,
    "OUTPUT_DIR": "./output",
    "SEED": -1,  # negative: a random one
    "CUDNN_BENCHMARK": False,
    "MODEL": {
        "DEVICE": "cuda",
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "WEIGHTS": "",
        # In the channel order of INPUT.FORMAT, on the 0-255 scale.
        "PIXEL_MEAN": [103.530, 116.280, 123.675],
        "PIXEL_STD": [1.0, 1.0, 1.0],
        # FREEZE_AT 0: nothing, 1: the stem, 2: the stem and res2, ...
        "BACKBONE": {"NAME": "build_resnet_backbone", "FREEZE_AT": 2},
        # FUSE_TYPE: "sum" | "avg"
        "FPN": {"IN_FEATURES": [], "OUT_CHANNELS": 256, "NORM": "", "FUSE_TYPE": "sum"},
        "RESNETS": {
            "DEPTH": 50,
            "OUT_FEATURES": ["res4"],
            "NUM_GROUPS": 1,
            "NORM": "FrozenBN",  # "FrozenBN" | "BN" | "GN" | ""
            "WIDTH_PER_GROUP": 64,
            "STRIDE_IN_1X1": True,  # True: MSRA weights; False: torchvision weights
            "RES2_OUT_CHANNELS": 256,  # 64 for depth 18 and 34
            "STEM_OUT_CHANNELS": 64,
        },
    },
    "INPUT": {
        "MIN_SIZE_TRAIN": (800,),
        "MIN_SIZE_TRAIN_SAMPLING": "choice",  # "choice" | "range"
        "MAX_SIZE_TRAIN": 1333,
        "MIN_SIZE_TEST": 800,  # 0: no resize
        "MAX_SIZE_TEST": 1333,
        "RANDOM_FLIP": "horizontal",  # "none" | "horizontal" | "vertical"
        "FORMAT": "BGR",
    },
    "DATASETS": {"TRAIN": (), "TEST": ()},
    "DATALOADER": {"NUM_WORKERS": 4, "FILTER_EMPTY_ANNOTATIONS": True},
    "SOLVER": {
        "LR_SCHEDULER_NAME": "WarmupMultiStepLR",  # "WarmupMultiStepLR" | "WarmupCosineLR"
        "MAX_ITER": 40000,
        "BASE_LR": 0.001,
        "BASE_LR_END": 0.0,
        "MOMENTUM": 0.9,
        "NESTEROV": False,
        "WEIGHT_DECAY": 0.0001,
        "WEIGHT_DECAY_NORM": 0.0,
        "WEIGHT_DECAY_BIAS": None,  # None: WEIGHT_DECAY
        "BIAS_LR_FACTOR": 1.0,
        "GAMMA": 0.1,
        "STEPS": (30000,),
        "WARMUP_FACTOR": 1.0 / 1000,
        "WARMUP_ITERS": 1000,
        "WARMUP_METHOD": "linear",  # "linear" | "constant"
        "RESCALE_INTERVAL": False,
        "CHECKPOINT_PERIOD": 5000,
        "IMS_PER_BATCH": 16,
        "AMP": {"ENABLED": False},
    },
    "TEST": {"EVAL_PERIOD": 0, "DETECTIONS_PER_IMAGE": 100},  # EVAL_PERIOD 0: only after training
}


class CfgNode(_CfgNode):
    """fvcore's config node, opened through PathManager. No code from a file is ever run."""

    @classmethod
    def _open_cfg(cls, filename):
        return PathManager.open(filename, "r")

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """As `merge_config_file`; ValueError for `allow_unsafe`, with which a file could run code."""
        if allow_unsafe:
            raise ValueError("allow_unsafe must be False: no code from a config file is ever run")
        merge_config_file(self, cfg_filename)


def get_cfg() -> CfgNode:
    """A new config with the default values."""
    return CfgNode(_DEFAULTS)


def configurable(init_func):
    """Let an `__init__` be called with a config: the class has a classmethod `from_config(cfg, ...)` that
    returns its keyword arguments. Keywords of the call that `from_config` does not take win over these."""

    @functools.wraps(init_func)
    def wrapped(self, *args, **kwargs):
        if isinstance(args[0] if args else kwargs.get("cfg"), _CfgNode):
            taken = inspect.signature(type(self).from_config).parameters
            own = {name: kwargs.pop(name) for name in kwargs.keys() - taken.keys()}
            args, kwargs = (), type(self).from_config(*args, **kwargs) | own
        init_func(self, *args, **kwargs)

    return wrapped
