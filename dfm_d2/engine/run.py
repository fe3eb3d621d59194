"""Training and evaluation of a config: every part of the engine put together."""

import itertools
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from dfm_d2.data.files import write_text_atomically
from dfm_d2.engine.checkpoint import FINAL, LATEST, CheckpointHook, SafeCheckpointer
from dfm_d2.engine.folder import LAST, last_checkpoint
from dfm_d2.engine.hooks import CalibrationHook, FinalEvalHook, Progress, gather_state
from dfm_d2.engine.metrics import METRICS_FILE, append_metrics, cut_back, flatten
from dfm_d2.engine.optimizer import build_block_optimizer
from dfm_d2.engine.precision import autocast_factory, inference_autocast, resolve_amp_dtype
from dfm_d2.engine.task import Task
from dfm_d2.engine.trainer import LocalUpdateTrainer
from dfm_d2.errors import UserError, input_errors
from dfm_d2.framework import (
    CfgNode,
    IterationTimer,
    JSONWriter,
    LRScheduler,
    PeriodicWriter,
    TensorboardXWriter,
    build_lr_scheduler,
    comm,
    inference_on_dataset,
)
from dfm_d2.local_update import ProcessGrid, RanksUpdate, build_update
from dfm_d2.local_update.processes import all_processes, broadcast_model, gather_objects

_logger = logging.getLogger(__name__)


def train(task: Task, cfg: CfgNode, class_names: list[str], resume: bool) -> dict[str, Any]:
    """Train to ``SOLVER.MAX_ITER`` and evaluate. Returns the results of the last evaluation.

    resume: continue from the last checkpoint of ``OUTPUT_DIR`` if there is one. A run that is at its end
    already is only evaluated. Raises UserError for weights that are missing or do not fit, Stopped if asked.
    """
    folder, solver, start = Path(cfg.OUTPUT_DIR), cfg.SOLVER, 0
    path = _last_checkpoint(cfg, resume)
    with input_errors():
        model = task.build_model(cfg, pretrained=not path)
    trainer = build_trainer(task, cfg, model)
    trainer.register_hooks([IterationTimer(), LRScheduler()])
    checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR, cfg=cfg, class_names=class_names, trainer=trainer)
    if path:
        checkpointer.load(path)
        start = trainer.iter + 1
    else:
        if resume:
            _logger.info("%s has no checkpoint yet: training from the start", folder)
        task.check_start(cfg)
        kept = getattr(model, "set_by_config", ())
        own = {name: value.clone() for name, value in model.named_buffers() if name in kept}
        checkpointer.load(cfg.MODEL.WEIGHTS, [])
        model.load_state_dict(own, strict=False)
        broadcast_model(model)
    comm.synchronize()  # the main process must not touch what another still reads
    if comm.is_main_process():
        if not path:
            _set_aside(folder)
        # Only now: a run that is refused must not replace the config of the checkpoints that are there.
        write_text_atomically(folder / "config.yaml", cfg.dump())
        cut_back(folder / METRICS_FILE, start)
    if start >= solver.MAX_ITER:
        _logger.info("Trained to iteration %d already (SOLVER.MAX_ITER): evaluating only", start)
        if comm.is_main_process() and Path(path).stem != FINAL:
            checkpointer.finish(path)
        return _evaluate_and_note(task, cfg, model, start)
    results: dict[str, Any] = {}

    def evaluate_and_keep() -> dict[str, float]:
        gather_state(trainer)  # what is evaluated must be what is saved
        results.clear()
        results.update(evaluate(task, cfg, model))
        model.train()
        return flatten(results)

    # Evaluation before the checkpoint: a kill while evaluating repeats it after the resume.
    trainer.register_hooks([CalibrationHook(lambda: task.calibrate(cfg, model))])
    trainer.register_hooks([FinalEvalHook(cfg.TEST.EVAL_PERIOD, evaluate_and_keep)])
    log_period, writers = solver.LOG_PERIOD, []
    if comm.is_main_process():
        writers = [
            JSONWriter(str(folder / METRICS_FILE), window_size=log_period),
            TensorboardXWriter(str(folder), window_size=log_period, purge_step=start),
        ]
        trainer.register_hooks([Progress(log_period), PeriodicWriter(writers, log_period)])
    model.train()
    periods = solver.CHECKPOINT_PERIOD, solver.CHECKPOINTS_TO_KEEP
    trainer.register_hooks([saving := CheckpointHook(checkpointer, *periods, writers, log_period)])
    with saving.signals:
        trainer.train(start, solver.MAX_ITER)
    return results


def evaluate_only(task: Task, cfg: CfgNode, class_names: list[str], resume: bool = False) -> dict[str, Any]:
    """Evaluate ``MODEL.WEIGHTS`` (or, with resume, the last checkpoint) and add a line to metrics.json."""
    return _evaluate_and_note(task, cfg, *_load_trained(task, cfg, class_names, resume))


def _evaluate_and_note(task: Task, cfg: CfgNode, model: nn.Module, iteration: int) -> dict[str, Any]:
    results = evaluate(task, cfg, model)
    if comm.is_main_process():
        append_metrics(Path(cfg.OUTPUT_DIR) / METRICS_FILE, iteration, results)
    return results


