"""Several processes that train one model, as torchrun starts them. A process alone passes through all of it unchanged.

Each process holds the whole model and takes its part of every batch. Gradients meet in DistributedDataParallel
(:mod:`lad_fast.step`); here is the rest: how the processes find each other, what the first of them does for all, and
how they agree.
"""

import copy
import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "World", "current_world", "is_launched", "joined", "rank"]

_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells each process
_TIMEOUT = timedelta(minutes=30)  # a process that ends is noticed at once; this is for one that hangs, or downloads
_START_TIMEOUT = timedelta(minutes=5)  # until all have started
_GRACE_SECONDS = 3


class Agreement:
    """The largest number that any process brings to a call, told to all at their next call: nobody waits for it.

    Alone, each call tells what it is brought.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group, self._pending = group, None

    def __call__(self, number: int) -> int:
        if self._group is None:
            return number
        told = 0
        if self._pending is not None:
            work, numbers = self._pending
            work.wait()
            told, self._pending = int(numbers), None
        if not told:  # what is told is dealt with first, which may change what there is to bring
            numbers = torch.tensor(number)
            self._pending = dist.all_reduce(numbers, dist.ReduceOp.MAX, self._group, async_op=True), numbers
        return told

    def finish(self) -> None:
        """Wait for what is under way: a group must not go with work left in it."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None


@dataclass(frozen=True)
class World:
    """A process's place among those that train together; by default it is alone.

    Methods but for :meth:`agreement` are called by all processes in the same order.

    Attributes:
        rank: 0 to size - 1.
        size: processes.
        local_size: of them on this machine.
        group: for tensors where training runs: NCCL on GPUs, gloo on CPUs.
        control: gloo, for all else.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    group: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def first(self, action: Callable, *args, **options) -> Any:
        """What ``action`` returns or raises in the first process, which alone runs it; for all, by pickle."""
        if self.size == 1:
            return action(*args, **options)
        told, error = [None], None
        if self.is_first:
            try:
                told = [(action(*args, **options), None)]
            except Exception as caught:
                told, error = [(None, _portable(caught))], caught
        dist.broadcast_object_list(told, src=0, group=self.control)
        result, copy = told[0]
        if copy is not None:
            raise error or copy
        return result

    @contextmanager
    def first_enters(self, manager: AbstractContextManager) -> Iterator[None]:
        """A context that the first process alone enters and leaves; what entering raises is raised in all."""
        with ExitStack() as stack:
            self.first(stack.enter_context, manager)
            yield

    def in_turn(self, action: Callable, *args) -> Any:
        """``action`` in every process, the first before all others: they find what it downloaded or cached."""
        if self.size == 1:
            return action(*args)
        own = []
        self.first(lambda: own.append(action(*args)))
        return own[0] if self.is_first else action(*args)

    def gather(self, value) -> list:
        """Every process's ``value``, by rank, through pickle; on the CPU."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def gather_rows(self, rows: Tensor, counts: list[int]) -> list[Tensor]:
        """Every process's ``rows``, (n, D) of one dtype and device, by rank; ``counts`` is n of each."""
        if self.size == 1:
            return [rows]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        # As bytes, since not every backend knows every dtype.
        dist.all_gather([part.view(torch.uint8) for part in parts], padded.view(torch.uint8), group=self.group)
        return [part[:count] for part, count in zip(parts, counts, strict=True)]

    def agreement(self) -> Agreement:
        result = Agreement(self.control)
        if self.size > 1:
            _agreements.append(result)
        return result


ALONE = World()
_world = ALONE
_agreements: list[Agreement] = []  # of the run under way


def current_world() -> World:
    """The processes that the run under way belongs to."""
    return _world


def is_launched() -> bool:
    """Whether torchrun started this process together with others."""
    return all(name in os.environ for name in _LAUNCHER) and int(os.environ["WORLD_SIZE"]) > 1


def rank() -> int | None:
    """This process's number among those that train together; None for a process alone."""
    if dist.is_initialized():
        return dist.get_rank() if dist.get_world_size() > 1 else None
    return int(os.environ["RANK"]) if is_launched() else None


def joined(train: Callable) -> Callable:
    """Have a function of a configuration run by all processes that torchrun started, or of an initialised group.

    A group that is made for the call is destroyed after it, also where it fails.

    Raises:
        ConnectionError: another process has ended, or not answered for 30 minutes.
        ValueError: ``config.device`` names one GPU for several processes, or there are fewer GPUs than processes.
    """

    @wraps(train)
    def run(config, **options):
        with _entered(config.device):
            return train(config, **options)

    return run


@contextmanager
def _entered(device: str) -> Iterator[None]:
    global _world
    is_given = dist.is_available() and dist.is_initialized()
    if _world.size > 1 or not (dist.get_world_size() > 1 if is_given else is_launched()):
        yield
        return
    on_gpu = _take_gpu(device)
    if not is_given:
        _make_group(on_gpu)
    control = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    size = dist.get_world_size()
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    _world = World(dist.get_rank(), size, local_size, dist.group.WORLD, control)
    has_failed = True
    try:
        yield
        for agreement in _agreements:
            agreement.finish()
        has_failed = False
    except Exception as error:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            if is_launched():
                # torchrun, once it sees the other's end, ends this process too: the other's message is then the last.
                time.sleep(_GRACE_SECONDS)
            raise ConnectionError(f"another process has ended or does not answer ({_first_line(error)})") from error
        _tell_launcher(error)
        raise
    finally:
        _world = ALONE
        _agreements.clear()
        gc.collect()  # of the step and DistributedDataParallel, which refer to each other, and to the group
        if is_given:
            dist.destroy_process_group(control)
        elif has_failed and on_gpu:
            # NCCL would wait for what other processes have begun, and this one never will.
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()


def _take_gpu(device: str) -> bool:
    """Whether training runs on GPUs; if so, this process's becomes the one that "cuda" means."""
    if not (device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())):
        return False
    if device.startswith("cuda:"):
        raise ValueError(f"device is {device!r}; several processes take auto, cpu or cuda, and a GPU each")
    number, found = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    if number is not None:  # without it, whoever made the group has set the device
        if int(number) >= found:
            raise ValueError(f"device is {device!r}; process {number} of this machine has no GPU: there are {found}")
        torch.cuda.set_device(int(number))
    return True


_groups_made = 0


def _make_group(on_gpu: bool) -> None:
    global _groups_made
    store, number, size = next(iter(dist.rendezvous("env://", timeout=_START_TIMEOUT)))
    # Under torchrun the store outlives a group, and a second one must not read the addresses of the first.
    store = dist.PrefixStore(f"lad_fast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{_groups_made}", store)
    _groups_made += 1
    options = {"device_id": torch.device("cuda", torch.cuda.current_device())} if on_gpu else {}
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=number, world_size=size, timeout=_TIMEOUT, **options
    )


def _tell_launcher(error: Exception) -> None:
    """Leave the error where torchrun looks for it, which then names the process that failed first."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _portable(error: Exception) -> Exception:
    """The error as the others get it, made anew from what it reduces to; where that fails, its text."""
    try:
        again = copy.deepcopy(error)
        if str(again) == str(error):
            return again
    except Exception:
        pass
    return ValueError(f"{type(error).__name__}: {error}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
