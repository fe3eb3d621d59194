"""What the engine needs to know of a vertical: its config keys, data, evaluation and checks."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dfm_d2.framework import CfgNode, DatasetEvaluator


@dataclass(frozen=True)
class Task:
    """The one thing that a vertical hands to the engine.

    add_config: add the task's keys to a config, in place.
    complete: set, in place, what follows from other keys; after every merge.
    problems: one error message for each value of a config that cannot work.
    register: read and register the data sets of a config.
    train_loader: of a config and a position. test_loader: of a config and the name of a set.
    evaluator: of a config, a set and a folder. summary: its results as text.
    check_start: ValueError if training from scratch would leave random layers untrained.
    before_evaluation: of a config and a model, what its evaluation wants done first.
    without_pretrained: the config for a model whose weights a whole checkpoint replaces.
    """

    add_config: Callable[[CfgNode], None]
    complete: Callable[[CfgNode], None]
    problems: Callable[[CfgNode], Iterator[str]]
    register: Callable[[CfgNode], Any]
    train_loader: Callable[[CfgNode, int], Iterable[list[dict]]]
    test_loader: Callable[[CfgNode, str], Any]
    evaluator: Callable[[CfgNode, str, Any], DatasetEvaluator]
    summary: Callable[[Mapping[str, Any]], str]
    check_start: Callable[[CfgNode], None]
    before_evaluation: Callable[[CfgNode, nn.Module], None]
    without_pretrained: Callable[[CfgNode], CfgNode]
