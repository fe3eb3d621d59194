"""Training and evaluation of a config: every part of the engine put together."""

import logging
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfm_d2.data.files import write_text_atomically
from dfm_d2.engine.checkpoint import LAST, CheckpointHook, SafeCheckpointer
from dfm_d2.engine.ema import EMAHook, ModelEMA
from dfm_d2.engine.hooks import BestCheckpointHook, FinalEvalHook, GatherHook, ProgressBar, evaluation_bar
from dfm_d2.engine.metrics import METRICS_FILE, append_metrics, cut_back, flatten
from dfm_d2.engine.optimizer import build_block_optimizer
from dfm_d2.engine.precision import autocast_factory, inference_autocast, resolve_amp_dtype
from dfm_d2.engine.task import Task
from dfm_d2.engine.trainer import LocalUpdateTrainer
from dfm_d2.errors import UserError, input_errors, output_errors
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
from dfm_d2.local_update.processes import broadcast_model

_logger = logging.getLogger(__name__)


def train(task: Task, cfg: CfgNode, class_names: list[str], resume: bool) -> dict[str, Any]:
    """Train to ``SOLVER.MAX_ITER`` and evaluate. Returns the results of the last evaluation.

    resume: continue from the last checkpoint of ``OUTPUT_DIR`` if there is one. A run that is at its end
    already is only evaluated. Raises UserError for weights that are missing or do not fit.
    """
    folder, solver = Path(cfg.OUTPUT_DIR), cfg.SOLVER
    continues = resume and (folder / LAST).exists()
    with input_errors():
        model = task.build_model(task.without_pretrained(cfg) if continues else cfg)
    ema = ModelEMA(model, solver.EMA_DECAY) if solver.EMA_DECAY > 0 else None
    trainer = build_trainer(task, cfg, model)
    gather = GatherHook((cfg.TEST.EVAL_PERIOD, solver.CHECKPOINT_PERIOD), ema)
    trainer.register_hooks(
        [
            IterationTimer(),
            LRScheduler(),
            EMAHook(ema) if ema is not None else None,
            gather if comm.get_world_size() > 1 else None,
        ]
    )
    checkpointer = build_checkpointer(cfg, model, class_names, ema, trainer=trainer)
    if continues:
        checkpointer.load(checkpointer.get_checkpoint_file())
        start = trainer.iter + 1
    else:
        if resume:
            _logger.info("%s has no checkpoint yet: training from the start", folder)
        task.check_start(cfg)
        _load_weights(cfg, model, checkpointer)
        start = 0
    comm.synchronize()  # the main process must not touch what another still reads
    if comm.is_main_process():
        with output_errors():
            if start == 0:
                _set_aside(folder)
            # Only now: a run that is refused must not replace the config of the checkpoints that are there.
            write_text_atomically(folder / "config.yaml", cfg.dump())
            cut_back(folder / METRICS_FILE, start)
    if ema is not None and ema.updates == 0:
        ema.restart()
    if start >= solver.MAX_ITER:
        _logger.info("Trained to iteration %d already (SOLVER.MAX_ITER): evaluating only", start)
        return _evaluate_and_record(task, cfg, model, ema, start)
    results: dict[str, Any] = {}

    def evaluate_and_keep() -> dict[str, float]:
        results.clear()
        results.update(evaluate(task, cfg, model, ema))
        model.train()
        return flatten(results)

    # Evaluation before the checkpoint: a kill while evaluating repeats it after the resume.
    trainer.register_hooks([FinalEvalHook(cfg.TEST.EVAL_PERIOD, evaluate_and_keep)])
    if comm.is_main_process():
        writers = [
            JSONWriter(str(folder / METRICS_FILE), window_size=solver.LOG_PERIOD),
            TensorboardXWriter(str(folder), window_size=solver.LOG_PERIOD, purge_step=start),
        ]
        trainer.register_hooks(
            [
                BestCheckpointHook(checkpointer, cfg.TEST.BEST_METRIC) if cfg.TEST.BEST_METRIC else None,
                ProgressBar(solver.LOG_PERIOD),
                PeriodicWriter(writers, solver.LOG_PERIOD),
                CheckpointHook(checkpointer, solver.CHECKPOINT_PERIOD, solver.CHECKPOINTS_TO_KEEP, writers),
            ]
        )
    model.train()
    trainer.train(start, solver.MAX_ITER)
    return results


def evaluate_only(task: Task, cfg: CfgNode, class_names: list[str], resume: bool = False) -> dict[str, Any]:
    """Evaluate ``MODEL.WEIGHTS`` (or, with resume, the last checkpoint) and add a line to metrics.json."""
    return _evaluate_and_record(task, cfg, *_load_trained(task, cfg, class_names, resume))


