"""Reading weight files of others: without running code from them, and never with the wrong preprocessing."""

import collections
import io
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dfm_d2.engine.keys import get_key
from dfm_d2.errors import CheckpointError, UnsafeFileError, UserError
from dfm_d2.framework import CfgNode

# How the weights were trained: the pixels that they want.
MSRA = "msra"
TORCHVISION = "torchvision"
_SOURCES = {"Caffe2": MSRA, "Detectron2 Model Zoo": MSRA, "torchvision": TORCHVISION}
_STRIDE = "MODEL.RESNETS.STRIDE_IN_1X1"


# A file may hold arrays of plain numbers only: as objects or records, its bytes would become pointers.
_TYPES = "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16".split()


def _bytes(data: Any, encoding: str = "latin1") -> bytes:
    """Raw data: text, where Python 2 or ``_codecs.encode`` wrote it; any other codec is refused."""
    if type(data) not in (str, bytes, bytearray) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"a {type(data).__name__} as raw data, encoded as {encoding!r}")
    return data.encode("latin1") if isinstance(data, str) else bytes(data)


class _Type:
    """Stands for ``numpy.dtype``, whose own state is never set: one of _TYPES in one byte order."""

    def __init__(self, name: Any, *unused: Any) -> None:
        if name not in _TYPES:
            raise pickle.UnpicklingError(f"the type {name!r}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        version, order, *rest = state
        if order not in ("<", ">", "=", "|") or rest != [None, None, None, -1, -1, 0]:
            raise pickle.UnpicklingError(f"a type of state {state!r}")
        self.dtype = self.dtype.newbyteorder(order)

    @staticmethod
    def of(value: Any) -> np.dtype:
        """The checked dtype."""
        if type(value) is not _Type:
            raise pickle.UnpicklingError(f"the type {value!r}")
        return value.dtype


class _Array(np.ndarray):
    """What ``_reconstruct`` makes: an array whose state holds a checked dtype and bytes of that length."""

    def __setstate__(self, state: Any) -> None:
        version, shape, kind, is_fortran, data = state
        super().__setstate__((version, shape, _Type.of(kind), bool(is_fortran), _bytes(data)))


def _scalar(kind: Any, data: Any) -> np.generic:
    (value,) = np.frombuffer(_bytes(data), _Type.of(kind))
    return value


def _frombuffer(data: Any, kind: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
    array = np.frombuffer(bytearray(_bytes(data)), _Type.of(kind))
    return array.reshape(shape, order=order) if axes is None else array.reshape(shape).transpose(axes)


def _numpy_globals() -> dict[tuple[str, str], Any]:
    """{(module, name): object} of what a pickle of numpy arrays may name, none of which is numpy's own."""
    allowed: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): "ndarray",  # only ever an argument
        ("numpy", "dtype"): _Type,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("_codecs", "encode"): _bytes,
        ("__builtin__", "bytes"): lambda: b"",  # how protocol 2 writes no bytes
    }
    for package in ("numpy.core", "numpy._core"):
        allowed[(f"{package}.multiarray", "_reconstruct")] = lambda *unused: _Array(0)
        allowed[(f"{package}.multiarray", "scalar")] = _scalar
        allowed[(f"{package}.numeric", "_frombuffer")] = _frombuffer
    return allowed


class NumpyUnpickler(pickle.Unpickler):
    """Reads pickles of numpy arrays, numbers and strings in dicts, lists and tuples, and nothing else."""

    _allowed = _numpy_globals()

    def find_class(self, module: str, name: str) -> Any:
        """The whitelisted object, or pickle.UnpicklingError; nothing is imported."""
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"the global {module}.{name}")
        found = self._allowed[(module, name)]
        # A pickle may set attributes of what it names: of a function, only those of a wrapper of its own.
        return (lambda *arguments: found(*arguments)) if callable(found) and found is not _Type else found


# What reading a damaged file raises, besides errors of its own.
DAMAGE = (EOFError, OSError, ValueError, TypeError, AttributeError, LookupError, MemoryError, ArithmeticError)
DAMAGE += (RuntimeError, AssertionError, zipfile.BadZipFile, struct.error, zlib.error)


