"""Writing a module as TorchScript, ONNX, pt2 or an AOTInductor package.

Shapes: M bags of S entries each, V rows of C channels.
"""

import importlib.util
import io
import json
import logging
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from dfm_kernels import kernels
from torch import Tensor, nn
from torch.export import ExportedProgram

from dfm_d2.data.files import write_atomically
from dfm_d2.errors import UserError
from dfm_d2.export import ABOUT, FORMATS

_OPSET = 20

_logger = logging.getLogger(__name__)


def export_model(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    format: str,
    folder: str | Path,
    about: Mapping[str, Any],
    dynamic_shapes: Mapping[str, Any] | None = None,
    output_names: Sequence[str] = (),
) -> Path:
    """Write the file of `format` into `folder`; returns its path.

    Args:
        module: of tensors, by keyword; for TorchScript, which is traced, in the order of `inputs`.
        inputs: a sample of each input, by name.
        about: what the file says of itself, as JSON.
        dynamic_shapes: of torch.export, for every format but TorchScript. output_names: of the ONNX graph.

    Raises:
        UserError: an unknown format, ONNX without its packages, or AOTInductor without a compiler.
    """
    if format not in FORMATS:
        raise UserError(f"format is {format!r}: set it to one of {', '.join(FORMATS)}")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if format == "onnx" and missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}: pip install 'dfm_d2[export]'")
    if format == "aoti":
        _require_compiler()
    path = Path(folder) / FORMATS[format]
    extra = {ABOUT: json.dumps(about)}
    with recording():
        if format == "torchscript":
            traced = torch.jit.trace(module, tuple(inputs.values()), check_trace=False)
            torch.jit.save(traced, content := io.BytesIO(), _extra_files=extra)
            write_atomically(path, lambda file: _copy_without_sources(content, file))
        else:
            program = torch.export.export(module, (), kwargs=dict(inputs), dynamic_shapes=dynamic_shapes)
            _forget_sources(program)
            if format == "aoti":
                write_atomically(path, lambda file: write_aoti(program, file, extra))
            elif format == "pt2":
                # Pickled, and of no use in a file that is only run.
                program.example_inputs = None
                write_atomically(path, lambda file: torch.export.save(program, file, extra_files=extra))
            else:
                content = _onnx_file(program, output_names, extra)
                write_atomically(path, lambda file: file.write(content))
    _logger.info("Wrote %s (%.1f MiB)", path, path.stat().st_size / 2**20)
    return path


def _forget_sources(program: ExportedProgram) -> None:
    """Drop from which lines of which files operators come: those paths are of this machine."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)


def _copy_without_sources(content: BinaryIO, file: BinaryIO) -> None:
    """The same of a TorchScript file, which has them as members that loading does not need."""
    with zipfile.ZipFile(content) as source, zipfile.ZipFile(file, "w") as target:
        for member in source.infolist():
            if not member.filename.endswith(".debug_pkl"):
                target.writestr(member, source.read(member))


@contextmanager
def recording() -> Iterator[None]:
    """Within it models are recorded: the ops' references, attention as its parts, and no warnings."""
    import torchvision.ops  # noqa: F401  (its first import calls an operator that no trace can hold)

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with kernels("torch"), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _onnx_file(program: ExportedProgram, output_names: Sequence[str], extra: Mapping[str, str]) -> bytes:
    """One file of standard operators."""
    import onnx  # an optional extra

    table = torch.export.default_decompositions()
    for op in (torch.ops.aten._embedding_bag.default, torch.ops.aten._embedding_bag_forward_only.default):
        table[op] = _embedding_bag
    program, options = program.run_decompositions(table), {"dynamo": True, "verbose": False}
    proto = torch.onnx.export(
        program, opset_version=_OPSET, output_names=list(output_names), **options
    ).model_proto
    for node in proto.graph.node:  # from which lines of which files they come
        del node.metadata_props[:]
    onnx.helper.set_model_props(proto, extra)
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def _embedding_bag(
    weight, indices, offsets, scale_grad_by_freq=False, mode=0, sparse=False, per_sample_weights=None, *others
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bags that are all of one size, as those of the reference's RoIAlign: weighted sums.

    Entry by entry: one gather of all entries would hold S times the answer in memory, and the exporter's own
    translation loops over the bags.

    Args:
        weight: `(V, C)`. indices, per_sample_weights: `(M S,)`. offsets: `(M,)`.
    """
    if mode != 0 or per_sample_weights is None:
        raise NotImplementedError("only the weighted sums of RoIAlign are exported")
    bags = offsets.shape[0]
    rows, shares = indices.view(bags, -1), per_sample_weights.view(bags, -1)
    total = weight.index_select(0, rows[:, 0]) * shares[:, :1]
    for entry in range(1, rows.shape[1]):
        total = total + weight.index_select(0, rows[:, entry]) * shares[:, entry : entry + 1]
    unused = offsets.new_empty(0)
    return total, unused, unused, unused


def _require_compiler() -> None:
    # Private, but this is the search that the compilation makes, environment variables included.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            "AOTInductor needs a C++ compiler and found none: install g++, set the environment variable CXX "
            "to one, or choose another format."
        ) from error


def write_aoti(program: ExportedProgram, file: BinaryIO, metadata: Mapping[str, str]) -> None:
    """Compile `program`, which takes minutes, and write AOTInductor's package with `metadata` inside.

    Its machine code is for the device of the model and the instruction set of this processor. What the
    compilation leaves behind, several times the size of the weights, is removed.

    Raises:
        UserError: the C++ compiler does not take the code.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import CppCompileError
    from torch._inductor.utils import fresh_inductor_cache

    # Headers that are compiled beforehand serve one compilation here and would stay in the user's cache.
    configs = dict.fromkeys(("aot_inductor.precompile_headers", "cpp_cache_precompile_headers"), False)
    configs["aot_inductor.metadata"] = dict(metadata)
    failure = None
    # A folder of our own, as torch's is kept, with a warning, where an error passes through.
    with tempfile.TemporaryDirectory(prefix="dfm_d2_aoti_") as folder, fresh_inductor_cache(dir=folder):
        try:
            aoti_compile_and_package(program, package_path=file, inductor_configs=configs)
        except RuntimeError as error:
            failure = getattr(error, "inner_exception", error)
            if not isinstance(failure, CppCompileError):
                raise
    if failure is not None:
        lines = failure.output.strip().splitlines()
        complaint = next((line.strip() for line in lines if "error" in line), "it does not say why")
        raise UserError(
            f"the C++ compiler does not take AOTInductor's code ({complaint}): set the environment variable "
            "CXX to another one, or choose another format."
        ) from failure
