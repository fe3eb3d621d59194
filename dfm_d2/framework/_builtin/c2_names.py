"""Names of the weights of Caffe2's ResNets in Detectron2's terms.

`res2_0_branch2a_w` is `res2.0.conv1.weight`, `res2_0_branch2a_bn_s` is `res2.0.conv1.norm.weight`.
"""

import re

import torch

_PARTS = {"branch1": "shortcut", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}
# What follows "bn" or "gn".
_NORM_PARTS = {
    "s": "weight",
    "gamma": "weight",
    "b": "bias",
    "beta": "bias",
    "rm": "running_mean",
    "running_mean": "running_mean",
    "riv": "running_var",
    "running_var": "running_var",
}
_NAME = re.compile(
    r"(?P<layer>.+?)(?:_(?P<norm>bn|gn))?_(?P<what>running_mean|running_var|gamma|beta|riv|rm|s|b|w)"
)


def convert_c2_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the weights of a Caffe2 ResNet; names of another form are kept, for they are no backbone's."""
    return {_convert(name): value for name, value in weights.items()}


def _convert(name: str) -> str:
    match = _NAME.fullmatch(name)
    if match is None:
        return name
    layer, norm, what = match["layer"], match["norm"], match["what"]
    if layer in ("conv1", "res_conv1"):
        path = "stem.conv1"
    elif layer == "pred":
        path = "linear"
    else:
        path = ".".join(_PARTS.get(part, part) for part in layer.split("_"))
    if norm is not None:
        return f"{path}.norm.{_NORM_PARTS.get(what, what)}"
    return f"{path}.{ {'w': 'weight', 'b': 'bias'}.get(what, what) }"
