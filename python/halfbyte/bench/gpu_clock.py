"""Time and graphs on a GPU, and the same on the CPU for the suite's test of itself."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch

COLD_BYTES = 256 << 20  # that calls rotate over: several times the L2 cache of any GPU
LEAST_CALLS = 20
REPEATS = 5

Call = Callable[[], object]


class Gpu:
    """The first CUDA device."""

    real = True

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        torch.cuda.set_device(self.device)
        self.name = torch.cuda.get_device_name(0)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def stream(self) -> int:
        """The current stream, as the C interface takes it."""
        return torch.cuda.current_stream().cuda_stream

    def captured(self, calls: Sequence[Call]) -> Call:
        """The calls as one CUDA graph: what replays it."""
        aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        self.synchronize()
        with torch.cuda.stream(aside):
            calls[0]()  # what is prepared at a first call must not be captured
            self.synchronize()
            gc.disable()  # torch.cuda.graph collects garbage and empties the cache: 0.1 s for each graph
            try:
                graph.capture_begin()
                try:
                    for call in calls:
                        call()
                except BaseException:
                    with contextlib.suppress(RuntimeError):  # says only that the capture is not whole
                        graph.capture_end()
                    raise
                graph.capture_end()
            finally:
                gc.enable()
        self.synchronize()
        return graph.replay

    def tidy(self) -> None:
        """Gives back the memory of graphs and buffers that are gone."""
        gc.collect()
        torch.cuda.empty_cache()

    def seconds(self, calls: Sequence[Call]) -> float:
        """Median seconds of one of the calls, which replays of a graph of all of them take."""
        replay = self.captured(calls)
        samples = []
        for _ in range(REPEATS):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            replay()  # keeps the GPU busy while the timed replay is being started
            first.record()
            replay()
            last.record()
            last.synchronize()
            samples.append(first.elapsed_time(last) / 1e3 / len(calls))
        return statistics.median(samples)

    def copies(self, nbytes: int) -> int:
        """How many buffers of a size calls rotate over, so that none is in the cache when its turn comes."""
        return max(2, -(-COLD_BYTES // max(nbytes, 1)))

    def aside(self) -> contextlib.AbstractContextManager:
        """Within the block a new stream is the thread's current one."""
        return torch.cuda.stream(torch.cuda.Stream())

    def concurrently(self, groups: Sequence[Sequence[Call]]) -> None:
        """Each group of calls on a stream of its own, all at once."""
        self.synchronize()
        streams = [torch.cuda.Stream() for _ in groups]
        for turn in range(max(len(group) for group in groups)):
            for stream, group in zip(streams, groups, strict=True):
                with torch.cuda.stream(stream):
                    group[turn % len(group)]()
        self.synchronize()


class Emulated:
    """The CPU in the place of a GPU; its times mean nothing."""

    real = False
    name = "emulated"

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def synchronize(self) -> None:
        pass

    def stream(self) -> int:
        return 0

    def captured(self, calls: Sequence[Call]) -> Call:
        return lambda: [call() for call in calls]

    def tidy(self) -> None:
        pass

    def seconds(self, calls: Sequence[Call]) -> float:
        start = time.perf_counter()
        calls[0]()
        return time.perf_counter() - start

    def copies(self, nbytes: int) -> int:
        return 1

    def aside(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def concurrently(self, groups: Sequence[Sequence[Call]]) -> None:
        for group in groups:
            for call in group:
                call()


Device = Gpu | Emulated


def cold(device: Device, make: Callable[[], Call], nbytes: int) -> float:
    """Seconds of a call whose `nbytes` of weights come from memory and not from the cache.

    make: a new call on buffers of its own.
    """
    different = [make() for _ in range(device.copies(nbytes))]
    calls = [different[i % len(different)] for i in range(max(LEAST_CALLS, len(different)))]
    return device.seconds(calls if device.real else calls[:1])
