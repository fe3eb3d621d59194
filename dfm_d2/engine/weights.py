"""Reading weight files of others: without running code from them, and never with the wrong preprocessing."""

import codecs
import collections
import io
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dfm_d2.errors import CheckpointError, UnsafeFileError, UserError

# How the weights were trained: the pixels that they want.
MSRA = "msra"
TORCHVISION = "torchvision"


def _latin1_bytes(text: str, encoding: str) -> bytes:
    """What ``_codecs.encode`` does in a pickle of bytes; any other codec is refused."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"the codec {encoding!r}")
    return codecs.encode(text, "latin1")


def _numpy_globals() -> dict[tuple[str, str], Any]:
    """{(module, name): object} of what a pickle of numpy arrays in dicts and lists may name."""
    reconstruct, arguments = np.empty(0).__reduce__()[:2]
    scalar = np.float32(0).__reduce__()[0]
    frombuffer = np.empty(1).__reduce_ex__(5)[0]
    allowed: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): arguments[0],
        ("numpy", "dtype"): np.dtype,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("_codecs", "encode"): _latin1_bytes,
    }
    for package in ("numpy.core", "numpy._core"):
        allowed[(f"{package}.multiarray", "_reconstruct")] = reconstruct
        allowed[(f"{package}.multiarray", "scalar")] = scalar
        allowed[(f"{package}.numeric", "_frombuffer")] = frombuffer
    return allowed


class NumpyUnpickler(pickle.Unpickler):
    """Reads pickles of numpy arrays, numbers and strings in dicts, lists and tuples, and nothing else."""

    _allowed = _numpy_globals()

    def find_class(self, module: str, name: str) -> Any:
        """The whitelisted object, or pickle.UnpicklingError; nothing is imported."""
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"the global {module}.{name}")
        return self._allowed[(module, name)]


def load_numpy_pickle(path: str) -> Any:
    """The content of a ``.pkl`` of numpy arrays, such as the Detectron2 model zoo's.

    Raises UnsafeFileError, having run nothing, if it names anything else; CheckpointError if it is damaged.
    """
    with open(path, "rb") as file:
        content = file.read()
    try:
        return NumpyUnpickler(io.BytesIO(content), encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(
            f"{path} is not a plain file of numpy arrays ({error}): it was not loaded and nothing in it was "
            "run; get the weights as .pth of tensors, or from a source that you trust."
        ) from error
    except (EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError, MemoryError) as error:
        raise CheckpointError(f"{path} is damaged or no pickle ({error}): get the file again.") from error


def load_tensors(path: str) -> Any:
    """The content of a ``.pth`` of tensors and plain values, on the CPU (``weights_only=True``).

    Raises UnsafeFileError, having run nothing, if it holds anything else; CheckpointError if it is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.search(r"GLOBAL (\S+)|Unsupported \w+ (\S+)|global[: ]+(\S+)", str(error))
        named = f" (it names {next(g for g in reason.groups() if g)})" if reason else ""
        raise UnsafeFileError(
            f"{path} is not a plain file of tensors{named}: it was not loaded and nothing in it was run; "
            "save it again as a state dict of tensors, or get it from a source that you trust."
        ) from error
    except (EOFError, RuntimeError, ValueError, OSError, zipfile.BadZipFile) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged ({first_line}): take an earlier checkpoint.") from error


_TORCHVISION_STEM = "conv1.weight"


def find_torchvision_prefix(state: Mapping[str, Any]) -> str | None:
    """The prefix under which ``state`` holds a torchvision ResNet ("" or such as "backbone."), or None."""
    for key in state:
        prefix = key[: -len("layer1.0.conv1.weight")]
        if key.endswith("layer1.0.conv1.weight") and prefix + _TORCHVISION_STEM in state:
            return prefix
    return None


def convert_torchvision_resnet(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A torchvision ResNet's state dict under Detectron2's names, without a prefix.

    ``layer1.0.conv2.weight`` becomes ``res2.0.conv2.weight``, ``bn2`` its ``norm``, ``downsample`` its
    ``shortcut``; the classifier and the batch counters are left out. Raises ValueError if it is no ResNet.
    """
    prefix = find_torchvision_prefix(state)
    if prefix is None:
        raise ValueError("Not the state dict of a torchvision ResNet: it has no layer1.0.conv1.weight.")
    converted = {}
    for key, value in state.items():
        name = key[len(prefix) :]
        if not key.startswith(prefix) or name.endswith("num_batches_tracked"):
            continue
        new_name = _detectron2_name(name)
        if new_name is not None:
            converted[new_name] = value
    return converted


def _detectron2_name(name: str) -> str | None:
    """Detectron2's name of one torchvision ResNet entry; None for what a backbone does not have."""
    if name.startswith("conv1."):
        return f"stem.{name}"
    if name.startswith("bn1."):
        return f"stem.conv1.norm.{name[len('bn1.') :]}"
    match = re.fullmatch(r"layer([1-4])\.(\d+)\.(.+)", name)
    if match is None:
        return None
    stage, block, rest = int(match[1]) + 1, match[2], match[3]
    rest = re.sub(r"^bn(\d)\.", r"conv\1.norm.", rest)
    rest = rest.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    return f"res{stage}.{block}.{rest}"


@dataclass(frozen=True)
class Preprocessing:
    """What the config does to pixels before the backbone, and the choice in it that goes with that."""

    format: str
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    stride_in_1x1: bool
    depth: int
    groups: int = 1

    @classmethod
    def from_config(cls, cfg) -> "Preprocessing":
        """Of ``INPUT.FORMAT``, ``MODEL.PIXEL_{MEAN,STD}`` and ``MODEL.RESNETS``."""
        resnets = cfg.MODEL.RESNETS
        return cls(
            cfg.INPUT.FORMAT,
            tuple(cfg.MODEL.PIXEL_MEAN),
            tuple(cfg.MODEL.PIXEL_STD),
            resnets.STRIDE_IN_1X1,
            resnets.DEPTH,
            resnets.NUM_GROUPS,
        )

    def check(self, source: str, path: str) -> None:
        """UserError listing the keys that are not as weights of ``source`` (msra, torchvision) want them.

        MSRA's ResNets saw BGR pixels minus the mean and stride in the first 1x1 convolution; torchvision's
        saw RGB pixels normalised by ImageNet's mean and deviation (here times 255) and stride in the 3x3.
        """
        if source == MSRA and self.groups > 1:
            return  # ResNeXt of the same zoo: other pixels for each model
        mean = (123.675, 116.28, 103.53)
        wanted_format, wanted_mean, wanted_std, wanted_stride = (
            ("BGR", mean[::-1], (1.0, 1.0, 1.0), True)
            if source == MSRA
            else ("RGB", mean, (58.395, 57.12, 57.375), False)
        )
        wrong = []
        if self.format != wanted_format:
            wrong.append(f"INPUT.FORMAT {wanted_format}")
        if not np.allclose(self.pixel_mean, wanted_mean, atol=0.05):
            wrong.append(f"MODEL.PIXEL_MEAN {list(wanted_mean)}")
        if not np.allclose(self.pixel_std, wanted_std, atol=0.05):
            wrong.append(f"MODEL.PIXEL_STD {list(wanted_std)}")
        if self.depth >= 50 and self.stride_in_1x1 != wanted_stride:
            wrong.append(f"MODEL.RESNETS.STRIDE_IN_1X1 {wanted_stride}")
        if wrong:
            raise UserError(f"{path} holds {source} weights, which need {', '.join(wrong)}: set them.")