def load_numpy_pickle(path: str) -> Any:
    """The content of a ``.pkl`` of numpy arrays, such as the Detectron2 model zoo's.

    Raises UnsafeFileError, having run nothing, if it names anything else; CheckpointError if it is damaged.
    """
    try:
        return NumpyUnpickler(io.BytesIO(Path(path).read_bytes()), encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(
            f"{path} is not a plain file of numpy arrays ({' '.join(str(error).split())}): it was not "
            "loaded and nothing in it was run; get the weights as .pth of tensors, or from a source that you "
            "trust."
        ) from error
    except DAMAGE as error:
        raise CheckpointError(f"{path} is damaged or no pickle ({error}): get the file again.") from error


def load_tensors(path: str) -> Any:
    """The content of a ``.pth`` of tensors and plain values, on the CPU (``weights_only=True``).

    Raises UnsafeFileError, having run nothing, if it holds anything else; CheckpointError if it is damaged.
    """
    try:
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.search(r"GLOBAL (\S+)|Unsupported \w+ (\S+)|global[: ]+(\S+)", str(error))
        named = f" (it names {next(g for g in reason.groups() if g)})" if reason else ""
        raise UnsafeFileError(
            f"{path} is not a plain file of tensors{named}: it was not loaded and nothing in it was run; "
            "save it again as a state dict of tensors, or get it from a source that you trust."
        ) from error
    except DAMAGE as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = "cannot be read" if isinstance(error, PermissionError) else "is damaged or not of torch.save"
        raise CheckpointError(f"{path} {what} ({first_line}): take another file.") from error


def _check_archive(path: str) -> None:
    """ValueError naming the part of a file of torch.save whose checksum is wrong: torch does not check it."""
    if zipfile.is_zipfile(path):  # not before torch 1.6, whose files have none
        with zipfile.ZipFile(path) as archive:
            parts = [part for part in archive.infolist() if part.CRC]  # 0: set_crc32_options(False)
            # What is marked as a folder, torch would take for memory as it happens to be.
            folders = [part.filename for part in parts if part.external_attr & 0x10]
            if damaged := (*folders, parts and archive.testzip())[0]:
                raise ValueError(f"the checksum of its {damaged} is wrong")


# Names of a torchvision ResNet, and what Detectron2 calls them; applied one after the other.
_DETECTRON2_NAMES = (
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)


def read_weights(path: str) -> tuple[dict[str, Any], str | None]:
    """{"model": {name: tensor or array}, ...} of a file, nothing in which is run, and whose weights they are.

    That is MSRA or TORCHVISION, for ``check_pixels``, or None where they are our own or not known.
    """
    content = load_numpy_pickle(path) if path.endswith(".pkl") else load_tensors(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a dict of weights but a {type(content).__name__}.")
    if path.endswith(".pkl") and not ("model" in content and "__author__" in content):  # of Caffe2
        blobs = content.get("blobs", content)
        _check_tensors(path, blobs)
        weights = {key: value for key, value in blobs.items() if not key.endswith("_momentum")}
        content = {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
    elif "model" not in content:
        content = {"model": content.get("state_dict", content)}
    _check_tensors(path, content["model"])
    source = _SOURCES.get(str(content.get("__author__", "")))
    if converted := convert_torchvision_resnet(content["model"]):
        return {"model": converted, "matching_heuristics": True}, source or TORCHVISION
    return content, source


def _check_tensors(path: str, weights: Any) -> None:
    """CheckpointError for anything but names with tensors or arrays of finite numbers."""
    if not isinstance(weights, dict):
        raise CheckpointError(f"{path} has no dict of weights but a {type(weights).__name__}: take another.")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor | np.ndarray | np.generic):
            what = f"a {type(value).__name__}, which is no tensor"
        elif not isinstance(value, torch.Tensor):
            what = "" if np.isfinite(value).all() else "NaN or infinite numbers"
        elif not _is_plain(value):
            what = "a tensor that is not a plain one of real numbers"
        else:
            what = "" if value.float().isfinite().all() else "NaN or infinite numbers"
        if what:
            raise CheckpointError(f"{path} has {what} as {ascii(name)[:100]}: take another, intact file.")


def _is_plain(value: torch.Tensor) -> bool:
    """Whether it holds real numbers, each of which is in memory."""
    if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes() and not value.is_complex()


def convert_torchvision_resnet(state: Mapping[str, Any]) -> dict[str, Any]:
    """A torchvision ResNet's state dict under Detectron2's names, without a prefix; empty if it is none.

    ``layer1.0.conv2.weight`` becomes ``res2.0.conv2.weight``, ``bn2`` its ``norm``, ``downsample`` its
    ``shortcut``; the classifier and the batch counters are left out.
    """
    starts = (key.removesuffix("layer1.0.conv1.weight") for key in state)
    prefix = next((p for p in starts if p not in state and f"{p}conv1.weight" in state), None)
    if prefix is None:
        return {}
    converted = {}
    for key, value in state.items():
        name = key.removeprefix(prefix)
        for pattern, replacement in _DETECTRON2_NAMES:
            name = re.sub(pattern, replacement, name)
        if key.startswith(prefix) and re.match(r"stem\.|res\d\.", name) and "num_batches" not in name:
            converted[name] = value
    return converted


# MSRA's ResNets saw BGR pixels minus the mean and stride in the first 1x1 convolution; torchvision's saw RGB
# pixels normalised by ImageNet's mean and deviation (here times 255) and stride in the 3x3.
_PIXELS = {
    MSRA: {
        "INPUT.FORMAT": "BGR",
        "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
        _STRIDE: True,
    },
    TORCHVISION: {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        _STRIDE: False,
    },
}


def check_pixels(cfg: CfgNode, source: str, path: str) -> None:
    """UserError listing the keys that are not as weights of ``source`` (msra, torchvision) want them."""
    if source == MSRA and cfg.MODEL.RESNETS.NUM_GROUPS > 1:
        return  # ResNeXt of the same zoo: other pixels for each model
    is_shallow = cfg.MODEL.RESNETS.DEPTH < 50
    wanted = {key: v for key, v in _PIXELS[source].items() if key != _STRIDE or not is_shallow}
    check_keys(cfg, wanted, f"{path} holds {source} weights")


def check_keys(cfg: CfgNode, wanted: Mapping[str, Any], said: str) -> None:
    """UserError that begins with what is said and lists the keys whose values are not as wanted."""
    wrong = []
    for key, value in wanted.items():
        found = get_key(cfg, key)
        fits = np.allclose(found, value, atol=0.05) if isinstance(value, list) else found == value
        if not fits:
            wrong.append(f"{key} {value}")
    if wrong:
        raise UserError(f"{said}, which need {', '.join(wrong)}: set them.")
