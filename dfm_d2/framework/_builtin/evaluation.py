"""Run a model over a dataset and evaluate it."""

import logging
import time
from collections.abc import Iterable

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0


class DatasetEvaluator:
    """Collects inputs and outputs batch by batch, and evaluates them at the end."""

    def reset(self) -> None:
        """Called before the first batch."""

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Called with each batch and with what the model answered to it."""

    def evaluate(self) -> dict | None:
        """Called after the last batch; {task: {metric: number}}, or None except on the main process."""


def inference_on_dataset(model, data_loader: Iterable[list[dict]], evaluator: DatasetEvaluator) -> dict:
    """Run `model` over `data_loader` in eval mode without gradients; return `evaluator.evaluate()`, or {}.

    `data_loader` has a length. The model's training mode is restored, also where something raises.
    """
    import torch

    total = len(data_loader)
    logger.info("Start inference on %d batches", total)
    evaluator.reset()
    was_training = model.training
    model.eval()
    start = last_line = time.perf_counter()
    try:
        with torch.no_grad():
            for index, inputs in enumerate(data_loader, start=1):
                evaluator.process(inputs, model(inputs))
                now = time.perf_counter()
                if now - last_line > _SECONDS_BETWEEN_LINES:
                    last_line = now
                    per_batch = (now - start) / index
                    left = per_batch * (total - index)
                    logger.info("Inference %d/%d, %.4f s a batch, %.0f s left", index, total, per_batch, left)
    finally:
        model.train(was_training)
    logger.info("Inference took %.1f s", time.perf_counter() - start)
    return evaluator.evaluate() or {}
