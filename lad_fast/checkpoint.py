"""Checkpoints of a run under way, from which it goes on as if nothing had happened, and what keeps its folder safe.

A checkpoint is a folder ``checkpoints/step-N``: all tensors in ``tensors.safetensors``, all else in ``state.json``,
the log so far in ``log.jsonl``, and, written last, ``manifest.json`` with the SHA-256 of each. It is written under
another name, synced and renamed, so that a kill or a power cut at any moment leaves it whole or absent.
"""

import hashlib
import json
import logging
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = [
    "Checkpoint", "CheckpointError", "Checkpoints", "Interrupted", "StopSignals", "digest", "find_checkpoint",
    "get_rng_state", "own_folder", "read_checkpoint", "set_rng_state", "sync", "write_checkpoint", "write_json",
]  # fmt: skip

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

_LOG = logging.getLogger(__name__)
_FORMAT = 2  # to be raised when older checkpoints can no longer be read
_TENSORS, _STATE, _RUN_LOG, _MANIFEST = "tensors.safetensors", "state.json", "log.jsonl", "manifest.json"


class CheckpointError(OSError):
    """A checkpoint that could not be written; older ones are whole."""


class DamagedError(ValueError):
    """A checkpoint that is not what was written."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM stopped a run after a whole step.

    Attributes:
        signal: the ``signal.Signals`` member.
        step: optimizer steps done.
        path: the checkpoint that the run left.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)
        self.step: int | None = None
        self.path: Path | None = None

    def __str__(self) -> str:
        return f"stopped by {self.signal.name} after step {self.step}; the same call goes on from {self.path}"


class StopSignals:
    """While it is entered, SIGINT and SIGTERM only leave word; a second one does what it did before.

    One that nothing was stopped for is raised again at the end.

    Args:
        agree: makes one number for all processes of the run from each one's: a signal's, or 0.
    """

    def __init__(self, agree: Callable[[int], int] = int) -> None:
        self._agree = agree

    def __enter__(self) -> "StopSignals":
        self.received: int | None = None
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, *_error) -> None:
        self._restore()
        if self.received is not None and kind is None:
            signal.raise_signal(self.received)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        self.received = number
        self._restore()

    def check(self) -> None:
        """Raise :class:`Interrupted` if there has been a signal."""
        if number := self._agree(self.received or 0):
            raise Interrupted(number)

    def watch(self, items: Iterable) -> Iterator:
        """The items, with a check before each."""
        for item in items:
            self.check()
            yield item


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: the run's; they lie in ``checkpoints`` in it.
        limit: how many to keep, the newest.
        every_steps, every_minutes: when :meth:`is_due`; no steps, time alone.
        agree: makes one answer for all processes of the run from each one's, as to whether its minutes have passed.
    """

    def __init__(
        self,
        folder: Path,
        limit: int = 1,
        every_steps: int | None = None,
        every_minutes: float = 10,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self.run_folder, self.folder, self.limit = folder, folder / "checkpoints", limit
        self._every_steps, self._every_seconds = every_steps, 60 * every_minutes
        self._saved_at, self._agree = time.monotonic(), agree

    def is_due(self, step: int) -> bool:
        by_steps = self._every_steps is not None and step % self._every_steps == 0
        return by_steps or bool(self._agree(time.monotonic() - self._saved_at >= self._every_seconds))

    def save(self, step: int, state: dict, log: Path) -> Path:
        """Write a checkpoint, then drop those that are too many, or of later steps than this one.

        Args:
            step: optimizer steps done.
            state: nested dicts (with names as keys) and lists of tensors and of what JSON holds.
            log: the log file, to be copied.

        Raises:
            CheckpointError: no room, or another failure to write; the older checkpoints are left as they were.
        """
        final = self.folder / f"step-{step}"
        try:
            write_checkpoint(final, state, log)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"output_dir is {self.run_folder}; the checkpoint of step {step} could not be written ({error}); "
                "with room made, the same command resumes from the one before it"
            ) from error
        self._prune(step)
        self._saved_at = time.monotonic()
        return final

    def _prune(self, step: int) -> None:
        """Later steps than the newest come from damaged checkpoints, or from a run that was taken up earlier."""
        steps = self._steps()
        for other in [s for s in steps if s > step] + [s for s in steps if s <= step][self.limit :]:
            _discard(self.folder / f"step-{other}")
        self._sweep()

    def _sweep(self) -> None:
        """Remove what a kill left half-way."""
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover)

    def _steps(self) -> list[int]:
        """From the newest to the oldest."""
        found = self.folder.glob("step-*")
        steps = [int(path.name[5:]) for path in found if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
        return sorted(steps, reverse=True)

    def newest(self) -> "Checkpoint | None":
        """The newest whole checkpoint; None where there are none at all.

        Raises:
            ValueError: there are some, but none is whole.
        """
        steps = self._steps()
        for step in steps:
            path = self.folder / f"step-{step}"
            try:
                return read_checkpoint(path)
            except DamagedError as error:
                _LOG.warning("%s; trying the one before it", error)
        if steps:
            raise ValueError(
                f"output_dir is {self.run_folder}; none of its {len(steps)} checkpoints is whole; resume never starts "
                "anew"
            )
        return None

    def clear(self) -> None:
        """Remove them all, what a kill left of others, and the folder if that was all it held."""
        for step in self._steps():
            _discard(self.folder / f"step-{step}")
        self._sweep()
        with suppress(OSError):
            self.folder.rmdir()


class Checkpoint(NamedTuple):
    """What :meth:`Checkpoints.save` wrote."""

    path: Path
    state: dict
    log: bytes


def find_checkpoint(resume: str, own: Checkpoints) -> Checkpoint | None:
    """The checkpoint that ``resume`` asks for; None where a run starts from its beginning.

    Args:
        resume: "auto", "never", a checkpoint or a folder of a run.
        own: those of the run itself.

    Raises:
        ValueError: nothing there, or nothing whole.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return own.newest()
    path = Path(resume).expanduser()
    if re.fullmatch(r"step-\d+", path.name) and path.is_dir():
        return read_checkpoint(path)
    found = Checkpoints(path).newest()
    if found is None:
        raise ValueError(f"resume is {resume}; it takes auto, never, a checkpoint's folder or a run's with checkpoints")
    return found


def write_checkpoint(path: Path, state: dict, log: Path) -> None:
    """Write or replace one; see :meth:`Checkpoints.save`.

    Raises:
        OSError, SafetensorError: no room, or another failure to write; nothing is left of it.
    """
    partial = path.with_name(f".{path.name}.partial")
    tensors: dict[str, Tensor] = {}
    tree = _take_tensors(state, "", tensors)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_on_cpu(tensors), partial / _TENSORS)
        (partial / _STATE).write_text(json.dumps(tree), encoding="utf-8")
        shutil.copyfile(log, partial / _RUN_LOG)
        files = {name: _digest(partial / name) for name in (_TENSORS, _STATE, _RUN_LOG)}
        (partial / _MANIFEST).write_text(json.dumps({"format": _FORMAT, "files": files}, indent=2))
        for file in (*partial.iterdir(), partial):
            sync(file)
        _discard(path)
        partial.rename(path)
        sync(path.parent)
    except (OSError, SafetensorError):
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint, every byte of it checked.

    Raises:
        DamagedError: a file is missing, unreadable or not what was written.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        for name in (_TENSORS, _STATE, _RUN_LOG):
            if _digest(path / name) != manifest["files"][name]:
                raise ValueError(f"{name} has changed since it was written")
        if manifest["format"] != _FORMAT:
            raise ValueError(f"its format is {manifest['format']}; this version reads {_FORMAT}")
        tree = json.loads((path / _STATE).read_text(encoding="utf-8"))
        return Checkpoint(path, _put_tensors(tree, load_file(path / _TENSORS)), (path / _RUN_LOG).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise DamagedError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def _take_tensors(tree, name: str, tensors: dict[str, Tensor]):
    """The tree with a name in each tensor's place; the tensors go into ``tensors``."""
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return {"$tensor": name}
    if isinstance(tree, dict):
        return {key: _take_tensors(value, f"{name}.{key}" if name else key, tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_take_tensors(value, f"{name}.{i}", tensors) for i, value in enumerate(tree)]
    return tree


def _put_tensors(tree, tensors: dict[str, Tensor]):
    if isinstance(tree, dict):
        if set(tree) == {"$tensor"}:
            return tensors[tree["$tensor"]]
        return {key: _put_tensors(value, tensors) for key, value in tree.items()}
    return [_put_tensors(value, tensors) for value in tree] if isinstance(tree, list) else tree


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What safetensors takes: contiguous, and no two in the same memory, as tied weights are."""
    result, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _discard(path: Path) -> None:
    """Remove a folder, under another name first: a kill half-way leaves nothing that looks like a checkpoint."""
    if path.exists():
        gone = path.with_name(f".{path.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt":  # which opens no folder, and syncs no file that was opened to read
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict) -> None:
    """Write or replace a JSON file in one move.

    Raises:
        OSError: no room, or another failure to write; what was there is left as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error})") from error


