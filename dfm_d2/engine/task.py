"""What the engine needs to know of a vertical: keys, data, models and evaluation. Needs no torch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dfm_d2.engine.keys import Key

if TYPE_CHECKING:
    from torch import nn

    from dfm_d2.framework import DatasetEvaluator

Config = Any  # a CfgNode; Detectron2's comes with torch


def _nothing(*_: Any) -> None:
    """Where a task has nothing to do."""


@dataclass(frozen=True)
class Imported:
    """A function that is imported when it is called: a bad config is an error before torch is imported."""

    module: str
    name: str

    def __call__(self, *arguments: Any) -> Any:
        return getattr(import_module(self.module), self.name)(*arguments)


@dataclass(frozen=True, eq=False)
class Task:
    """The one thing that a vertical hands to the engine. It can be pickled: processes are given it.

    keys: config keys besides those of any training.
    problems: one error message for each value of a config that cannot work together with others.
    models: modules that register the meta-architectures. Models may say: ``meaning``, keys that decide what
        weights mean, and ``meant(config, key)``, what one says; ``training_only``, prefixes of what a
        checkpoint may lack or have; ``backbone_prefix``, of what has SOLVER.BACKBONE_MULTIPLIER;
        ``set_by_config``, buffers that starting weights leave.
    find_data: UserError for a data set that is not known or whose files are not there; reads none of them.
    register: read and register the data sets of a config.
    train_loader: of a config and a position. test_loader: of a config and the name of a set.
    evaluator: of a config, a set and a folder. summary: its results as text.
    removed: keys that config files of earlier versions have, as ``merge_config_file`` takes them.
    complete: set, in place, what follows from other keys; after every merge.
    check_start: UserError if training from scratch would leave random layers untrained.
    calibrate: of a config and its model, sets what is fitted after the last iteration, before the model is
        saved; all processes together.
    after_training: of a config and the class names, what the main process does with a finished training.
    """

    keys: Sequence[Key]
    problems: Callable[[Config], Iterator[str]]
    models: Sequence[str]
    find_data: Callable[[Config], None]
    register: Callable[[Config], Any]
    train_loader: Callable[[Config, int], Iterable[list[dict]]]
    test_loader: Callable[[Config, str], Any]
    evaluator: "Callable[[Config, str, Any], DatasetEvaluator]"
    summary: Callable[[Mapping[str, Any]], str]
    removed: Mapping[str, tuple[Any, str]]
    complete: Callable[[Config], None] = _nothing
    check_start: Callable[[Config], None] = _nothing
    calibrate: "Callable[[Config, nn.Module], None]" = _nothing
    after_training: Callable[[Config, Sequence[str]], None] = _nothing

    def build_model(self, cfg: Config, pretrained: bool = True) -> "nn.Module":
        """The model of a config. pretrained: with MODEL.TIMM.WEIGHTS, else a whole checkpoint replaces them
        and they need not be there."""
        from dfm_d2.framework import build_model

        if not pretrained:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.TIMM.WEIGHTS = ""
        for module in self.models:
            import_module(module)
        return build_model(cfg)
