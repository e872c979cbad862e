"""Clocks, counters and roofs that the benchmarks share. Nothing here knows what is being measured."""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lad_fast.cpu import emulates
from lad_fast.kernels.launch import onednn_linear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def why_not_timed(dtype: str) -> str | None:
    """Why nothing is timed in a type: products that are emulated would take most of the suite's time."""
    emulated = DEVICE.type == "cpu" and dtype == "bfloat16" and emulates(DTYPES[dtype])
    return f"this processor has no {dtype} products" if emulated else None


def pin_threads() -> int:
    """One thread a core that this process may use; the number."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return torch.get_num_threads()


class EventClock:
    """Seconds as the GPU's events count them; reading it waits for what was launched before.

    pytest-benchmark reads a clock before and after a round. Launches within the round run ahead of the GPU, so
    what is timed is the GPU's work, or the launching where that is slower.
    """

    def __init__(self) -> None:
        self.seconds, self.last = 0.0, None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self.last is not None:  # summed up: one float32 of milliseconds would grow coarse
            self.seconds += self.last.elapsed_time(event) / 1e3
        self.last = event
        return self.seconds


clock: Callable[[], float] = EventClock() if DEVICE.type == "cuda" else time.perf_counter


def autocast(dtype: torch.dtype, device: torch.device = DEVICE):
    """Autocast to bfloat16; nothing for float32."""
    return torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else nullcontext()


def seconds_of(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = clock()
    function()
    return clock() - start


def median_seconds(function: Callable[[], object]) -> float:
    """Median over the rounds of :func:`plan_rounds`."""
    calls, rounds = plan_rounds(function)
    return statistics.median(seconds_of(lambda: [function() for _ in range(calls)]) / calls for _ in range(rounds))


def plan_rounds(function: Callable[[], object], least_seconds: float = 0.02) -> tuple[int, int]:
    """Calls a round, so that one takes ``least_seconds`` (100 at most), and rounds: 5, or 3 where a call takes over
    1.5 s. Warms the function up.
    """
    seconds = seconds_of(function)
    if seconds < 1:
        seconds = max(seconds_of(function), 1e-6)
    return max(1, min(100, round(least_seconds / seconds))), 3 if seconds > 1.5 else 5


@dataclass
class Roofs:
    """What the machine reaches: bytes a second of a large copy, FLOP a second of a large product by dtype."""

    bytes_per_second: float
    flop_per_second: dict[str, float]

    def floor_seconds(self, dtype: str, flops: float, num_bytes: float) -> float:
        """The least time in which these products and this traffic can be had."""
        return max(flops / self.flop_per_second[dtype], num_bytes / self.bytes_per_second)


class RoofMeter:
    """Copy bandwidth, counting bytes read and written, and rate of matrix products in each type that is timed."""

    def __init__(self) -> None:
        self.roofs = Roofs(0.0, {})
        """The best of the turns taken."""
        on_gpu = DEVICE.type == "cuda"
        source = torch.ones(2**28 if on_gpu else 2**26, device=DEVICE)  # 1 GiB or 256 MiB: past every cache
        self._source, self._target = source, torch.empty_like(source)
        self._size, self._products = 8192 if on_gpu else 1536, {}
        for name, dtype in DTYPES.items():
            if why_not_timed(name):
                continue
            a, b = (torch.randn(self._size, self._size, device=DEVICE).to(dtype) for _ in range(2))
            ways = [lambda a=a, b=b: a @ b]
            if (linear := onednn_linear(a)) is not None:  # faster than MKL on some processors
                ways.append(lambda a=a, b=b, linear=linear: linear(a, b, None, "none", [], ""))
            self._products[name] = ways

    def take_turn(self) -> None:
        """One copy and one product of each way and type."""
        reached = 2 * self._source.nbytes / seconds_of(lambda: self._target.copy_(self._source))
        self.roofs.bytes_per_second = max(self.roofs.bytes_per_second, reached)
        rates = self.roofs.flop_per_second
        for name, ways in self._products.items():
            reached = 2 * self._size**3 / min(map(seconds_of, ways))
            rates[name] = max(rates.get(name, 0.0), reached)


def measure_roofs() -> Roofs:
    """The best of six turns."""
    meter = RoofMeter()
    for _ in range(6):
        meter.take_turn()
    return meter.roofs


class Timing(NamedTuple):
    """Of one step among those that took turns."""

    seconds: list[float]
    """Of a call; one number a round."""
    other_jobs: float | None
    """Share of the processors that others took meanwhile."""
    roofs: Roofs
    """What the machine reached meanwhile; the best round of each."""


def in_turn(steps: Mapping[Hashable, Callable[[], object]], rounds: int | None = None) -> dict[Hashable, Timing]:
    """Time steps side by side, a round of each and then the next of each: a machine that others use too is not as fast
    now as it was a minute ago, and so it is as fast for all. The roofs take their turns with them.

    Args:
        steps: what to time, by name.
        rounds: of one call, for steps that are warm; None warms them up and asks :func:`plan_rounds`.
    """
    plans = {name: plan_rounds(step) if rounds is None else (1, rounds) for name, step in steps.items()}
    seconds, meter, others = {name: [] for name in steps}, RoofMeter(), OtherJobs()
    for turn in range(max(number for _, number in plans.values())):
        for name, step in steps.items():
            calls, number = plans[name]
            if turn < number:
                seconds[name].append(seconds_of(lambda: [step() for _ in range(calls)]) / calls)  # noqa: B023
        meter.take_turn()
    share = others.share()
    return {name: Timing(found, share, meter.roofs) for name, found in seconds.items()}


def rotating(functions: list[Callable[[], object]]) -> Callable[[], object]:
    """One function that calls each in turn: copies of inputs, so that a GPU's L2 does not hold the next one's."""
    turn = itertools.cycle(functions)
    return lambda: next(turn)()


def copies_past_l2(num_bytes: int) -> int:
    """Copies of inputs of this size that together are twice the GPU's L2; 1 on a CPU."""
    if DEVICE.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return max(1, min(8, -(-2 * l2 // num_bytes) + 1))


def kept_bytes(forward: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps after ``forward``, beside the storages of ``known`` (inputs and parameters)."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()  # held, so that no freed address is taken for another storage's
    del result
    return sum(kept.values())


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes that one call has allocated at a time beyond what was allocated before it."""
    if DEVICE.type != "cuda":
        return _cpu_peak_bytes(function)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak_bytes(function: Callable[[], object]) -> int:
    """By the profiler's record of each allocation; what the call frees of earlier ones it may have missed."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def kernel_launches(function: Callable[[], object]) -> int | None:
    """Kernels that one call runs on the GPU, copies and fills by the driver left out; None on a CPU."""
    if DEVICE.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    kernels = (e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not name.startswith(("Memcpy", "Memset")) for name in kernels)


class OtherJobs:
    """Share of the processors that others took since this was made, the host's other guests included.

    Threads that wait for each other suffer out of proportion: a quarter taken can make a step several times slower.
    """

    def __init__(self) -> None:
        self.start = self._seconds()

    def share(self) -> float | None:
        """0 to 1; None where the system does not tell."""
        if self.start is None:
            return None
        wall, others = (now - then for now, then in zip(self._seconds(), self.start, strict=True))
        return max(0.0, others / (wall * os.cpu_count()))

    @staticmethod
    def _seconds() -> tuple[float, float] | None:
        """Now, and processor seconds of all others, from the kernel's counters of ticks."""
        try:
            with open("/proc/stat", encoding="ascii") as file:
                user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
        except (OSError, ValueError):
            return None
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy - sum(os.times()[:4])  # own, and of children that ended


def available_bytes() -> int:
    """Memory that a case may take on the device."""
    if DEVICE.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
