"""Compiling the kernels without a GPU: registers, spills and shared memory of what ships."""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.backends.nvidia.compiler as nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dfm_kernels.box_flow_update import triton as box_flow_update
from dfm_kernels.dynamic_interaction import triton as dynamic_interaction
from dfm_kernels.flow_loss import triton as flow_loss
from dfm_kernels.flow_loss.reference import KINDS
from dfm_kernels.multilevel_roi_align import triton as multilevel_roi_align

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Parameters by the ends of their names; the rest are float32 numbers.
_TYPES = {"_ptr": "*fp32", "_stride": "i32"}
# Pointers to the dtype of a configuration: raw answers, logits, features, grids, the matrices of queries.
_VALUE_POINTERS = {
    *("answer_ptr", "logit_ptr", "pooled_ptr", *(f"level{i}_ptr" for i in range(5))),
    *("roi_ptr", "weight_in_ptr", "weight_out_ptr", "mixed_ptr", "d_mixed_ptr"),
    *("d_roi_ptr", "d_weight_in_ptr", "d_weight_out_ptr"),
}


class Configuration(NamedTuple):
    """One kernel as it is launched. name: for people. values: dtype of what _VALUE_POINTERS name."""

    name: str
    kernel: triton.JITFunction
    constants: dict
    values: str = "fp32"
    options: dict = {}


class Compiled(NamedTuple):
    """registers a thread. spills: bytes of stores and loads (gfx942: vector registers). shared: bytes."""

    configuration: str
    target: str
    registers: int
    spills: int
    shared: int


def configurations() -> Iterator[Configuration]:
    """VOC, COCO and LVIS classes, every variant of every kernel, float32 and bfloat16 answers."""
    both = ("fp32", "bf16")
    variants = itertools.product((20, 80, 1203), ("uniform", "confidence"), both)
    for num_classes, aggregation, values in variants:
        yield Configuration(
            f"box_flow_update K={num_classes} {aggregation} {values}",
            box_flow_update._box_flow_update_fwd_kernel,
            box_flow_update.constants(num_classes, aggregation),
            values,
        )
    variants = itertools.product((20, 80), KINDS, (False, True), both)  # beyond K = 80 the tile is the same
    for num_classes, kind, gradients, values in variants:
        yield Configuration(
            f"flow_loss K={num_classes} {kind} {'with' if gradients else 'without'} gradients {values}",
            flow_loss._flow_loss_kernel,
            flow_loss.constants(num_classes, kind, gradients),
            values,
        )
    # Four levels, fixed and adaptive samples; the backward is in float32 only.
    for channels, cells, samples in ((128, 5, 1), (256, 7, 2), (256, 7, 0)):
        for direction, values in (("forward", "fp32"), ("forward", "bf16"), ("backward", "fp32")):
            yield Configuration(
                f"multilevel_roi_align C={channels} P={cells} S={samples} {direction} {values}",
                multilevel_roi_align._roi_align_kernel,
                multilevel_roi_align.constants(4, channels, cells, samples)
                | {"BACKWARD": direction == "backward"},
                values,
            )
    # Small and full heads; float32 is multiplied as TF32.
    for shape in ((25, 128, 32), (49, 256, 64)):
        for values, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            name = "dynamic_interaction P^2={} C={} H={}".format(*shape)
            for title, variant in _interaction_variants(shape, dtype).items():
                yield Configuration(f"{name} {title} {values}", *variant[:2], values, variant[2])


def _interaction_variants(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, tuple]:
    """{title: (kernel, constants, options)}"""
    op = dynamic_interaction
    outer, inner = op.backward_constants(shape, dtype)
    found = {
        f"forward{' and statistics' * statistics}": (
            op._dynamic_interaction_fwd_kernel,
            op.forward_constants(shape, statistics),
            op.FORWARD,
        )
        for statistics in (False, True)
    }
    found["backward out"] = (op._dynamic_interaction_bwd_out_kernel, outer, op.BACKWARD)
    found["backward in"] = (op._dynamic_interaction_bwd_in_kernel, inner, op.BACKWARD)
    return found


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
        RuntimeError: kernels are interpreted in this process (TRITON_INTERPRET), or the assembler fails.
    """
    if not isinstance(configuration.kernel, triton.JITFunction):
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET to compile them")
    signature = {name: _type_of(name, configuration) for name in configuration.kernel.arg_names}
    source = ASTSource(configuration.kernel, signature, configuration.constants)
    kernel = triton.compile(source, target=TARGETS[target], options=configuration.options)
    if "ptx" in kernel.asm:
        registers, spills = _assemble(kernel.asm["ptx"], target)
    else:
        code = kernel.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", code)[1])
        spills = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", code)[1])
    return Compiled(configuration.name, target, registers, spills, kernel.metadata.shared)


def _type_of(name: str, configuration: Configuration) -> str:
    if name in configuration.constants:
        return "constexpr"
    if name in _VALUE_POINTERS:
        return f"*{configuration.values}"
    if name == "class_ptr":
        return "*i64"
    if name.startswith("num_"):
        return "i32"
    return next((kind for end, kind in _TYPES.items() if name.endswith(end)), "fp32")


def _assemble(ptx: str, target: str) -> tuple[int, int]:
    """Registers and bytes of spills that the assembler reports."""
    folder = Path(nvidia.__file__).parent / "bin"
    # For sm_90 Triton writes PTX that only the newer of its two assemblers reads, as sm_90a.
    newer = folder / "ptxas-blackwell"
    assembler = newer if newer.exists() else folder / "ptxas"
    name = "sm_90a" if target == "sm_90" else target
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "kernel.ptx").write_text(ptx)
        done = subprocess.run(
            [assembler, "-v", f"--gpu-name={name}", f"{work}/kernel.ptx", "-o", f"{work}/kernel.cubin"],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"{assembler.name} for {name}: {done.stderr.strip()}")
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    if registers is None or not spills:
        raise RuntimeError(f"{assembler.name} does not say registers and spills: {done.stderr.strip()}")
    return int(registers[1]), sum(map(int, spills))
