"""The operations of the flow head: for each op a reference in plain torch, a Triton kernel and the choice.

`set_backend` says for the whole process which of them runs, `with kernels(name):` for a while.
"""

from dfm_kernels.dispatch import BACKENDS, BackendError, kernels, set_backend, use_triton

__all__ = ["BACKENDS", "BackendError", "kernels", "set_backend", "use_triton"]