def load_for_inference(task: Task, cfg: CfgNode, class_names: list[str]) -> nn.Module:
    """The model of ``MODEL.WEIGHTS`` in evaluation mode. Raises UserError as ``evaluate_only`` does."""
    return _load_trained(task, cfg, class_names, resume=False)[0].eval()


def evaluate(task: Task, cfg: CfgNode, model: nn.Module, ema: ModelEMA | None = None) -> dict[str, Any]:
    """Results on ``DATASETS.TEST``: those of the first set as {"bbox": {...}}, or of a classifier
    {"accuracy": ...}, of others under their names.

    The model computes in the precision of training (``SOLVER.AMP``). With ``ema`` the averaged weights are
    evaluated too, as "bbox_ema" or "accuracy_ema". Prints a table of each.
    """
    results: dict[str, Any] = OrderedDict()
    for number, name in enumerate(cfg.DATASETS.TEST):
        folder = "inference" if len(cfg.DATASETS.TEST) == 1 else f"inference/{name}"
        found = _evaluate_set(task, cfg, model, name, folder)
        if ema is not None:
            with ema.applied():
                averaged = _evaluate_set(task, cfg, model, name, f"{folder}_ema", " (averaged weights)")
            found |= {f"{task}_ema": scores for task, scores in averaged.items()}
        results |= found if number == 0 else {name: found}
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


def build_checkpointer(
    cfg: CfgNode,
    model: nn.Module,
    class_names: list[str],
    ema: ModelEMA | None = None,
    **checkpointables: Any,
) -> SafeCheckpointer:
    """The checkpointer of a run in ``OUTPUT_DIR``."""
    if ema is not None:
        checkpointables["ema"] = ema
    return SafeCheckpointer(model, cfg.OUTPUT_DIR, cfg=cfg, class_names=class_names, **checkpointables)


def _load_weights(cfg: CfgNode, model: nn.Module, checkpointer: SafeCheckpointer) -> None:
    """``MODEL.WEIGHTS``, if any, to start a training from; all processes then have those of the first."""
    set_by_config = getattr(model, "set_by_config", ())
    own = {name: value.clone() for name, value in model.named_buffers() if name in set_by_config}
    checkpointer.load(cfg.MODEL.WEIGHTS, [])
    model.load_state_dict(own, strict=False)
    broadcast_model(model)


def _set_aside(folder: Path) -> None:
    """Rename what an earlier run left, so that --resume cannot take that run's checkpoint for this one's."""
    for name in (METRICS_FILE, LAST):
        path = folder / name
        if path.exists():
            _logger.warning("%s holds an earlier run: its %s is now %s.previous", folder, name, name)
            path.replace(path.with_name(f"{name}.previous"))


def _load_trained(
    task: Task, cfg: CfgNode, class_names: list[str], resume: bool
) -> tuple[nn.Module, ModelEMA | None, int]:
    """The model, its averaged weights if the config wants them, and the iterations that it has seen."""
    with input_errors():
        model = task.build_model(task.without_pretrained(cfg))
    ema = ModelEMA(model, cfg.SOLVER.EMA_DECAY) if cfg.SOLVER.EMA_DECAY > 0 else None
    checkpointer = build_checkpointer(cfg, model, class_names, ema)
    continues = resume and checkpointer.has_checkpoint()
    path = checkpointer.get_checkpoint_file() if continues else cfg.MODEL.WEIGHTS
    if not path:
        raise UserError("--eval-only needs weights: set MODEL.WEIGHTS to a checkpoint.")
    extra = checkpointer.load(path)
    if ema is not None and ema.updates == 0:
        raise UserError(f"{path} has no averaged weights: set SOLVER.EMA_DECAY 0 to evaluate it.")
    return model, ema, extra.get("iteration", -1) + 1


def _evaluate_and_record(
    task: Task, cfg: CfgNode, model: nn.Module, ema: ModelEMA | None, iteration: int
) -> dict[str, Any]:
    results = evaluate(task, cfg, model, ema)
    if comm.is_main_process():
        append_metrics(Path(cfg.OUTPUT_DIR) / METRICS_FILE, iteration, results)
    return results


def _evaluate_set(
    task: Task, cfg: CfgNode, model: nn.Module, name: str, folder: str, title: str = ""
) -> dict[str, Any]:
    task.before_evaluation(cfg, model)
    evaluator = task.evaluator(cfg, name, Path(cfg.OUTPUT_DIR) / folder)
    with evaluation_bar(task.test_loader(cfg, name), name + title) as loader, inference_autocast(cfg):
        results = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print(f"\n{name}{title}\n{task.summary(results)}", flush=True)
    return results
