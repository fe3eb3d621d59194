"""AOTInductor: torch.export's program compiled to machine code, in one file that torch runs.

The code is for the device of the model and the instruction set of this processor.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch.export import ExportedProgram

# Under this name torch writes the device that the code is for.
DEVICE_KEY = "AOTI_DEVICE_KEY"


def require_compiler() -> str:
    """The C++ compiler that AOTInductor would call.

    Raises:
        ValueError: there is none.
    """
    # Private, but this is the search that the compilation makes, environment variables included.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "AOTInductor needs a C++ compiler and found none: install g++, set the environment variable CXX "
            "to one, or choose another format."
        ) from error


def write_package(program: ExportedProgram, file: BinaryIO, metadata: Mapping[str, str]) -> None:
    """Compile `program`, which takes minutes, and write the package with `metadata` inside.

    What the compilation leaves behind, several times the size of the weights, is removed.

    Raises:
        ValueError: the C++ compiler does not take the code.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import CppCompileError
    from torch._inductor.utils import fresh_inductor_cache

    compiler = require_compiler()
    # Headers that are compiled beforehand serve one compilation here and would stay in the user's cache.
    configs = {
        "aot_inductor.metadata": dict(metadata),
        "aot_inductor.precompile_headers": False,
        "cpp_cache_precompile_headers": False,
    }
    failure = None
    # A folder of our own, as torch's is kept where the compilation breaks off; nothing else is removed.
    with tempfile.TemporaryDirectory(prefix="dfm_d2_aoti_") as folder, fresh_inductor_cache(dir=folder):
        try:
            aoti_compile_and_package(program, package_path=file, inductor_configs=configs)
        except RuntimeError as error:
            failure = getattr(error, "inner_exception", error)
            if not isinstance(failure, CppCompileError):
                raise
    if failure is not None:
        lines = failure.output.strip().splitlines() or ["without a word"]
        complaint = next((line for line in lines if "error" in line), lines[-1])
        raise ValueError(
            f"{compiler} does not compile AOTInductor's code ({complaint.strip()}): set the environment "
            "variable CXX to another compiler, or choose another format."
        ) from failure


def load_package(path: Path) -> tuple[Callable[..., Sequence[torch.Tensor]], Mapping[str, str]]:
    """A function of keyword tensors and the metadata of a file of write_package. Its machine code is run.

    Raises:
        ValueError: another file, or one for another machine.
    """
    from torch._inductor import aoti_load_package

    try:
        package = aoti_load_package(str(path))
        return package, package.get_metadata()
    except RuntimeError as error:
        raise ValueError(
            f"{path} is no AOTInductor package that this torch and this machine can run: export it again"
        ) from error
