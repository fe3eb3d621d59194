"""The op `dfm::sample_box_paths`: noise and D points of its path. No gradients: it makes inputs.

Shapes: B images, N proposals, D predictors.
"""

import torch
from torch import Tensor

from dfm_kernels import reference
from dfm_kernels.dispatch import use_triton
from dfm_kernels.reference import BoxPathSample


def sample_box_paths(
    seed: Tensor,
    offset: Tensor | int,
    x_1: Tensor,
    t: Tensor,
    image_sizes: Tensor,
    *,
    signal_scale: float,
    backend: str = "auto",
) -> BoxPathSample:
    """`x_0` drawn from (seed, offset), and `x_t`, `dx_t` and pixel boxes for D different t.

    Args:
        seed: `(B,)` int64, one an image. offset: the stream, an int64 `()` on the device (or a number).
        x_1: `(B, N, 4)` signal. t: `(D, B)` in [0, 1]. image_sizes: `(B, 2)` height, width.
        signal_scale: s. backend: one of dfm_kernels.dispatch.BACKENDS.

    Raises:
        BackendError: "triton" was asked for where it cannot run.
        ValueError: shapes that do not belong together.
    """
    if x_1.dim() != 3 or seed.shape != x_1.shape[:1] or t.dim() != 2 or t.shape[1:] != x_1.shape[:1]:
        raise ValueError(
            f"x_1 {tuple(x_1.shape)}, seed {tuple(seed.shape)} and t {tuple(t.shape)} must be (B, N, 4), "
            "(B,) and (D, B)"
        )
    unsupported = "" if x_1.dtype == torch.float32 else f"x_1 is {x_1.dtype}, the kernel computes in float32"
    if use_triton("sample_box_paths", backend, x_1, unsupported):
        offset = torch.as_tensor(offset, dtype=torch.int64, device=x_1.device)
        return BoxPathSample(*_sample_box_paths(seed, offset, x_1, t, image_sizes, signal_scale))
    return reference.sample_box_paths(seed, offset, x_1, t, image_sizes, signal_scale=signal_scale)


@torch.library.custom_op("dfm::sample_box_paths", mutates_args=())
def _sample_box_paths(
    seed: Tensor, offset: Tensor, x_1: Tensor, t: Tensor, image_sizes: Tensor, signal_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Only here: where there is no Triton, the reference must do without this import.
    from dfm_kernels.triton.path_sample import sample_box_paths as launch

    return tuple(launch(seed, offset, x_1, t, image_sizes, signal_scale))


@_sample_box_paths.register_fake
def _(seed, offset, x_1, t, image_sizes, signal_scale):
    each = (t.shape[0], *x_1.shape)
    return x_1.new_empty(x_1.shape), x_1.new_empty(each), x_1.new_empty(x_1.shape), x_1.new_empty(each)
