"""Running an exported file: tensors in, tensors out, and what the file says of itself."""

import json
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfm_d2.errors import UserError
from dfm_d2.export import ABOUT

# Of the inputs by name, in the file's order; on the CPU.
Run = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]


def load_file(path: str | Path) -> tuple[Run, dict[str, Any]]:
    """A function that runs the file of export_model, and the file's metadata.

    It computes on the CPU, an AOTInductor package on its device. Load only files that you trust: a pt2 file
    can hold pickles, and a package is machine code.

    Raises:
        UserError: a file that is not there, damaged, or not written by export_model.
        ImportError: an ONNX file where onnxruntime is not installed.
    """
    path = Path(path)
    # The longest ending first.
    loaders = {".aoti.pt2": _load_aoti, ".pt2": _load_pt2, ".onnx": _load_onnx, ".ts": _load_torchscript}
    load = next((loader for ending, loader in loaders.items() if path.name.endswith(ending)), None)
    if load is None:
        raise UserError(f"{path} ends in none of {', '.join(loaders)}: give a file of tools/export_model.py")
    if not path.is_file():
        raise UserError(f"{path} does not exist: check the path.")
    run, about = load(path)
    if not about:
        raise UserError(f"{path} has no {ABOUT}: it was not written by tools/export_model.py")
    return run, json.loads(about)


def _load_torchscript(path: Path) -> tuple[Run, str | bytes]:
    extra = {ABOUT: ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch would have no more such files written
            module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
    except RuntimeError as error:
        raise UserError(f"{path} is no TorchScript file: export it again") from error
    return lambda inputs: module(*inputs.values()), extra[ABOUT]


def _load_pt2(path: Path) -> tuple[Run, str | bytes]:
    extra = {ABOUT: ""}
    try:
        module = torch.export.load(str(path), extra_files=extra).module()
    except (RuntimeError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no pt2 file that this torch can read: export it again") from error
    return torch.no_grad()(lambda inputs: module(**inputs)), extra[ABOUT]


def _load_aoti(path: Path) -> tuple[Run, str | bytes]:
    from torch._inductor import aoti_load_package

    try:
        package = aoti_load_package(str(path))
        metadata = package.get_metadata()
    except RuntimeError as error:
        raise UserError(
            f"{path} is no AOTInductor package that this torch and this machine can run: export it again"
        ) from error
    device = metadata["AOTI_DEVICE_KEY"]  # the name that torch gives it

    def run(inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        found = package(**{name: value.to(device) for name, value in inputs.items()})
        return [value.cpu() for value in found]

    return run, metadata.get(ABOUT, "")


def _load_onnx(path: Path) -> tuple[Run, str | bytes]:
    import onnxruntime  # an optional extra; its errors have no base class of their own
    from onnxruntime.capi import onnxruntime_pybind11_state as raised

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (raised.Fail, raised.InvalidArgument, raised.InvalidGraph, raised.InvalidProtobuf) as error:
        raise UserError(f"{path} is no ONNX file that onnxruntime can read: export it again") from error

    def run(inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return [torch.from_numpy(value) for value in found]

    return run, session.get_modelmeta().custom_metadata_map.get(ABOUT, "")
