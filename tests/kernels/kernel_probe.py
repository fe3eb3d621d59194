"""The smallest kernel with a loop whose end is an argument."""

import triton
import triton.language as tl


@triton.jit
def total(out_ptr, count):
    value = 0.0
    for _ in range(0, count):
        value += 1.0
    tl.store(out_ptr, value)
