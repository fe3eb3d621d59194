"""The op `dfm::flow_loss`: the loss of one predictor, its gradients written along with it.

Shapes: B images, N proposals, K classes.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dfm_kernels import reference
from dfm_kernels.dispatch import use_triton
from dfm_kernels.reference import FlowLoss

KINDS = ("focal", "quality_focal")


def flow_loss(
    class_logits: Tensor,
    x_1_hat: Tensor,
    target_classes: Tensor,
    target_x_1: Tensor,
    t: Tensor,
    normalizer: Tensor,
    *,
    signal_scale: float,
    kind: str,
    alpha: float,
    gamma: float,
    velocity_max: float,
    backend: str = "auto",
) -> FlowLoss:
    """The terms of dfm_kernels.reference.flow_loss, which says what they and the arguments are.

    Where the Triton kernel runs, gradients reach `class_logits` and `x_1_hat` only, and cannot be
    differentiated again.

    Raises:
        BackendError: "triton" was asked for where it cannot run.
        ValueError: shapes that do not belong together, or an unknown `kind`.
    """
    if kind not in KINDS:
        raise ValueError(f"class loss must be 'focal' or 'quality_focal', got {kind!r}")
    options = {
        "signal_scale": signal_scale,
        "kind": kind,
        "alpha": alpha,
        "gamma": gamma,
        "velocity_max": velocity_max,
    }
    arguments = (class_logits, x_1_hat, target_classes, target_x_1, t, normalizer)
    unsupported = ""
    if x_1_hat.dtype != torch.float32 or target_x_1.dtype != torch.float32:
        unsupported = f"boxes are {x_1_hat.dtype} and {target_x_1.dtype}, the kernel computes in float32"
    elif class_logits.shape[-1] < 1:
        unsupported = "there is no class"
    if not use_triton("flow_loss", backend, x_1_hat, unsupported):
        return reference.flow_loss(*arguments, **options)
    batch = class_logits.shape[:2]
    if x_1_hat.shape != (*batch, 4) or target_x_1.shape != (*batch, 4) or target_classes.shape != batch:
        raise ValueError(
            f"class_logits {tuple(class_logits.shape)}, boxes {tuple(x_1_hat.shape)}, "
            f"{tuple(target_x_1.shape)} and target_classes {tuple(target_classes.shape)} must be "
            "(B, N, K), (B, N, 4) twice and (B, N)"
        )
    if t.dim() > 1 or (t.dim() == 1 and t.shape[0] not in (1, batch[0])):
        raise ValueError(f"t must have shape () or ({batch[0]},), got {tuple(t.shape)}")
    terms = _FlowLossFunction.apply(*arguments, signal_scale, kind, alpha, gamma, velocity_max)
    return FlowLoss(*terms.unbind())


class _FlowLossFunction(torch.autograd.Function):
    """Forward writes the gradients, backward scales them."""

    @staticmethod
    def forward(ctx, class_logits, x_1_hat, target_classes, target_x_1, t, normalizer, *options):
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        terms, *gradients = _flow_loss(
            class_logits, x_1_hat, target_classes, target_x_1, t, normalizer, *options, wanted
        )
        ctx.save_for_backward(*gradients)
        ctx.logits_dtype = class_logits.dtype
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx, d_terms):
        d_cls, d_l1, d_giou, d_velocity = ctx.saved_tensors
        w_cls, w_l1, w_giou, w_velocity = d_terms.unbind()
        d_boxes = w_l1 * d_l1 + w_giou * d_giou + w_velocity * d_velocity
        return ((w_cls * d_cls).to(ctx.logits_dtype), d_boxes, *[None] * 9)


@torch.library.custom_op("dfm::flow_loss", mutates_args=())
def _flow_loss(
    class_logits: Tensor,
    x_1_hat: Tensor,
    target_classes: Tensor,
    target_x_1: Tensor,
    t: Tensor,
    normalizer: Tensor,
    signal_scale: float,
    kind: str,
    alpha: float,
    gamma: float,
    velocity_max: float,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # Only here: where there is no Triton, the reference must do without this import.
    from dfm_kernels.triton.flow_loss import flow_loss as launch

    options = (signal_scale, kind, alpha, gamma, velocity_max, gradients)
    return tuple(launch(class_logits, x_1_hat, target_classes, target_x_1, t, normalizer, *options))


@_flow_loss.register_fake
def _(
    class_logits, x_1_hat, target_classes, target_x_1, t, normalizer, s, kind, alpha, gamma, top, gradients
):
    shapes = [class_logits.shape, *[x_1_hat.shape] * 3] if gradients else [(0,)] * 4
    found = [x_1_hat.new_empty(shape, dtype=torch.float32) for shape in shapes]
    return x_1_hat.new_empty(4), *found
