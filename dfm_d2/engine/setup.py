"""From a command line to a run that is ready: config, device, folder, log, seed, data sets, classes."""

import argparse
import logging
from pathlib import Path

import torch
from dfm_kernels import kernels, use_triton

from dfm_d2 import __version__
from dfm_d2.engine.log import start_log
from dfm_d2.engine.precision import resolve_amp_dtype
from dfm_d2.engine.task import Task
from dfm_d2.errors import input_errors
from dfm_d2.framework import (
    PROVIDER,
    CfgNode,
    MetadataCatalog,
    comm,
    get_cfg,
    merge_config_file,
    merge_config_opts,
    seed_all_rng,
)
from dfm_d2.local_update.updates import build_update

_logger = logging.getLogger(__name__)


def load_config(task: Task, config_file: str, opts: list[str]) -> CfgNode:
    """Detectron2's defaults, the task's keys, the file and the KEY VALUE overrides, in this order.

    Runs no code from the file. Raises UserError naming the file and the key that is wrong.
    """
    cfg = get_cfg()
    task.add_config(cfg)
    with input_errors():
        if config_file:
            merge_config_file(cfg, config_file)
        merge_config_opts(cfg, opts)
        task.complete(cfg)
    return cfg


def setup_run(task: Task, cfg: CfgNode, args: argparse.Namespace) -> list[str]:
    """Make ready what a training or an evaluation needs; ``cfg`` is completed in place, then frozen.

    Returns the class names in the order of their indices. Raises UserError, one sentence, for bad values and
    missing data.
    """
    with input_errors():
        validate_config(task, cfg)
        resolve_device(cfg, explicit="MODEL.DEVICE" in (args.opts or [])[0::2])
        with kernels(cfg.MODEL.DFM.KERNELS):
            use_triton("MODEL.DFM.KERNELS", torch.empty(0, device=torch.device(cfg.MODEL.DEVICE)))
        resolve_amp_dtype(cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE, torch.device(cfg.MODEL.DEVICE))
        Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    start_log(cfg.OUTPUT_DIR, comm.is_main_process())
    _logger.info("dfm_d2 %s, torch %s, framework: %s", __version__, torch.__version__, PROVIDER)
    _logger.info(
        "device %s, %d threads (OMP_NUM_THREADS sets them; a resume is bit for bit with the same number)",
        cfg.MODEL.DEVICE,
        torch.get_num_threads(),
    )
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    with input_errors():
        task.register(cfg)
        classes = resolve_classes(cfg)
    cfg.freeze()
    return classes


def validate_config(task: Task, cfg: CfgNode) -> None:
    """ValueError for the first value that cannot work: the message names the key and the choices."""
    for message in task.problems(cfg):
        raise ValueError(message)
    dfm = cfg.MODEL.DFM
    if dfm.PREDICTOR_RANKS == 1:
        build_update(dfm.UPDATE, dfm.BACKBONE_UPDATE, dfm.STEP_IN_BACKWARD)


def resolve_classes(cfg: CfgNode) -> list[str]:
    """The class names of the data sets; sets ``MODEL.DFM.NUM_CLASSES`` where it is 0.

    Raises ValueError where no data set is named or the config has another number.
    """
    names = list(cfg.DATASETS.TRAIN) + list(cfg.DATASETS.TEST)
    if not names:
        raise ValueError(
            "DATASETS.TRAIN and DATASETS.TEST are empty: name a data set, such as voc_root_train."
        )
    classes = list(MetadataCatalog.get(names[0]).thing_classes)
    given = cfg.MODEL.DFM.NUM_CLASSES
    if given not in (0, len(classes)):
        raise ValueError(
            f"MODEL.DFM.NUM_CLASSES is {given}, but {names[0]} has {len(classes)} classes: set it to 0 or "
            f"{len(classes)}."
        )
    cfg.MODEL.DFM.NUM_CLASSES = len(classes)
    return classes


def resolve_device(cfg: CfgNode, explicit: bool) -> None:
    """Fall back from CUDA to the CPU where there is none, with a warning; ValueError if it was asked for, or
    if no device has this name.

    explicit: the user gave ``MODEL.DEVICE`` on the command line.
    """
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ValueError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}: set it to cpu, cuda or cuda:0.") from error
    if not cfg.MODEL.DEVICE.startswith("cuda") or torch.cuda.is_available():
        return
    if explicit:
        raise ValueError(
            f"MODEL.DEVICE {cfg.MODEL.DEVICE} was asked for, but torch sees no CUDA device: "
            "use MODEL.DEVICE cpu."
        )
    _logger.warning("No CUDA device: running on the CPU.")
    cfg.MODEL.DEVICE = "cpu"


def uses_gpu(cfg: CfgNode) -> bool:
    """Whether a run of this config computes on GPUs of this machine."""
    return str(cfg.MODEL.DEVICE).startswith("cuda") and torch.cuda.is_available()
