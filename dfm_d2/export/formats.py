"""Writing a detector as TorchScript, ONNX, pt2 or an AOTInductor package.

Shapes: B images, N noise boxes of all passes.
"""

import copy
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from dfm_kernels import kernels
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dfm_d2.data.files import write_atomically
from dfm_d2.detection.detector import FlowDetector
from dfm_d2.detection.tensor_detector import TensorDetector
from dfm_d2.export.aoti import require_compiler, write_package
from dfm_d2.export.decompositions import onnx_decompositions
from dfm_d2.framework import TracingAdapter

# Format: the file's name.
FORMATS = {"torchscript": "model.ts", "onnx": "model.onnx", "pt2": "model.pt2", "aoti": "model.aoti.pt2"}
# Under this name a file carries what its user must know: ExportSettings and Preparation, as JSON.
ABOUT = "dfm_d2.json"
OPSET = 20
# Greatest batch and side of the dynamic shapes; torch.export wants a bound.
_MAX_BATCH, _MAX_SIDE = 1024, 16384
# Least side, in units of the divisibility: torch.export takes a level that is one pixel wide for a constant.
MIN_UNITS = 3

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportSettings:
    """What is fixed in the file. None: as the config has it.

    steps: K. proposals: N of a noise pass. predictors: indices of those that answer (TIME "shared" only).
    noise: "input" (the last input of the file is x_0) or "constant" (of the sampler's seed, so that results
    repeat).
    """

    steps: int | None = None
    proposals: int | None = None
    predictors: Sequence[int] = ()
    noise: str = "input"

    def __post_init__(self) -> None:
        if self.noise not in ("input", "constant"):
            raise ValueError(f'noise is {self.noise!r}: set it to "input" or "constant"')


@dataclass(frozen=True)
class Preparation:
    """How an image is made ready for the file, and what its answers mean.

    format: "RGB" or "BGR". min_size, max_size: of the sides after the resize, 0: none. divisibility: of the
    padded sides. min_side: least padded side. class_names: by index. seed: of the noise.
    """

    format: str
    min_size: int
    max_size: int
    divisibility: int
    min_side: int
    class_names: tuple[str, ...]
    seed: int

    @classmethod
    def from_config(cls, cfg, model: FlowDetector, class_names: Sequence[str]) -> "Preparation":
        unit = max(model.backbone.size_divisibility, 1)
        return cls(
            format=cfg.INPUT.FORMAT,
            min_size=cfg.INPUT.MIN_SIZE_TEST,
            max_size=cfg.INPUT.MAX_SIZE_TEST,
            divisibility=unit,
            min_side=MIN_UNITS * unit,
            class_names=tuple(class_names),
            seed=model.sampler.settings.seed,
        )


def prepared_model(model: FlowDetector, settings: ExportSettings) -> FlowDetector:
    """A copy in evaluation mode with the sampler of `settings`.

    Raises:
        ValueError: a sampler that cannot be a file of its own, or predictors that are not there.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    changes: dict[str, Any] = {"predictors": tuple(settings.predictors)} if settings.predictors else {}
    if settings.steps is not None:
        # An explicit grid has its own number of steps.
        changes |= {"steps": settings.steps, "time_grid": ()}
    if settings.proposals is not None:
        changes["num_proposals"] = settings.proposals
    model.sampler.settings = replace(model.sampler.settings, **changes)
    sampler = model.sampler.settings
    if sampler.renewal_thresh > 0:
        raise ValueError(
            "MODEL.DFM.SAMPLER.RENEWAL_THRESH draws noise by image id, which a file cannot: set it to 0"
        )
    if model.predictors[0].pooler.sampling_ratio == 0:
        raise ValueError(
            "MODEL.DFM.HEAD.POOLER_SAMPLING_RATIO 0 takes as many samples as the largest box needs, which "
            "is no fixed graph: export a model trained with 1 or more"
        )
    for t in sampler.grid[:-1]:
        model.predictors.answering(t, sampler.predictors)
    return model


def export_model(
    model: FlowDetector,
    format: str,
    folder: str | Path,
    preparation: Preparation,
    settings: ExportSettings,
    sample: Tensor,
) -> Path:
    """Write the file of `format` into `folder`; returns its path.

    Args:
        sample: an image `(3, H, W)`, pixels 0 to 255, of which a trace is made; other sizes work after it.

    Raises:
        ValueError: an unknown format, ONNX without its packages, AOTInductor without a compiler, or see
            prepared_model.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}: set it to one of {', '.join(FORMATS)}")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if format == "onnx" and missing:
        raise ValueError(f"ONNX needs {' and '.join(missing)}: pip install 'dfm_d2[export]'")
    if format == "aoti":
        require_compiler()
    model = prepared_model(model, settings)
    path = Path(folder) / FORMATS[format]
    about = json.dumps(asdict(preparation) | _contract(model, settings, format))
    with _recording():
        if format == "torchscript":
            _save_torchscript(model, settings, sample.to(model.device), path, about)
        else:
            program = exported_program(model, settings)
            save = {"pt2": _save_pt2, "onnx": _save_onnx, "aoti": _save_aoti}[format]
            save(program, path, about)
    _logger.info("Wrote %s (%.1f MiB)", path, path.stat().st_size / 2**20)
    return path


