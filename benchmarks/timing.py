"""Time, launches and memory of one call."""

import time
from collections.abc import Callable

import torch
from rows import quantiles


def measure(run: Callable[[], object], device: str) -> tuple[float, float, float]:
    """Milliseconds of one call: p20, p50, p80."""
    if device == "cuda":
        from triton.testing import do_bench

        return tuple(do_bench(run, quantiles=[0.2, 0.5, 0.8]))
    for _ in range(3):
        run()
    times, begun = [], time.perf_counter()
    while len(times) < 20 or (time.perf_counter() - begun < 0.5 and len(times) < 1000):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return quantiles(times)


def launches(run: Callable[[], object]) -> int:
    """Kernels that one call launches on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    return sum(event.count for event in profiled.key_averages() if event.device_type.name == "CUDA")


def peak_mib(run: Callable[[], object]) -> float:
    """MiB that one call allocates at most at a time on the GPU."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def in_turns(runs: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of `repeats` calls of each: all in turns, so that drift of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first turn warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    return times
