"""What the benchmark asks of the device it measures: time, memory, a capture, each kernel's time.

`Cpu` answers all of it too, so that whatever is measured on a GPU is measured by the same code on a CPU.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Replay = Callable[[], None]


class Launches(NamedTuple):
    """Of one kernel, or of one op on a CPU."""

    launches: float
    seconds: float


class Cpu:
    type = "cpu"
    warm = 1  #: steps before the first that is timed
    seconds = 20.0  #: of timing, for each case; the fewest repeats come first
    cache_bytes = 0  #: more than this of input is gone through in turn
    copy_bytes = 1 << 28  #: what the bandwidth is measured with

    def mark(self) -> Any:
        """A point in time of the work asked for so far."""
        return time.perf_counter()

    def between(self, start: Any, end: Any) -> float:
        """Seconds; waits for `end`."""
        return float(end - start)

    def wait(self) -> None:
        """Until all that was asked for is done."""

    def peak_bytes(self, step: Callable[[], Any]) -> int | None:
        """By how much `step` exceeds, at its peak, what was allocated before; None where the allocator does not say."""
        return None

    def capture(self, *works: Callable[[], None]) -> list[Replay]:
        """Record each of `works` as one unit, after having run them; the answers run them again on the same tensors,
        in this order.

        Raises RuntimeError where one cannot be captured.
        """
        for work in works:
            work()
        return list(works)

    def kernels(self, step: Callable[[], Any], repeats: int) -> dict[str, Launches]:
        """What a step launches, by name: mean of `repeats`. Empty where the profiler sees nothing."""
        found: dict[str, list[float]] = defaultdict(list)
        activities = [torch.profiler.ProfilerActivity.CPU, *self._activities()]
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            for _ in range(repeats):
                step()
            self.wait()
        for event in profile.events() or ():
            seconds = self._kernel_seconds(event)
            if seconds is not None:
                found[event.name].append(seconds)
        return {name: Launches(len(times) / repeats, sum(times) / repeats) for name, times in found.items()}

    def _activities(self) -> list[Any]:
        return []

    def _kernel_seconds(self, event: Any) -> float | None:
        return 1e-6 * float(event.self_cpu_time_total)

    def copy_rate(self) -> float:
        """Bytes a second that a copy reads and writes: the best of several, of a tensor far larger than the caches."""
        source = torch.ones(self.copy_bytes // 4, device=self.type)
        target = torch.empty_like(source)
        best = float("inf")
        for _ in range(8):
            self.wait()
            start = self.mark()
            target.copy_(source)
            best = min(best, self.between(start, self.mark()))
        return 2 * source.nbytes / best


class Cuda(Cpu):
    """The current GPU."""

    type = "cuda"
    warm = 3  # the allocator, cuBLAS and guessed list lengths settle
    seconds = 4.0
    copy_bytes = 1 << 30

    @property
    def cache_bytes(self) -> int:  # type: ignore[override]
        """Several times its second-level cache."""
        return 4 * int(torch.cuda.get_device_properties().L2_cache_size)

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        end.synchronize()
        return 1e-3 * float(start.elapsed_time(end))

    def wait(self) -> None:
        torch.cuda.synchronize()

    def peak_bytes(self, step: Callable[[], Any]) -> int | None:
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def capture(self, *works: Callable[[], None]) -> list[Replay]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(self.warm):
                for work in works:
                    work()
        torch.cuda.current_stream().wait_stream(aside)
        pool = torch.cuda.graph_pool_handle()
        graphs = []
        for work in works:
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], pool=pool):
                work()
        return [graph.replay for graph in graphs]

    def _activities(self) -> list[Any]:
        return [torch.profiler.ProfilerActivity.CUDA]

    def _kernel_seconds(self, event: Any) -> float | None:
        if event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation:
            return None
        return 1e-6 * float(event.time_range.elapsed_us())


DEVICES: dict[str, type[Cpu]] = {"cpu": Cpu, "cuda": Cuda}


def of(device: torch.device | str) -> Cpu:
    """The one that a tensor's device belongs to."""
    return DEVICES[torch.device(device).type]()


def choose(name: str) -> Cpu:
    """The device of this name. Raises ValueError with the cure where this machine has none that torch can use."""
    if name == "cuda" and not torch.cuda.is_available():
        if torch.version.cuda is None:
            got = f"torch {torch.__version__}, built without CUDA"
            cure = "install a torch built for CUDA: https://pytorch.org/get-started/locally"
        else:
            got = f"none: torch {torch.__version__} finds no GPU or no driver for CUDA {torch.version.cuda}"
            cure = "see what nvidia-smi says, and that CUDA_VISIBLE_DEVICES does not hide it"
        raise ValueError(f"--device cuda: expected a GPU that torch can use, got {got}. To cure it, {cure}")
    return DEVICES[name]()