def _lock(file) -> None:
    """Lock an open file for this process, until it closes it; a BlockingIOError where another one has it."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    try:  # Windows locks bytes, which others then cannot read: one far behind the process id
        os.lseek(file.fileno(), 2**30, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except PermissionError as error:
        raise BlockingIOError(str(error)) from error


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Make a folder, and keep other runs out of it; the lock is the process's, and gone with it however it ends.

    Raises:
        ValueError: nothing can be written there, or another run has it.
    """
    lock = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
        through_no_link = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        file = os.fdopen(os.open(lock, through_no_link, 0o666), "a", encoding="utf-8")
        _lock(file)
    except BlockingIOError as error:
        raise ValueError(
            f"output_dir is {folder}; another run is writing there, process {lock.read_text() or 'unknown'}"
        ) from error
    except OSError as error:
        raise ValueError(f"output_dir is {folder}; it takes a folder to write to ({error})") from error
    with file:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def digest(*parts: dict[str, Tensor] | np.ndarray | str | None) -> str:
    """SHA-256 of state dicts, arrays and texts, in their order."""
    result = hashlib.sha256()
    for part in parts:
        if isinstance(part, dict):
            for name, tensor in part.items():
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                result.update(flat.view(torch.uint8).numpy())
        elif isinstance(part, np.ndarray):
            result.update(f"{part.dtype} {part.shape}\n".encode())
            result.update(np.ascontiguousarray(part))
        else:
            result.update(f"{part}\n".encode())
    return result.hexdigest()


def get_rng_state(device: torch.device) -> dict:
    """State of every generator that training may draw from: Python's, NumPy's, PyTorch's and the device's."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_rng_state(state: dict, device: torch.device) -> None:
    """Put back what :func:`get_rng_state` gave; without a state for this device its generator is left alone."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
