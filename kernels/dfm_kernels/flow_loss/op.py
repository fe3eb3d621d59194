"""The choice between reference and kernel, which writes the gradients along with the loss."""

from functools import wraps

import torch
from torch import Tensor

from dfm_kernels.box_flow_update.reference import expand_t
from dfm_kernels.dispatch import use_triton
from dfm_kernels.flow_loss import reference
from dfm_kernels.flow_loss.reference import FlowLoss


def _unsupported(class_logits: Tensor, x_1_hat: Tensor, target_x_1: Tensor) -> str:
    """Why the kernel cannot take these tensors; empty: it can."""
    if x_1_hat.dtype != torch.float32 or target_x_1.dtype != torch.float32:
        return f"boxes are {x_1_hat.dtype} and {target_x_1.dtype}, the kernel computes in float32"
    return "" if class_logits.shape[-1] else "there is no class"


# `__wrapped__` alone: help and editors show the reference's signature with the docstring here.
@wraps(reference.flow_loss, assigned=())
def flow_loss(class_logits, x_1_hat, target_classes, target_x_1, t, normalizer, **options) -> FlowLoss:
    """Classes, L1, GIoU and velocity of one predictor; the reference has the equations.

    Shapes: B images, N proposals, K classes.

    Args:
        class_logits: `(B, N, K)`. x_1_hat, target_x_1: `(B, N, 4)` signal.
        target_classes: `(B, N)` int64, K for background. t: `()` or `(B,)`. normalizer: `()`.
        signal_scale: s. gamma: of the class loss. velocity_max: w_max.

    Returns:
        FlowLoss of scalars in the dtype of `x_1_hat`. Where the Triton kernel ran, gradients reach
        `class_logits` and `x_1_hat` only, and cannot be differentiated again.

    Raises:
        BackendError: "triton" was asked for where it cannot run.
        ValueError: shapes that do not belong together.
    """
    batch = class_logits.shape[:2]
    if x_1_hat.shape != (*batch, 4) or target_x_1.shape != (*batch, 4) or target_classes.shape != batch:
        raise ValueError(
            f"class_logits {tuple(class_logits.shape)}, boxes {tuple(x_1_hat.shape)}, "
            f"{tuple(target_x_1.shape)} and target_classes {tuple(target_classes.shape)} must be "
            "(B, N, K), (B, N, 4) twice and (B, N)"
        )
    if not use_triton("flow_loss", x_1_hat, _unsupported(class_logits, x_1_hat, target_x_1)):
        tensors = class_logits, x_1_hat, target_classes, target_x_1, t, normalizer
        return reference.flow_loss(*tensors, **options)
    from dfm_kernels.flow_loss.triton import flow_loss as on_triton

    tensors = [class_logits, x_1_hat, target_classes, target_x_1, expand_t(t, x_1_hat), normalizer]
    numbers = [options[name] for name in ("signal_scale", "gamma", "velocity_max")]
    wanted = torch.is_grad_enabled() and (class_logits.requires_grad or x_1_hat.requires_grad)
    terms, *_ = on_triton(tensors, numbers, wanted)
    return FlowLoss(*terms.unbind())