def _contract(model: FlowDetector, settings: ExportSettings, format: str) -> dict[str, Any]:
    sampler = model.sampler.settings
    return {
        "file_format": format,
        "noise": settings.noise,
        "noise_passes": sampler.noise_passes,
        "num_noise_boxes": sampler.num_proposals * sampler.noise_passes,
        "time_grid": list(sampler.grid),
        "predictors": list(sampler.predictors) or list(range(model.num_predictors)),
    }


@contextmanager
def _recording() -> Iterator[None]:
    """The ops' references, and attention as its parts, which every format knows; no warnings of exporters."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with kernels("torch"), torch.no_grad(), warnings.catch_warnings():
            for category in (torch.jit.TracerWarning, FutureWarning, DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


# ------------------------------------------------------------------ TorchScript


def tracing_adapter(model: FlowDetector, settings: ExportSettings, image: Tensor) -> nn.Module:
    """The framework's TracingAdapter around one image (batch 1), and its noise where that is an input."""
    if settings.noise == "constant":
        from_noise = TensorDetector(model, constant=True).noise
        return TracingAdapter(model, [{"image": image}], lambda m, items: m.inference(items, from_noise))

    def inference(model: FlowDetector, items: list[dict]) -> list[dict]:
        x_0 = torch.stack([item["x_0"] for item in items])
        return model.inference([{"image": item["image"]} for item in items], x_0)

    x_0 = model.sampler.noise([0], image.device)[0]
    return TracingAdapter(model, [{"image": image, "x_0": x_0}], inference)


def _save_torchscript(
    model: FlowDetector, settings: ExportSettings, image: Tensor, path: Path, about: str
) -> None:
    adapter = tracing_adapter(model, settings, image)
    traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    write_atomically(path, lambda file: torch.jit.save(traced, file, _extra_files={ABOUT: about}))


# ------------------------------------------------- pt2, AOTInductor's and ONNX


def exported_program(model: FlowDetector, settings: ExportSettings) -> ExportedProgram:
    """torch.export's program of TensorDetector, with dynamic batch, height and width."""
    unit = max(model.backbone.size_divisibility, 1)
    detector = TensorDetector(model, settings.noise == "constant")
    batch = Dim("batch", min=1, max=_MAX_BATCH)
    height = Dim("height_units", min=MIN_UNITS, max=_MAX_SIDE // unit)
    width = Dim("width_units", min=MIN_UNITS, max=_MAX_SIDE // unit)
    # Two images, as the exporter takes a size of 1 for a constant.
    images = torch.zeros(2, 3, 4 * unit, 5 * unit, device=model.device)
    sizes = images.new_tensor([[4.0 * unit, 5.0 * unit]]).expand(2, 2).contiguous()
    inputs = {"images": images, "image_sizes": sizes}
    dynamic: dict[str, Mapping[int, Any]] = {
        "images": {0: batch, 2: unit * height, 3: unit * width},
        "image_sizes": {0: batch},
    }
    if settings.noise == "input":
        inputs["x_0"] = model.sampler.noise([0, 1], model.device)
        dynamic["x_0"] = {0: batch}
    return torch.export.export(detector, (), kwargs=inputs, dynamic_shapes=dynamic)


def _save_pt2(program: ExportedProgram, path: Path, about: str) -> None:
    write_atomically(path, lambda file: torch.export.save(program, file, extra_files={ABOUT: about}))


def _save_aoti(program: ExportedProgram, path: Path, about: str) -> None:
    write_atomically(path, lambda file: write_package(program, file, {ABOUT: about}))


def _save_onnx(program: ExportedProgram, path: Path, about: str) -> None:
    """One file of standard operators: our ops are plain torch here, the rest is decomposed."""
    import onnx  # an optional extra

    with torch.no_grad():
        program = program.run_decompositions(onnx_decompositions())
        written = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            output_names=["boxes", "scores", "classes", "count"],
        )
    proto = written.model_proto
    onnx.helper.set_model_props(proto, {ABOUT: about})
    onnx.checker.check_model(proto)
    write_atomically(path, lambda file: file.write(proto.SerializeToString()))
