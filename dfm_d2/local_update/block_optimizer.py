"""One optimizer per block behind the interface of one optimizer.

A block's gradient is clipped by its own norm and stepped by itself, in every update mode: a norm over all
blocks cannot exist when blocks are stepped at different moments. State is keyed by parameter name, so a
checkpoint of one update mode loads into another.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dfm_d2.local_update.blocks import NamedParameters, check_blocks
from dfm_d2.local_update.errors import NonFiniteLossError
from dfm_d2.local_update.processes import GradientReducer, ProcessGrid


class BlockOptimizer(torch.optim.Optimizer):
    """A composite of one inner optimizer per block.

    ``param_groups`` holds the inner optimizers' own group dicts, so a learning-rate scheduler built on this
    object drives all of them; ``state`` is shared with them in the same way.
    """

    def __init__(
        self,
        blocks: Mapping[str, NamedParameters],
        make_optimizer: Callable[[list[dict]], torch.optim.Optimizer],
        options: Callable[[str, nn.Parameter], dict[str, float]] = lambda name, parameter: {},
        clip_norm: float = 0.0,
        scaler: torch.amp.GradScaler | None = None,
        grid: ProcessGrid | None = None,
    ):
        """
        blocks: block name -> [(parameter name, parameter)]. A parameter in two blocks is a ValueError.
        make_optimizer: inner optimizer of a list of parameter groups.
        options: of a parameter's name and itself, the group options (``lr``, ``weight_decay``) it has.
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
        self._grid = grid or ProcessGrid()
        self._reducer = GradientReducer(self._grid)
        self._names = {parameter: name for named in blocks.values() for name, parameter in named}
        self._inner = {
            block: make_optimizer(_group(named, options)) for block, named in blocks.items() if named
        }
        first = next(iter(self._inner.values()))
        self.kind = type(first).__name__
        super().__init__(
            [group for inner in self._inner.values() for group in inner.param_groups], dict(first.defaults)
        )
        self._share()

    def _share(self) -> None:
        """Make the group dicts and the state those of the inner optimizers."""
        self.param_groups = [group for inner in self._inner.values() for group in inner.param_groups]
        for inner in self._inner.values():
            self.state.update(inner.state)
            inner.state = self.state

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to differentiate: times the fp16 loss scale, when there is one."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def block_norm(self, block: str) -> Tensor:
        """Norm of the block's gradient, which is unscaled in place first; a scalar on its device."""
        if self.scaler is not None:
            self.scaler.unscale_(self._inner[block])
        grads = [parameter.grad for parameter in self.blocks[block] if parameter.grad is not None]
        return nn.utils.get_total_norm(grads)

    def step_block(self, block: str) -> None:
        """Clip and step one block; its gradient's norm before clipping is then in ``norms[block]``.

        Raises NonFiniteLossError, with nothing stepped, when the norm is not finite; under fp16 this block's
        step is skipped instead.
        """
        self._step_blocks([block])

    def step(self, closure: None = None) -> None:
        """Clip and step every block that has a gradient, after all their norms are known to be finite.

        The end of an iteration: the fp16 scale is updated here. A closure is a ValueError.
        """
        if closure is not None:
            raise ValueError("BlockOptimizer takes no closure: a block's loss is evaluated once.")
        self._step_blocks([block for block in self._inner if self._has_gradient(block)])
        if self.scaler is not None:
            self.scaler.update()

    def zero_block(self, block: str) -> None:
        """Free the gradients of one block."""
        for parameter in self.blocks[block]:
            parameter.grad = None

    def reduce_block(self, block: str) -> None:
        """Begin to average the gradient of a block over the processes: its backward is done."""
        self._reducer.start(block, self.blocks[block])

    def _has_gradient(self, block: str) -> bool:
        return any(parameter.grad is not None for parameter in self.blocks[block])

    def _step_blocks(self, blocks: list[str]) -> None:
        for block in blocks:
            self.reduce_block(block)
        for block in blocks:
            self._reducer.finish(block, self.blocks[block])
        norms = {block: self.block_norm(block) for block in blocks}
        if self.scaler is None and norms:
            _check_norms(norms)
        for block in blocks:
            if self.clip_norm > 0:
                nn.utils.clip_grads_with_norm_(self.blocks[block], self.clip_norm, norms[block])
            if self.scaler is None:
                self._inner[block].step()
            else:
                self.scaler.step(self._inner[block])
        self.norms.update(norms)

    def state_by_name(self) -> dict[str, dict[str, Any]]:
        """{parameter name: {key: value}} of the blocks that this process steps."""
        return {self._names[parameter]: dict(entry) for parameter, entry in self.state.items()}

    def state_dict(self) -> dict[str, Any]:
        """{"kind", "groups": [{"names", options...}], "state": {parameter name: {key: value}}, "scaler"}."""
        groups = []
        for group in self.param_groups:
            kept = {key: value for key, value in group.items() if key != "params"}
            groups.append({"names": [self._names[parameter] for parameter in group["params"]], **kept})
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
                "set SOLVER.OPTIMIZER to what the checkpoint was trained with."
            )
        saved_options = {
            name: {key: value for key, value in group.items() if key != "names"}
            for group in state_dict["groups"]
            for name in group["names"]
        }
        self._check_names(saved_options, state_dict["state"])
        for inner in self._inner.values():
            inner.load_state_dict(self._inner_state(inner, saved_options, state_dict["state"]))
        self.state.clear()
        self._share()
        for block, parameters in self.blocks.items():
            if not self._grid.owns(block):
                for parameter in parameters:
                    self.state.pop(parameter, None)
        if self.scaler is not None and state_dict["scaler"]:
            self.scaler.load_state_dict(state_dict["scaler"])

    def _inner_state(
        self, inner: torch.optim.Optimizer, options: Mapping[str, dict], state: Mapping[str, dict]
    ) -> dict[str, Any]:
        """The state dict, in torch's own form, of one inner optimizer."""
        groups, by_index, index = [], {}, 0
        for group in inner.param_groups:
            names = [self._names[parameter] for parameter in group["params"]]
            indices = range(index, index + len(names))
            index += len(names)
            known = next((options[name] for name in names if name in options), None)
            groups.append({**(known or _scheduled(group, options)), "params": list(indices)})
            by_index |= {i: dict(state[name]) for i, name in zip(indices, names) if name in state}
            if any("momentum_buffer" in entry for entry in by_index.values()):
                # The fused SGD wants it of all that have a gradient, or of none; from zero its first step is
                # the one from none. Those that were there and have none have no gradient.
                for i, name, parameter in zip(indices, names, group["params"]):
                    if name not in options:
                        by_index.setdefault(i, {"momentum_buffer": torch.zeros_like(parameter)})
        return {"state": by_index, "param_groups": groups}

    def _check_names(self, options: Mapping[str, dict], state: Mapping[str, dict]) -> None:
        missing = [name for name in self._names.values() if name not in options]
        if len(missing) == len(self._names):
            raise ValueError(
                f"The checkpoint's optimizer knows no parameter of this model, for example not {missing[0]}: "
                "it was trained with another model configuration."
            )
        if missing:
            logging.getLogger(__name__).warning(
                "%d parameters were not trained when the checkpoint was written, for example %s: their "
                "optimizer state starts anew",
                len(missing),
                missing[0],
            )
        for parameter, name in self._names.items():
            for key, value in state.get(name, {}).items():
                if torch.is_tensor(value) and value.dim() > 0 and value.shape != parameter.shape:
                    raise ValueError(
                        f"The checkpoint's optimizer state {key} of {name} has the shape "
                        f"{tuple(value.shape)}, the parameter {tuple(parameter.shape)}: it was trained with "
                        "another configuration."
                    )


def _group(
    named: NamedParameters, options: Callable[[str, nn.Parameter], dict[str, float]]
) -> list[dict[str, Any]]:
    """Parameter groups: one for each set of options that occurs, in the order of first occurrence."""
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in named:
        chosen = options(name, parameter)
        group = groups.setdefault(tuple(sorted(chosen.items())), {"params": [], **chosen})
        group["params"].append(parameter)
    return list(groups.values())


def _scheduled(group: dict[str, Any], saved: Mapping[str, dict]) -> dict[str, Any]:
    """The options of a group that is new, its learning rate where the schedule of the saved ones stands."""
    like = next(iter(saved.values()))
    options = {key: value for key, value in group.items() if key != "params"}
    if like.get("initial_lr") and "initial_lr" in options:
        options["lr"] = options["initial_lr"] * like["lr"] / like["initial_lr"]
    return options


def _check_norms(norms: Mapping[str, Tensor]) -> None:
    """NonFiniteLossError naming the blocks whose gradient is not finite. One transfer from the device."""
    values = torch.stack([norm.double() for norm in norms.values()]).tolist()
    bad = {f"gradient of block {block}": v for block, v in zip(norms, values) if not v < float("inf")}
    if bad:
        raise NonFiniteLossError(bad)
