"""The teacher's outputs on the training data, kept from the first epoch: later epochs run no teacher.

A teacher is frozen and in eval mode, so what it makes of an example never changes, but by the padding of its batch
where it looks at that (:data:`PADDED_ALIKE`). Real tokens only are kept, in the dtype that training computes in; on the
GPU, in host memory or in a memory-mapped file.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lad_fast.distributed import ALONE, World
from lad_fast.packed import ENCODERS

__all__ = ["PADDED_ALIKE", "TeacherCache", "choose_place"]

PADDED_ALIKE = ENCODERS | {"albert", "deberta", "deberta-v2", "distilbert", "mobilebert", "modernbert", "mpnet"}
"""Kinds of models that make the same of an example however wide its batch is; ConvBERT's convolutions and FNet's
transforms reach over its end."""
PLACES = ("gpu", "cpu", "disk")
_SHARE = 0.5  # of the free memory that a cache may take by itself; the rest is for training


class TeacherCache:
    """Hidden states and logits of a teacher for N examples.

    Args:
        lengths: (N,) tokens kept of each example: all real ones, or for the published semantics, in which padding
            counts, the padded length.
        num_layers: L; 0 keeps logits alone.
        hidden_size: D.
        num_labels: C.
        dtype: of the hidden states kept.
        device: where training runs, and where :meth:`read` puts what it gives.
        place: "gpu" (the device), "cpu" or "disk"; from these two, batches go to a GPU by pinned memory.
        folder: for "disk"; the file in it has no name, so it is gone with the process, however that ends.
        world: processes that share what they write; each keeps all of it.

    Attributes:
        nbytes: bytes of the hidden states.

    Raises:
        ValueError: an unknown place, "gpu" where training runs on the CPU, a folder that has no room or cannot be
            written.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        num_layers: int,
        hidden_size: int,
        num_labels: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        place: str,
        folder: str | Path | None = None,
        world: World = ALONE,
    ) -> None:
        self.device, self.place, self.dtype, self._world = torch.device(device), place, dtype, world
        if place not in PLACES:
            raise ValueError(f"teacher_cache is {place!r}; it takes one of {', '.join(PLACES)}")
        if place == "gpu" and self.device.type == "cpu":
            raise ValueError("teacher_cache is 'gpu'; training on the CPU takes 'cpu', 'disk' or 'off'")
        self._lengths = torch.as_tensor(np.asarray(lengths), dtype=torch.int64)
        self._starts = self._lengths.cumsum(0) - self._lengths
        shape = num_layers, int(self._lengths.sum()), hidden_size
        self.nbytes = int(np.prod(shape)) * dtype.itemsize
        if place == "disk":
            self._states = _map_file(shape, dtype, folder)
        elif place == "gpu":
            self._states = torch.empty(shape, dtype=dtype, device=self.device)
        else:  # not pinned, which may take twice the memory: what read() picks is
            self._states = torch.empty(shape, dtype=dtype)
        self._logits = torch.empty(len(self._lengths), num_labels, device=self.device)
        self._held = torch.zeros(len(self._lengths), dtype=torch.bool)

    def __len__(self) -> int:
        """Examples held."""
        return int(self._held.sum())

    def holds(self, index: Tensor) -> bool:
        """Whether every example of ``index``, (B,) int64 on the CPU, has been written. No device is waited for."""
        return bool(self._held[index].all())

    def write(self, index: Tensor, logits: Tensor, states: Sequence[Tensor] = ()) -> None:
        """Keep what the teacher made of a batch; of every process's part of it, which all of them call this with.

        Args:
            index: (B,) int64 on the CPU, the examples' numbers.
            logits: (B, C).
            states: L tensors (B, S, D), or (T, D) of a packed batch.
        """
        indices = self._world.gather(index)
        if states:
            packed = states[0].dim() == 2
            cells = None if packed else self._cells(index, states[0].shape[1]).to(states[0].device, non_blocking=True)
            rows = [self._rows(index, None).to(self._states.device, non_blocking=True) for index in indices]
            for kept, state in zip(self._states, states, strict=True):
                real = state if packed else state.flatten(0, 1).index_select(0, cells)
                for where, values in zip(rows, self._world.gather_rows(real, list(map(len, rows))), strict=True):
                    kept.index_copy_(0, where, values.to(kept.device, kept.dtype))
        logits = self._world.gather_rows(logits.float(), list(map(len, indices)))
        for index, values in zip(indices, logits, strict=True):
            self._logits.index_copy_(0, index.to(self.device, non_blocking=True), values)
            self._held[index] = True

    def read(self, index: Tensor, width: int | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits and hidden states of a batch, on the training device.

        Args:
            index: (B,) int64 on the CPU.
            width: S for states (B, S, D), whose padding rows repeat the example's last; None for packed (T, D).

        Returns:
            Logits (B, C) float32, and L tensors in the cache's dtype.
        """
        rows = self._rows(index, width).to(self._states.device, non_blocking=True)
        shape = (-1,) if width is None else (len(index), width)
        states = []
        for kept in self._states:
            if kept.device.type == self.device.type:
                picked = kept.index_select(0, rows)
            else:
                waiting = torch.empty(len(rows), kept.shape[1], dtype=self.dtype, pin_memory=True)
                picked = torch.index_select(kept, 0, rows, out=waiting).to(self.device, non_blocking=True)
            states.append(picked.view(*shape, picked.shape[-1]))
        return self._logits.index_select(0, index.to(self.device, non_blocking=True)), tuple(states)

    def _rows(self, index: Tensor, width: int | None) -> Tensor:
        """Rows of the store: the real ones end to end, or (B * width,) with the last one repeated."""
        lengths, starts = self._lengths[index], self._starts[index]
        columns = torch.arange(int(lengths.max()) if width is None else width)
        rows = starts[:, None] + torch.minimum(columns, lengths[:, None] - 1)
        return rows.flatten() if width is not None else rows[columns < lengths[:, None]]

    def _cells(self, index: Tensor, width: int) -> Tensor:
        """Places of the real tokens in a (B, width) batch laid out in a row."""
        return (torch.arange(width) < self._lengths[index][:, None]).flatten().nonzero().flatten()


def choose_place(nbytes: int, device: torch.device, folder: str | Path, world: World = ALONE) -> str:
    """The fastest of "gpu", "cpu" and "disk" with room for ``nbytes`` in each process, or "off"."""
    places = [*PLACES, "off"]
    return max(world.gather(_choose_own_place(nbytes, device, folder, world.local_size)), key=places.index)


def _choose_own_place(nbytes: int, device: torch.device, folder: str | Path, num_processes: int) -> str:
    if device.type == "cuda" and nbytes <= _SHARE * torch.cuda.mem_get_info(device)[0]:
        return "gpu"
    if nbytes * num_processes <= _SHARE * _free_host_memory():
        return "cpu"
    if hasattr(os, "posix_fallocate") and nbytes * num_processes <= _SHARE * shutil.disk_usage(folder).free:
        return "disk"
    return "off"


def _free_host_memory() -> int:
    """Bytes a process may still take, by the kernel and by the container's limit; 0 where no kernel tells."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # not Linux
        return 0
    entries = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = int(entries["MemAvailable"].split()[0]) * 1024
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def _map_file(shape: tuple[int, ...], dtype: torch.dtype, folder: str | Path | None) -> Tensor:
    if folder is None:
        raise ValueError("folder is None; teacher_cache 'disk' takes a folder")
    if not hasattr(os, "posix_fallocate"):
        raise ValueError(f"teacher_cache is 'disk'; {sys.platform} keeps no room for a file ahead; take cpu or off")
    size = int(np.prod(shape)) * dtype.itemsize
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".teacher-cache-") as file:
            # Room is taken now: a write to a mapped file that finds the disk full would kill the process.
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
            flat = torch.from_file(file.name, shared=True, size=size // dtype.itemsize, dtype=dtype)
    except OSError as error:
        raise ValueError(f"teacher_cache is 'disk'; {folder} has no room for {size / 1e9:.1f} GB ({error})") from error
    return flat.view(shape)
