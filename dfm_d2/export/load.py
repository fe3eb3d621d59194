"""Running an exported file: tensors in, tensors out, and what the file says of itself."""

import json
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfm_d2.errors import UnsafeFileError, UserError
from dfm_d2.export import ABOUT
from dfm_d2.export.checked import checked_copy

# What torch raises for a damaged file.
_DAMAGE = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError)
_DAMAGE += (SyntaxError, EOFError, OSError, zipfile.BadZipFile)
# Of the inputs by name, in the file's order; on the CPU.
Run = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]


def load_file(path: str | Path) -> tuple[Run, dict[str, Any]]:
    """A function that runs the file of export_model, and the file's metadata.

    It computes on the CPU, an AOTInductor package on its device.

    Warning: AOTInductor packages (.aoti.pt2) and TorchScript (.ts) are programs: load only those that you
    trust. A .pt2 file is checked first and loaded without running code; an ONNX file holds none.

    Raises:
        UnsafeFileError: a pt2 file of more than tensors and torch's operators.
        UserError: a file that is not there, damaged, or not written by export_model.
        ImportError: an ONNX file where onnxruntime is not installed.
    """
    path = Path(path)
    # The longest ending first.
    loaders = {".aoti.pt2": _load_aoti, ".pt2": _load_pt2, ".onnx": _load_onnx, ".ts": _load_torchscript}
    ending = next((ending for ending in loaders if path.name.endswith(ending)), None)
    if ending is None:
        raise UserError(f"{path} ends in none of {', '.join(loaders)}: give a file of tools/export_model.py")
    if not path.is_file():
        raise UserError(f"{path} does not exist: check the path.")
    try:
        run, about = loaders[ending](str(path))
        about = about and json.loads(about)
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(
            f"{path} is not a plain file of tensors and operators ({error}): it was not "
            "loaded and nothing in it was run; export it again."
        ) from error
    except _DAMAGE as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path} is no {ending} file that can be read here ({reason}): export it again"
        ) from error
    if not about:
        raise UserError(f"{path} has no {ABOUT}: it was not written by tools/export_model.py")
    return run, about


def _load_torchscript(path: str) -> tuple[Run, str | bytes]:
    extra = {ABOUT: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch would have no more such files written
        module = torch.jit.load(path, map_location="cpu", _extra_files=extra)
    return lambda inputs: module(*inputs.values()), extra[ABOUT]


def _load_pt2(path: str) -> tuple[Run, str | bytes]:
    extra = {ABOUT: ""}
    module = torch.export.load(checked_copy(path), extra_files=extra).module()
    return torch.no_grad()(lambda inputs: module(**inputs)), extra[ABOUT]


def _load_aoti(path: str) -> tuple[Run, str | bytes]:
    from torch._inductor import aoti_load_package

    package = aoti_load_package(path)
    metadata = package.get_metadata()
    device = metadata["AOTI_DEVICE_KEY"]  # the name that torch gives it

    def run(inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        found = package(**{name: value.to(device) for name, value in inputs.items()})
        return [value.cpu() for value in found]

    return run, metadata.get(ABOUT, "")


def _load_onnx(path: str) -> tuple[Run, str | bytes]:
    import onnxruntime  # an optional extra; its errors have no base class of their own
    from onnxruntime.capi import onnxruntime_pybind11_state as raised

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except (raised.Fail, raised.InvalidArgument, raised.InvalidGraph, raised.InvalidProtobuf) as error:
        raise ValueError(str(error)) from error

    def run(inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return [torch.from_numpy(value) for value in found]

    return run, session.get_modelmeta().custom_metadata_map.get(ABOUT, "")
