"""Compiling the kernels without a GPU: registers, spills and shared memory of what ships."""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
import triton.backends.nvidia.compiler as nvidia
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dfm_kernels.box_flow_update.triton import box_flow_update
from dfm_kernels.dynamic_interaction.triton import dynamic_interaction
from dfm_kernels.flow_loss.triton import flow_loss
from dfm_kernels.multilevel_roi_align.triton import multilevel_roi_align

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", int: "i32", float: "fp32"}


class Configuration(NamedTuple):
    """One kernel as an op launches it. name: for people."""

    name: str
    kernel: triton.JITFunction
    signature: dict
    constants: dict
    options: dict


class Compiled(NamedTuple):
    """registers a thread. spills: bytes of stores and loads (gfx942: vector registers). shared: bytes."""

    configuration: str
    target: str
    registers: int
    spills: int
    shared: int


def configurations() -> Iterator[Configuration]:
    """VOC, COCO and LVIS classes, every variant of every kernel, float32 and bfloat16 answers.

    Raises:
        RuntimeError: kernels are interpreted in this process (TRITON_INTERPRET).
    """
    boxes, t, both = torch.zeros(1, 1, 4), torch.zeros(1), (torch.float32, torch.bfloat16)
    for num_classes, dtype in product((20, 80, 1203), both):
        answers = [torch.zeros(2, 1, 1, size, dtype=dtype) for size in (4, num_classes)]
        tensors = [boxes, *answers, t, t, torch.zeros(1, 2)]
        name = f"box_flow_update K={num_classes} {_TYPES[dtype]}"
        yield from _launched([name], box_flow_update, tensors, [1.0] * 5)
    # Beyond K = 80 the tile is the same.
    for num_classes, gradients, dtype in product((20, 80), ("without", "with"), both):
        logits, classes = torch.zeros(1, 1, num_classes, dtype=dtype), torch.zeros(1, 1, dtype=torch.int64)
        name = f"flow_loss K={num_classes} {gradients} gradients {_TYPES[dtype]}"
        tensors = [logits, boxes, classes, boxes, t, t]
        yield from _launched([name], flow_loss, tensors, [1.0] * 3, gradients == "with")
    # Four levels, fixed and adaptive samples.
    for (channels, cells, samples), dtype in product(((128, 5, 1), (256, 7, 2), (256, 7, 0)), both):
        name = f"multilevel_roi_align C={channels} P={cells} S={samples} {_TYPES[dtype]}"
        names = [f"{name} forward", f"{name} backward"]
        features = [torch.zeros(1, channels, 8, 8, dtype=dtype, requires_grad=True) for _ in range(4)]
        yield from _launched(names, multilevel_roi_align, features, boxes, cells, samples, [0.25, 224.0])
    # Small and full heads; float32 is multiplied as TF32.
    for (cells, channels, hidden), dtype in product(((25, 128, 32), (49, 256, 64)), both):
        name = f"dynamic_interaction P^2={cells} C={channels} H={hidden} {_TYPES[dtype]}"
        shapes = ((1, cells, channels), (1, channels, hidden), (1, hidden, channels))
        tensors = [torch.zeros(shape, dtype=dtype) for shape in shapes]
        tensors += [torch.zeros(1, size) for size in (hidden, hidden, channels, channels)]
        yield from _launched([f"{name} forward"], dynamic_interaction, tensors, False)
        names = [f"{name} {title}" for title in ("forward and statistics", "backward out", "backward in")]
        tensors[0].requires_grad_()
        yield from _launched(names, dynamic_interaction, tensors, True)


def _launched(names: Sequence[str], op: Callable, *arguments) -> list[Configuration]:
    """What an op and, where it has one, its backward launch, one of `names` each; nothing is computed."""
    found = []

    def record(kernel, *values, grid, warmup, **keywords):
        constants = {key: value for key, value in keywords.items() if key in kernel.arg_names}
        signature = dict(zip(kernel.arg_names, map(_type_of, values)))
        options = {key: value for key, value in keywords.items() if key not in constants}
        found.append((kernel, signature | dict.fromkeys(constants, "constexpr"), constants, options))

    with mock.patch.object(triton.JITFunction, "run", record):
        answer = op(*arguments)
        first = answer if isinstance(answer, Tensor) else answer[0]
        if first.requires_grad:
            first.sum().backward()
    if len(found) != len(names):
        raise RuntimeError(f"{names} launch {len(found)} kernels: unset TRITON_INTERPRET to compile them")
    return [Configuration(name, *launch) for name, launch in zip(names, found)]


def _type_of(value: object) -> str | tuple:
    """Of an argument of a kernel, as Triton names it."""
    if isinstance(value, tuple):
        return tuple(map(_type_of, value))
    return f"*{_TYPES[value.dtype]}" if isinstance(value, Tensor) else _TYPES[type(value)]


def missing_targets() -> dict[str, str]:
    """Those of TARGETS for which this Triton has not all it needs, and why."""
    try:
        from triton.backends.amd.compiler import HIPBackend

        if hasattr(HIPBackend, "path_to_rocm_lld"):  # Tritons that do not bring their own linker
            HIPBackend.path_to_rocm_lld()
    except Exception as error:  # noqa: BLE001  (Triton raises just that)
        return {"gfx942": str(error)}
    return {}


def compile_for(configuration: Configuration, target: str) -> Compiled:
    """Compile one configuration for one of TARGETS.

    Raises:
        RuntimeError: the assembler fails.
    """
    name, function, signature, constants, options = configuration
    source = ASTSource(function, signature, constants)
    kernel = triton.compile(source, target=TARGETS[target], options=options)
    if "ptx" in kernel.asm:
        registers, spills = _assemble(kernel.asm["ptx"], target)
    else:
        code = kernel.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", code)[1])
        spills = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", code)[1])
    return Compiled(name, target, registers, spills, kernel.metadata.shared)


def _assemble(ptx: str, target: str) -> tuple[int, int]:
    """Registers and bytes of spills that the assembler reports."""
    folder = Path(nvidia.__file__).parent / "bin"
    # For sm_90 Triton writes PTX that only the newer of its two assemblers reads, as sm_90a.
    newer = folder / "ptxas-blackwell"
    assembler = newer if newer.exists() else folder / "ptxas"
    name = "sm_90a" if target == "sm_90" else target
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "kernel.ptx").write_text(ptx)
        command = [assembler, "-v", f"--gpu-name={name}", f"{work}/kernel.ptx", "-o", f"{work}/kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{assembler.name} for {name}: {done.stderr.strip()}")
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    if registers is None or not spills:
        raise RuntimeError(f"{assembler.name} does not say registers and spills: {done.stderr.strip()}")
    return int(registers[1]), sum(map(int, spills))
