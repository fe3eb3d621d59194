"""The sampler as one CUDA graph for each padded shape: K steps x D predictors without a launch from the host.

Shapes: whatever the captured function takes; a graph is bound to them.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

# A function of tensors that answers tensors, without waiting for the device.
TensorFunction = Callable[..., Sequence[Tensor]]
# (run, inputs) -> a function of inputs of the same shapes.
Capture = Callable[[TensorFunction, Sequence[Tensor]], TensorFunction]

_WARM_UP = 3  # runs before a capture, in which kernels compile and cuBLAS takes its workspace


def capture_cuda_graph(run: TensorFunction, inputs: Sequence[Tensor]) -> TensorFunction:
    """`run` recorded on inputs like these; what it replays copies inputs in and answers out."""
    static = [x.clone(memory_format=torch.preserve_format) for x in inputs]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    caching = torch.is_autocast_cache_enabled()
    # Weights that autocast keeps are freed when it ends; the graph would go on reading their memory.
    torch.set_autocast_cache_enabled(False)
    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                run(*static)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            answers = run(*static)
    finally:
        torch.set_autocast_cache_enabled(caching)

    def replay(*inputs: Tensor) -> list[Tensor]:
        for mine, given in zip(static, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return [x.clone() for x in answers]

    return replay


class GraphCache:
    """Captures a function for the shapes that come back, and runs it eagerly otherwise.

    A shape is captured when it is seen for the second time and the cache is not full: data sets of many
    shapes would otherwise spend their time on captures that no second image uses.

    Args:
        size: graphs kept at most; each holds the memory of one run. capture: another way, for tests.
    """

    def __init__(self, size: int = 8, capture: Capture = capture_cuda_graph):
        self.size, self.capture = size, capture
        self._graphs: dict[Hashable, TensorFunction] = {}
        self._seen: set[Hashable] = set()
        self._owner: Hashable = None

    def __len__(self) -> int:
        return len(self._graphs)

    def __deepcopy__(self, memo: dict) -> "GraphCache":
        # Graphs belong to the parameters that they were captured with, a copied model has its own.
        return GraphCache(self.size, self.capture)

    def __call__(self, owner: Hashable, run: TensorFunction, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """`run(*inputs)`.

        Args:
            owner: all that `run` depends on besides its inputs; where it changes, the graphs are dropped.
        """
        if owner != self._owner:
            self._graphs.clear()
            self._seen.clear()
            self._owner = owner
        key = tuple((x.shape, x.stride(), x.dtype, x.device) for x in inputs)
        if key not in self._graphs:
            if key not in self._seen or len(self._graphs) >= self.size:
                self._seen.add(key)
                return run(*inputs)
            self._graphs[key] = self.capture(run, inputs)
        return self._graphs[key](*inputs)
