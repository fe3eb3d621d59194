"""What MODEL.CLASSIFIER.TIMM names: options of a constructor and files of weights, checked."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from torch import nn

from dfm_d2.errors import UserError


def timm_options(texts: Sequence[str]) -> dict:
    """{"img_size": 32} of ["img_size=32"]. Raises UserError for another form."""
    options = {}
    for text in texts:
        key, sign, value = str(text).partition("=")
        if not sign or not key:
            raise UserError(f"MODEL.CLASSIFIER.TIMM.OPTIONS has {text!r}: write name=value.")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(
                f"MODEL.CLASSIFIER.TIMM.OPTIONS has {text!r}: write its value as in yaml."
            ) from error
    return options


def read_timm_weights(path: str) -> dict:
    """The state dict of a file, read without running code of it. Raises UserError, naming the key."""
    from timm.models import load_state_dict

    if not Path(path).is_file():
        raise UserError(f"MODEL.CLASSIFIER.TIMM.WEIGHTS {path} is missing: give a file, hub or nothing.")
    try:
        return load_state_dict(path)
    except Exception as error:  # unpicklers raise nearly anything on a damaged file
        raise UserError(
            f"MODEL.CLASSIFIER.TIMM.WEIGHTS {path} is no state dict of timm "
            f"({type(error).__name__}: {error}): get it again."
        ) from error


def check_timm_weights(model: nn.Module, given: dict, path: str) -> None:
    """UserError if a layer of `model` is not in the file: timm would leave it random without a word."""

    def plain(name: str) -> str:
        return name.replace("_", ".")  # stages of timm's feature networks are layers_0, not layers.0

    known = {plain(name) for name in given}
    missing = [name for name, _ in model.named_parameters() if plain(name) not in known] if given else []
    if missing:
        raise UserError(
            f"MODEL.CLASSIFIER.TIMM.WEIGHTS {path} has no {missing[0]}, and {len(missing)} of the model's "
            "parameters in all are not in it: give timm's state dict of MODEL.CLASSIFIER.TIMM.NAME with its "
            "OPTIONS."
        )
