"""Checkpoints of a detector, and weights of other origin matched by their names."""

import logging
import re

import torch
from fvcore.common.checkpoint import Checkpointer

from dfm_d2.framework._builtin import comm
from dfm_d2.framework._builtin.utils import PathManager

logger = logging.getLogger(__name__)

# Weights of Caffe2's ResNets in Detectron2's terms: `res2_0_branch2a_w` is `res2.0.conv1.weight`,
# `res2_0_branch2a_bn_s` is `res2.0.conv1.norm.weight`.
_CAFFE2_NAME = re.compile(
    r"(?P<layer>.+?)(?P<norm>_bn|_gn)?_(?P<what>running_mean|running_var|gamma|beta|riv|rm|s|b|w)"
)
_CAFFE2_PARTS = {"branch1": "shortcut", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}
_CAFFE2_TENSORS = {"w": "weight", "s": "weight", "gamma": "weight", "b": "bias", "beta": "bias"}
_CAFFE2_TENSORS |= {"rm": "running_mean", "riv": "running_var"}
_CAFFE2_LAYERS = {"conv1": "stem.conv1", "res_conv1": "stem.conv1", "pred": "linear"}


class DetectionCheckpointer(Checkpointer):
    """fvcore's Checkpointer, written by the main process only, that can match weights by the end of names.

    Detectron2's files hold {"model": state dict, ...}; with "matching_heuristics": True the names need only
    be the ends of the model's names, and with "__author__": "Caffe2" they are Caffe2's.
    """

    def __init__(self, model: torch.nn.Module, save_dir: str = "", *, save_to_disk=None, **checkpointables):
        """save_to_disk: None, on the main process only. checkpointables: by name, what is saved beside it."""
        save_to_disk = comm.is_main_process() if save_to_disk is None else save_to_disk
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.path_manager = PathManager

    def _load_model(self, checkpoint: dict):
        if checkpoint.get("matching_heuristics", False):
            self._convert_ndarray_to_tensor(checkpoint["model"])
            weights = checkpoint["model"]
            if checkpoint.get("__author__") == "Caffe2":
                weights = {from_caffe2(name): value for name, value in weights.items()}
            checkpoint["model"] = match_by_suffix(self.model.state_dict(), weights)
        incompatible = super()._load_model(checkpoint)
        # They come from the config where a checkpoint has none.
        own = {"pixel_mean", "pixel_std"} & dict(self.model.named_buffers(recurse=False)).keys()
        incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name not in own]
        return incompatible


def match_by_suffix(
    model_state: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Rename weights to the model's names: `backbone.stem.conv1.weight` takes `stem.conv1.weight`.

    The longest match wins. Weights of another shape are left out with a warning, unmatched ones keep their
    name. Raises ValueError where one weight matches two names.
    """
    matched: dict[str, torch.Tensor] = {}
    taken: dict[str, str] = {}
    for name, value in sorted(model_state.items()):
        parts = name.split(".")
        suffixes = (".".join(parts[start:]) for start in range(len(parts)))
        source = next((suffix for suffix in suffixes if suffix in weights), None)
        if source is None:
            continue
        if weights[source].shape != value.shape:
            shapes = tuple(weights[source].shape), tuple(value.shape)
            logger.warning(
                "%s is not loaded: its shape is %s, that of %s %s", source, shapes[0], name, shapes[1]
            )
            # An empty name keeps it from being passed on as unmatched.
            taken.setdefault(source, "")
            continue
        if taken.get(source):
            raise ValueError(f"the weight {source} matches both {taken[source]} and {name} of the model")
        taken[source] = name
        matched[name] = weights[source]
    return matched | {name: value for name, value in weights.items() if name not in taken}


def from_caffe2(name: str) -> str:
    """Detectron2's name of a weight of a Caffe2 ResNet; other names, no backbone's, are kept."""
    match = _CAFFE2_NAME.fullmatch(name)
    if match is None:
        return name
    layer = match["layer"]
    path = _CAFFE2_LAYERS.get(layer) or ".".join(_CAFFE2_PARTS.get(part, part) for part in layer.split("_"))
    what = _CAFFE2_TENSORS.get(match["what"], match["what"])
    return f"{path}{'.norm' if match['norm'] else ''}.{what}"
