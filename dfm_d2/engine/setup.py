"""From a command line to a run that is ready: config, device, folder, log, seed, data sets, classes.

Torch is imported once the config and what it names have been looked at: a mistake is an error at once.
"""

import argparse
import ctypes
import logging
from contextlib import suppress
from itertools import chain
from pathlib import Path

from dfm_d2 import __version__
from dfm_d2.data.images import limit_bytes
from dfm_d2.engine import config
from dfm_d2.engine.folder import check_folder, last_checkpoint
from dfm_d2.engine.keys import add_keys, problems_of
from dfm_d2.engine.task import Task
from dfm_d2.errors import CheckpointError, UserError, input_errors, report
from dfm_d2.framework import PROVIDER, default_argument_parser, merge_config_file, merge_config_opts

_logger = logging.getLogger(__name__)


def run_tool(task: Task, words: list[str] | None = None) -> int:
    """Train and evaluate as a command line (None: this one) says. Returns the status of ``run_processes``."""
    args = default_argument_parser().parse_args(words)
    try:
        with input_errors():
            cfg = load_config(task, args.config_file, args.opts)
            check_run(task, cfg, args)
        from dfm_d2.engine.launch import run_processes

        return run_processes(task, cfg, args)
    except UserError as error:
        return report(error)


def load_config(task: Task, config_file: str, opts: list[str]):
    """Detectron2's defaults, the keys of any training and of the task, the file and the KEY VALUE overrides.

    Runs no code from the file. Raises UserError naming the file and the key that is wrong.
    """
    from dfm_d2.framework import get_cfg  # of Detectron2, which imports torch: not for --help

    cfg = get_cfg()
    add_keys(cfg, (*config.KEYS, *task.keys))
    removed = {**config.REMOVED, **task.removed}
    if config_file:
        merge_config_file(cfg, config_file, removed)
    merge_config_opts(cfg, opts, removed)
    task.complete(cfg)
    return cfg


def validate_config(task: Task, cfg) -> None:
    """UserError for the first value that cannot work: the message names the key and the choices.

    From then on this process refuses images above DATASETS.MAX_BYTES.
    """
    each = problems_of(cfg, (*config.KEYS, *task.keys))
    # Lazily: the later ones expect allowed values.
    message = next(chain(each, config.problems(cfg), task.problems(cfg)), None)
    if message is not None:
        raise UserError(message)
    limit_bytes(cfg.DATASETS.MAX_BYTES)


def check_run(task: Task, cfg, args: argparse.Namespace) -> None:
    """UserError for what is wrong with a run, as far as that can be seen without torch and the data."""
    validate_config(task, cfg)
    task.find_data(cfg)
    check_folder(cfg.OUTPUT_DIR)  # makes it: not for data that are not there
    weights = last_checkpoint(cfg.OUTPUT_DIR, args.resume) or cfg.MODEL.WEIGHTS
    if args.eval_only and not weights:
        raise UserError("--eval-only needs weights: set MODEL.WEIGHTS to a checkpoint.")
    if weights:
        check_weights(weights)


def check_weights(weights: str) -> None:
    """UserError for a MODEL.WEIGHTS that is empty or names a file that is not there."""
    if not weights:
        raise UserError("MODEL.WEIGHTS is empty: set it to a checkpoint.")
    if "://" not in weights and not Path(weights).is_file():
        raise CheckpointError(
            f"There is no weight file {weights}: set MODEL.WEIGHTS to a local .pth or .pkl file."
        )


def setup_run(task: Task, cfg, args: argparse.Namespace) -> list[str]:
    """Make ready what a training or an evaluation needs; ``cfg`` is completed in place, then frozen.

    Returns the class names in the order of their indices. Raises UserError for a device, a precision or a
    backend that cannot be had, and for missing data.
    """
    import torch
    from dfm_kernels import BackendError, kernels, use_triton

    from dfm_d2.engine.log import start_log
    from dfm_d2.engine.precision import resolve_amp_dtype
    from dfm_d2.framework import comm, seed_all_rng

    limit_bytes(cfg.DATASETS.MAX_BYTES)  # in each of several processes
    resolve_device(cfg, explicit="MODEL.DEVICE" in (args.opts or [])[0::2])
    device = torch.device(cfg.MODEL.DEVICE)
    if device.type == "cpu":
        keep_freed_memory()
    try:
        with kernels(cfg.MODEL.DFM.KERNELS):
            use_triton("MODEL.DFM.KERNELS", torch.empty(0, device=device))
    except BackendError as error:
        raise UserError(str(error)) from error
    resolve_amp_dtype(cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE, device)
    check_folder(cfg.OUTPUT_DIR)
    with input_errors():
        start_log(cfg.OUTPUT_DIR, comm.is_main_process())
    _logger.info("dfm_d2 %s, torch %s, framework: %s", __version__, torch.__version__, PROVIDER)
    said = "device %s, %d threads (OMP_NUM_THREADS sets them; a resume is bit for bit with the same number)"
    _logger.info(said, cfg.MODEL.DEVICE, torch.get_num_threads())
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    with input_errors():
        task.register(cfg)
    classes = resolve_classes(cfg)
    cfg.freeze()
    return classes


def keep_freed_memory() -> None:
    """Let glibc, where it is the C library, keep what this process frees.

    Else large tensors on a CPU come from the system page by page in every step: up to a quarter of its time.
    """
    with suppress(AttributeError, TypeError):
        c_library = ctypes.CDLL(None)
        c_library.mallopt(-4, 0)  # M_MMAP_MAX
        c_library.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def resolve_classes(cfg) -> list[str]:
    """The class names of the data sets; sets ``MODEL.DFM.NUM_CLASSES`` where it is 0.

    Raises UserError where no data set is named or the config has another number.
    """
    from dfm_d2.framework import MetadataCatalog

    names = list(cfg.DATASETS.TRAIN) + list(cfg.DATASETS.TEST)
    if not names:
        raise UserError(
            "DATASETS.TRAIN and DATASETS.TEST are empty: name a data set, such as voc_root_train."
        )
    classes = list(MetadataCatalog.get(names[0]).thing_classes)
    given = cfg.MODEL.DFM.NUM_CLASSES
    if given not in (0, len(classes)):
        raise UserError(
            f"MODEL.DFM.NUM_CLASSES is {given}, but {names[0]} has {len(classes)} classes: set it to 0 or "
            f"{len(classes)}."
        )
    cfg.MODEL.DFM.NUM_CLASSES = len(classes)
    return classes


def resolve_device(cfg, explicit: bool) -> None:
    """Fall back from a GPU that is not there to the CPU, with a warning; UserError if it was asked for.

    explicit: the user gave ``MODEL.DEVICE`` on the command line.
    """
    if not cfg.MODEL.DEVICE.startswith("cuda") or uses_gpu(cfg):
        return
    if explicit:
        raise UserError(
            f"MODEL.DEVICE {cfg.MODEL.DEVICE} was asked for, but torch sees no such device: "
            "use MODEL.DEVICE cpu."
        )
    _logger.warning("No device %s: running on the CPU.", cfg.MODEL.DEVICE)
    cfg.MODEL.DEVICE = "cpu"


def uses_gpu(cfg) -> bool:
    """Whether a run of this config computes on GPUs of this machine."""
    import torch

    device = torch.device(cfg.MODEL.DEVICE)
    return device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
