"""One optimizer per block behind the interface of one optimizer.

A block's gradient is clipped by its own norm and stepped by itself, in every update mode: a norm over all
blocks cannot exist when blocks are stepped at different moments. State is keyed by parameter name, so a
checkpoint of one update mode loads into another.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from dfm_d2.local_update.blocks import NamedParameters, check_blocks
from dfm_d2.local_update.processes import GradientReducer, ProcessGrid, check_finite

# What an optimizer keeps of a parameter.
_STATE = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "SGD": {"momentum_buffer"}}

_logger = logging.getLogger(__name__)


class BlockOptimizer(torch.optim.Optimizer):
    """A composite of one inner optimizer per block.

    ``param_groups`` holds the inner optimizers' own group dicts, so a learning-rate scheduler built on this
    object drives all of them; ``state`` is shared with them in the same way.
    """

    def __init__(
        self,
        blocks: Mapping[str, NamedParameters],
        make_optimizer: Callable[[NamedParameters], torch.optim.Optimizer],
        clip_norm: float = 0.0,
        scaler: torch.amp.GradScaler | None = None,
        grid: ProcessGrid | None = None,
    ):
        """
        blocks: block name -> [(parameter name, parameter)]. A parameter in two blocks is a ValueError.
        make_optimizer: the inner optimizer of the parameters of a block.
        clip_norm: greatest gradient norm of a block; 0 is off.
        scaler: the loss scale of fp16. One scale for all blocks, since gradients of all of them meet in the
            shared features, but overflow is found, and the step skipped, for each block by itself.
        grid: who owns which block among several processes; None: each process all of them.
        """
        check_blocks(blocks)
        self.blocks = {name: [parameter for _, parameter in named] for name, named in blocks.items()}
        self.clip_norm = float(clip_norm)
        self.scaler = scaler
        self.norms: dict[str, Tensor] = {}
        # Optimizer state, on the host, of blocks that another process steps, as it was when last gathered.
        self.elsewhere: dict[str, dict[str, Any]] = {}
        self.grid = grid or ProcessGrid()
        self._reducer = GradientReducer(self.grid)
        self._names = {parameter: name for named in blocks.values() for name, parameter in named}
        self._inner = {block: make_optimizer(named) for block, named in blocks.items() if named}
        inner = list(self._inner.values())
        self.kind = type(inner[0]).__name__
        super().__init__([group for one in inner for group in one.param_groups], dict(inner[0].defaults))
        for one in inner:
            one.state = self.state

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to differentiate: times the fp16 loss scale, when there is one."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def reduce_block(self, block: str) -> None:
        """Begin to average the gradient of a block over the processes: its backward is done."""
        self._reducer.start(block, self.blocks[block])

    def step_block(self, block: str) -> None:
        """Clip and step one block, and free its gradients; errors as in ``step``."""
        self.step([block])
        for parameter in self.blocks[block]:
            parameter.grad = None

    def step(self, only: Sequence[str] | None = None) -> None:
        """Clip and step every block that has a gradient; its norm before clipping is then in ``norms``.

        only: these blocks; None: all, at the end of an iteration, where the fp16 scale is updated.
        Raises NonFiniteLossError, with nothing stepped, for a norm that is not finite; under fp16 the step of
        its block is skipped instead. Raises it, too, where a step made parameters that are not finite.
        """
        with_gradient = [b for b in self._inner if any(p.grad is not None for p in self.blocks[b])]
        blocks = with_gradient if only is None else only
        for block in blocks:
            self.reduce_block(block)
        norms = {}
        for block in blocks:
            self._reducer.finish(block, self.blocks[block])
            if self.scaler is not None:
                self.scaler.unscale_(self._inner[block])
            grads = [parameter.grad for parameter in self.blocks[block] if parameter.grad is not None]
            norms[block] = nn.utils.get_total_norm(grads)
        if self.scaler is None:
            check_finite({f"gradient of block {block}": norm for block, norm in norms.items()})
        for block, norm in norms.items():
            if self.clip_norm > 0:
                nn.utils.clip_grads_with_norm_(self.blocks[block], self.clip_norm, norm)
            if self.scaler is None:
                self._inner[block].step()
            else:
                self.scaler.step(self._inner[block])
        self.norms.update(norms)
        with torch.no_grad():
            weights = {f"weights of block {b}": nn.utils.get_total_norm(self.blocks[b]) for b in blocks}
        check_finite(weights)
        if self.scaler is not None and only is None:
            self.scaler.update()

    def state_by_name(self) -> dict[str, dict[str, Any]]:
        """{parameter name: {key: value}} of the blocks that this process steps."""
        return {self._names[parameter]: dict(entry) for parameter, entry in self.state.items()}

    def state_dict(self) -> dict[str, Any]:
        """{"kind", "groups": [{"names", options...}], "state": {parameter name: {key: value}}, "scaler"}."""
        groups = [
            {"names": [self._names[parameter] for parameter in group["params"]], **_options(group)}
            for group in self.param_groups
        ]
        state = self.state_by_name() | self.elsewhere
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return {"kind": self.kind, "groups": groups, "state": state, "scaler": scaler}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave, whatever the blocks were then.

        A parameter that was not trained then (the backbone was frozen, a stage had no predictor) starts anew.
        Raises ValueError when it is of another optimizer or model, or has a parameter in another shape.
        """
        if state_dict.get("kind") != self.kind:
            raise ValueError(
                f"The checkpoint's optimizer is {state_dict.get('kind')}, this run's is {self.kind}: "
                "continue with what the checkpoint was trained with."
            )
        options = {name: _options(group) for group in state_dict["groups"] for name in group["names"]}
        self._check_names(options, state_dict["state"])
        self.state.clear()
        for block, inner in self._inner.items():
            state = state_dict["state"] if self.grid.owns(block) else {}
            for group in inner.param_groups:
                self._load_group(group, options, state)
        if self.scaler is not None and state_dict["scaler"]:
            self.scaler.load_state_dict(state_dict["scaler"])

    def _load_group(
        self, group: dict[str, Any], options: Mapping[str, dict], state: Mapping[str, dict]
    ) -> None:
        named = [(self._names[parameter], parameter) for parameter in group["params"]]
        known = [options[name] for name, _ in named if name in options]
        for key, value in known[0].items() if known else ():
            is_number = isinstance(value, float)
            if type(value) is not type(group.get(key, value)) or (is_number and not isfinite(value)):
                raise ValueError(f"its optimizer has {str(value)[:50]} as {str(key)[:50]}")
        group.update(known[0] if known else _scheduled(group, options))
        entries = {parameter: _at(parameter, state[name]) for name, parameter in named if name in state}
        if any("momentum_buffer" in entry for entry in entries.values()):
            # The fused SGD wants it of all that have a gradient, or of none; from zero its first step is the
            # one from none. Those that were there and have none have no gradient.
            new = [parameter for name, parameter in named if name not in options]
            entries |= {parameter: {"momentum_buffer": torch.zeros_like(parameter)} for parameter in new}
        self.state.update(entries)

    def _check_names(self, options: Mapping[str, dict], state: Mapping[str, dict]) -> None:
        missing = [name for name in self._names.values() if name not in options]
        if len(missing) == len(self._names):
            raise ValueError(
                f"The checkpoint's optimizer knows no parameter of this model, for example not {missing[0]}: "
                "it was trained with another model configuration."
            )
        if missing:
            said = "%d parameters were not trained before, for example %s: their optimizer state starts anew"
            _logger.warning(said, len(missing), missing[0])
        for parameter, name in self._names.items():
            entry = state.get(name, {})
            if entry and entry.keys() != _STATE.get(self.kind, entry.keys()):
                raise ValueError(f"its optimizer has {list(entry)[:9]} of {name}")
            for key, value in entry.items():
                wanted = torch.Size() if key == "step" else parameter.shape
                if value.shape != wanted:
                    raise ValueError(
                        f"The checkpoint's optimizer state {key} of {name} has the shape "
                        f"{tuple(value.shape)}, the parameter {tuple(parameter.shape)}: it was trained with "
                        "another configuration."
                    )


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a parameter group, without its parameters and without how the step is computed."""
    left_out = "params param_names names capturable differentiable foreach fused maximize".split()
    return {key: value for key, value in group.items() if key not in left_out}


def _at(parameter: nn.Parameter, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a parameter on its device, in its dtype and layout, but for a count, which has its own."""
    return {
        key: value.to(parameter.device) if key == "step" else torch.empty_like(parameter).copy_(value)
        for key, value in entry.items()
    }


def _scheduled(group: dict[str, Any], saved: Mapping[str, dict]) -> dict[str, Any]:
    """The options of a group that is new, its learning rate where the schedule of the saved ones stands."""
    like, options = next(iter(saved.values())), _options(group)
    if like.get("initial_lr") and "initial_lr" in options:
        options["lr"] = options["initial_lr"] * like["lr"] / like["initial_lr"]
    return options
