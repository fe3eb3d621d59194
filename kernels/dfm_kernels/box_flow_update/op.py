"""The choice between reference and kernel. Forward only: training decodes endpoints by itself."""

from functools import wraps

import torch
from torch import Tensor

from dfm_kernels.box_flow_update import reference
from dfm_kernels.box_flow_update.reference import BoxFlowUpdate, expand_t
from dfm_kernels.dispatch import use_triton

_MAX_CLASSES = 8192  # in one tile


def _unsupported(x_t: Tensor, class_logits: Tensor) -> str:
    """Why the kernel cannot take these tensors; empty: it can."""
    if x_t.dtype != torch.float32:
        return f"x_t is {x_t.dtype}, the kernel computes in float32"
    if not 1 <= class_logits.shape[-1] <= _MAX_CLASSES:
        return f"there are {class_logits.shape[-1]} classes, the kernel holds 1 to {_MAX_CLASSES} in one tile"
    if class_logits.shape[0] < 1:
        return "there is no predictor"
    return ""


# `__wrapped__` alone: help and editors show the reference's signature with the docstring here.
@wraps(reference.box_flow_update, assigned=())
def box_flow_update(x_t, answers, class_logits, t, t_next, image_sizes, **options) -> BoxFlowUpdate:
    """Everything between the heads of one step and the RoIAlign of the next.

    Shapes: B images, N proposals, D predictors, K classes.

    Args:
        x_t: `(B, N, 4)` signal. answers: `(D, B, N, 4)` raw box answers. class_logits: `(D, B, N, K)`.
        t, t_next: `()` or `(B,)`, on the device, so that a CUDA graph can be replayed with others.
        image_sizes: `(B, 2)` height, width. signal_scale: s. box_weights: divide box deltas.

    Returns:
        A BoxFlowUpdate, without gradients where the Triton kernel ran.

    Raises:
        BackendError: "triton" was asked for where it cannot run.
        ValueError: shapes that do not belong together.
    """
    if answers.shape != (class_logits.shape[0], *x_t.shape) or class_logits.shape[1:3] != x_t.shape[:2]:
        raise ValueError(
            f"x_t {tuple(x_t.shape)}, answers {tuple(answers.shape)} and class_logits "
            f"{tuple(class_logits.shape)} must be (B, N, 4), (D, B, N, 4) and (D, B, N, K)"
        )
    if not use_triton("box_flow_update", x_t, _unsupported(x_t, class_logits)):
        return reference.box_flow_update(x_t, answers, class_logits, t, t_next, image_sizes, **options)
    from dfm_kernels.box_flow_update.triton import box_flow_update as on_triton

    tensors = [x_t, answers, class_logits, expand_t(t, x_t), expand_t(t_next, x_t), image_sizes]
    numbers = [options["signal_scale"], *options["box_weights"]]
    return BoxFlowUpdate(*on_triton(tensors, numbers))
