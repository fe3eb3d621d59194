"""Checkpoints of a detector, and weights of other origin matched by their names."""

import logging

import torch
from fvcore.common.checkpoint import Checkpointer

from dfm_d2.framework._builtin import comm
from dfm_d2.framework._builtin.c2_names import convert_c2_names
from dfm_d2.framework._builtin.file_io import PathManager

logger = logging.getLogger(__name__)


class DetectionCheckpointer(Checkpointer):
    """fvcore's Checkpointer, written by the main process only, that can match weights by the end of names.

    Detectron2's files hold {"model": state dict, ...}; with "matching_heuristics": True the names need only
    be the ends of the model's names, and with "__author__": "Caffe2" they are Caffe2's.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        **checkpointables,
    ):
        to_disk = comm.is_main_process() if save_to_disk is None else save_to_disk
        super().__init__(model, save_dir, save_to_disk=to_disk, **checkpointables)
        self.path_manager = PathManager

    def _load_file(self, filename: str) -> dict:
        """Read a file of tensors and plain values; raises ValueError for a pickle, which could run code."""
        if filename.endswith(".pkl"):
            raise ValueError(
                f"'{filename}' is a pickle: load it with dfm_d2.engine.checkpoint.SafeCheckpointer."
            )
        loaded = torch.load(filename, map_location="cpu", weights_only=True)
        return loaded if "model" in loaded else {"model": loaded}

    def _load_model(self, checkpoint: dict):
        if checkpoint.get("matching_heuristics", False):
            self._convert_ndarray_to_tensor(checkpoint["model"])
            weights = checkpoint["model"]
            if checkpoint.get("__author__") == "Caffe2":
                weights = convert_c2_names(weights)
            checkpoint["model"] = match_by_suffix(self.model.state_dict(), weights)
        incompatible = super()._load_model(checkpoint)
        # They come from the config where a checkpoint has none.
        for name in ("pixel_mean", "pixel_std"):
            if name in incompatible.missing_keys and name in dict(self.model.named_buffers(recurse=False)):
                incompatible.missing_keys.remove(name)
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
            logger.warning(
                "%s has shape %s, %s of the model has %s: it is not loaded",
                source,
                tuple(weights[source].shape),
                name,
                tuple(value.shape),
            )
            # A None keeps it from being passed on as unmatched.
            taken.setdefault(source, "")
            continue
        if taken.get(source):
            raise ValueError(f"the weight {source} matches both {taken[source]} and {name} of the model")
        taken[source] = name
        matched[name] = weights[source]
    if not matched:
        logger.warning("no weight matches a name of the model")
    matched.update({name: value for name, value in weights.items() if name not in taken})
    return matched