def load_for_inference(task: Task, cfg: CfgNode, class_names: list[str]) -> nn.Module:
    """The model of ``MODEL.WEIGHTS`` in evaluation mode. Raises UserError as ``evaluate_only`` does."""
    return _load_trained(task, cfg, class_names, resume=False)[0].eval()


def load_final(task: Task, cfg: CfgNode, class_names: Sequence[str]) -> nn.Module:
    """As ``load_for_inference``, of the training that ``OUTPUT_DIR`` holds."""
    trained = cfg.clone()
    trained.defrost()
    trained.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR) / f"{FINAL}.pth")
    return load_for_inference(task, trained, list(class_names))


def evaluate(task: Task, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    """Results on ``DATASETS.TEST``: those of the first set as {"bbox": {...}}, or of a classifier
    {"accuracy": ...}, of others under their names. Prints a table of each.

    The model computes in the precision of training (``SOLVER.AMP``).
    """
    results: dict[str, Any] = {}
    for name in cfg.DATASETS.TEST:
        folder = "inference" if len(cfg.DATASETS.TEST) == 1 else f"inference/{name}"
        evaluator = task.evaluator(cfg, name, Path(cfg.OUTPUT_DIR) / folder)
        batches = tqdm(task.test_loader(cfg, name), desc=name, unit="batch", leave=False, disable=None)
        with batches, inference_autocast(cfg):
            found = inference_on_dataset(model, batches, evaluator)
        if comm.is_main_process():
            print(f"\n{name}\n{task.summary(found)}", flush=True)
        results |= {name: found} if results else found
    return results


def build_trainer(task: Task, cfg: CfgNode, model: nn.Module) -> LocalUpdateTrainer:
    """The trainer of a model; it has an optimizer and a ``scheduler`` but no hooks yet."""
    dfm, device = cfg.MODEL.DFM, torch.device(cfg.MODEL.DEVICE)
    dtype = resolve_amp_dtype(cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE, device)
    _logger.info("precision: %s", "float32" if dtype is None else f"autocast to {dtype}")
    scaler = torch.amp.GradScaler("cuda") if dtype == torch.float16 else None
    ranks, world = dfm.PREDICTOR_RANKS, comm.get_world_size()
    if world % ranks:
        raise UserError(
            f"MODEL.DFM.PREDICTOR_RANKS is {ranks}: it must divide the number of processes, {world} "
            "(--num-gpus)."
        )
    if ranks > 1 and scaler is not None:
        raise UserError(
            "SOLVER.AMP.DTYPE float16 has one loss scale for all blocks, which processes that own different "
            "predictors cannot agree on: set it to bfloat16, or MODEL.DFM.PREDICTOR_RANKS 1."
        )
    grid = ProcessGrid.build(ranks)
    shared_out = RanksUpdate(grid, dfm.STEP_IN_BACKWARD) if ranks > 1 else None

    def build_loader(position: int) -> Iterable[list[dict]]:
        batches = task.train_loader(cfg, position)
        return batches if shared_out is None else map(shared_out.of_row, batches)

    trainer = LocalUpdateTrainer(
        model,
        build_loader,
        build_block_optimizer(cfg, model, scaler, grid),
        shared_out or build_update(dfm.UPDATE, dfm.STEP_IN_BACKWARD),
        autocast_factory(device, dtype),
        images_per_step=cfg.SOLVER.IMS_PER_BATCH,
        window=cfg.SOLVER.LOG_PERIOD,
    )
    trainer.scheduler = build_lr_scheduler(cfg, trainer.optimizer)
    return trainer


def _set_aside(folder: Path) -> None:
    """Rename what an earlier run left: nothing must take its checkpoints for this one's, or replace them."""
    names = METRICS_FILE, LAST, f"{FINAL}.pth", f"{LATEST}.pth"
    for path in (*map(folder.joinpath, names), *sorted(folder.glob(f"model_{'[0-9]' * 7}.pth"))):
        if path.exists():
            names = (f"{path.name}.previous{number if number > 1 else ''}" for number in itertools.count(1))
            free = next(new for name in names if not (new := path.with_name(name)).exists())
            _logger.warning("%s holds an earlier run: its %s is now %s", folder, path.name, free.name)
            path.rename(free)


def _last_checkpoint(cfg: CfgNode, resume: bool) -> str:
    """As ``last_checkpoint``, the same in all processes: what the main one sees."""
    return gather_objects(last_checkpoint(cfg.OUTPUT_DIR, resume), all_processes())[0]


def _load_trained(task: Task, cfg: CfgNode, class_names: list[str], resume: bool) -> tuple[nn.Module, int]:
    """The model, and the iterations that it has seen."""
    with input_errors():
        model = task.build_model(cfg, pretrained=False)
    checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR, cfg=cfg, class_names=class_names)
    path = _last_checkpoint(cfg, resume) or cfg.MODEL.WEIGHTS
    if not path:
        raise UserError("MODEL.WEIGHTS is empty: set it to a checkpoint.")
    return model, checkpointer.load(path).get("iteration", -1) + 1
