"""What Triton's interpreter lacks: programs that run at once, and a count of the bytes that a kernel moves.

Both are context managers and change every launch inside; they nest in either order. On a GPU they change nothing.
"""

import inspect
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

# Where triton is not installed, this skips the test file that imports this one.
interpreter = pytest.importorskip("triton.runtime.interpreter")
GridExecutor, Builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
# Where pointers and mask stand among the operands. Other atomic operations are loads and stores to the interpreter.
ATOMICS = {"create_atomic_rmw": (1, 3), "create_atomic_cas": (0, None)}
IDLE_TURNS = 10_000  # a waiting program may look at several counters before it looks at the same one again


def _addresses(pointers, mask) -> np.ndarray:
    """(N,) of the elements that an access touches."""
    return pointers.data.ravel() if mask is None else pointers.data[mask.data]


def _dtype(pointers) -> np.dtype:
    return interpreter._get_np_dtype(pointers.get_element_ty())


def _contents(pointers, mask) -> bytes:
    """What memory holds there, read behind the back of every patch."""
    addresses, dtype = _addresses(pointers, mask), _dtype(pointers)
    everywhere, other = np.ones(addresses.shape, bool), np.zeros(addresses.shape, dtype)
    return interpreter._interpreter.load(addresses, everywhere, other, dtype).tobytes()


def _atomic_access(name: str, operands: tuple) -> tuple:
    """Pointers and mask of an atomic operation."""
    i_pointers, i_mask = ATOMICS[name]
    return operands[i_pointers], None if i_mask is None else operands[i_mask]


class DeadlockError(RuntimeError):
    """The programs of a kernel wait for what none of them will do."""


class _Stopped(BaseException):
    """Unwinds a program that must not go on. No Exception, since the interpreter wraps those."""


class _Program(threading.Thread):
    """One program of a grid, which runs from each :meth:`resume` to its next :meth:`pause` or its end."""

    def __init__(self, index: tuple[int, int, int], function, arguments: dict):
        super().__init__(daemon=True)
        self.index, self.function, self.arguments = index, function, arguments
        self.changed_memory = False  # since it was last resumed
        self.ended = self.stopping = False
        self.error: BaseException | None = None
        self._resumed, self._paused = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        try:
            self._wait()
            self.function(**self.arguments)
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.ended = True
        self._paused.release()

    def _wait(self) -> None:
        self._resumed.acquire()
        if self.stopping:
            raise _Stopped

    def pause(self) -> None:
        self._paused.release()
        self._wait()

    def resume(self) -> None:
        interpreter.interpreter_builder.set_grid_idx(*self.index)  # all that the interpreter keeps of a program
        self.changed_memory = False
        self._resumed.release()
        self._paused.acquire()

    def stop(self) -> None:
        self.stopping = True
        self._resumed.release()
        self.join()


def _turns(programs: list[_Program], order: str | int) -> Iterator[_Program]:
    """The program that runs next, until all have ended."""
    live = programs[::-1] if order == "backward" else programs
    draw = None if isinstance(order, str) else random.Random(order)
    # Some programs run far ahead of others: where all keep pace, what comes too early or too late passes unseen.
    speed = {program: 16 ** -draw.random() for program in programs} if draw else {}
    while live := [program for program in live if not program.ended]:
        turns = draw.choices(live, [speed[program] for program in live], k=len(live)) if draw else live
        yield from (program for program in turns if not program.ended)


class _Grid:
    """Takes the place of a kernel's function in the interpreter's loop over the grid; the first call runs it all."""

    def __init__(self, function, order: str | int):
        self.function, self.order, self.begun = function, order, False
        # What the interpreter reads of a kernel's function.
        self.__name__, self.__globals__ = function.__name__, function.__globals__
        self.__signature__ = inspect.signature(function)

    def __call__(self, **arguments) -> None:
        if self.begun:
            return
        self.begun = True
        shape = interpreter.interpreter_builder.grid_dim
        programs = [_Program(index, self.function, arguments) for index in np.ndindex(shape)]
        try:
            for program in programs:
                program.start()
            self._run(programs)
        finally:
            for program in programs:
                if program.ident is not None:  # else it did not start
                    program.stop()

    def _run(self, programs: list[_Program]) -> None:
        idle = 0
        for program in _turns(programs, self.order):
            program.resume()
            if program.error is not None:
                raise program.error
            idle = 0 if program.changed_memory or program.ended else idle + 1
            if idle >= max(IDLE_TURNS, 100 * len(programs)):
                waiting = [program.index for program in programs if not program.ended]
                raise DeadlockError(
                    f"deadlock in {self.__name__}: {len(waiting)} of {len(programs)} programs wait, the first of them "
                    f"{waiting[0]}, and none has changed anything in {idle} turns"
                )


@contextmanager
def concurrent_programs(order: str | int = "forward") -> Iterator[None]:
    """Run the programs of each kernel at once, so that they can wait for one another.

    Still one at a time, and each time in the same way: a program hands over behind every volatile load and every atomic
    operation of :data:`ATOMICS`. "forward" and "backward" go round the grid; a seed draws who is next, and finds more
    races. Raises :class:`DeadlockError`.
    """
    if isinstance(order, str) and order not in ("forward", "backward"):
        raise ValueError(f"order must be 'forward', 'backward' or a seed, got {order!r}")
    execute = GridExecutor.__call__
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def patched_execute(executor, *args, **kwargs):
        executor.fn = _Grid(executor.fn, order)
        try:
            execute(executor, *args, **kwargs)
        except interpreter.InterpreterError as error:
            if isinstance(error.__cause__, DeadlockError):
                raise error.__cause__ from None
            raise

    def patched_load(builder, *operands, **options):
        result = load(builder, *operands, **options)
        # The last operand in every version of Triton; loads by a descriptor pass it by name.
        if options.get("is_volatile", operands[-1]):
            threading.current_thread().pause()
        return result

    def patched_store(builder, *operands):
        threading.current_thread().changed_memory = True
        store(builder, *operands)

    def patched_atomic(name):
        operation = getattr(Builder, name)

        def patched(builder, *operands):
            program, access = threading.current_thread(), _atomic_access(name, operands)
            before = _contents(*access)
            result = operation(builder, *operands)
            program.changed_memory |= _contents(*access) != before
            program.pause()
            return result

        return patched

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", patched_execute)
        patch.setattr(Builder, "create_masked_load", patched_load)
        patch.setattr(Builder, "create_masked_store", patched_store)
        for name in ATOMICS:
            patch.setattr(Builder, name, patched_atomic(name))
        yield


@dataclass
class Traffic:
    """Bytes that one kernel's launches moved, by argument, "?" for what lies in none; ``Counter.total`` adds them up.

    ``loaded`` and ``stored`` count every access; ``distinct_loaded`` and ``distinct_stored`` an address once a launch.
    """

    launches: int = 0
    loaded: Counter = field(default_factory=Counter)
    stored: Counter = field(default_factory=Counter)
    distinct_loaded: Counter = field(default_factory=Counter)
    distinct_stored: Counter = field(default_factory=Counter)


def _tensors(argument) -> Iterator[torch.Tensor]:
    """The tensors that a kernel's argument holds."""
    if isinstance(argument, tuple):
        for entry in argument:
            yield from _tensors(entry)
    elif isinstance(argument, interpreter.TensorDescriptor):
        yield from _tensors(argument.base)
    elif hasattr(argument, "data_ptr"):
        yield interpreter._unwrap_tensor(argument)


class _Launch:
    """Counts one launch; ``arguments`` are those that its programs get."""

    def __init__(self, traffic: Traffic, arguments: dict):
        self.traffic = traffic
        traffic.launches += 1
        views, storages = [], []  # (bytes, first address, argument)
        for name, argument in arguments.items():
            for tensor in _tensors(argument):
                storage = tensor.untyped_storage()
                storages.append((storage.nbytes(), storage.data_ptr(), name))
                if tensor.numel():
                    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
                    views.append((extent * tensor.element_size(), tensor.data_ptr(), name))
        # The smallest first. A whole storage comes behind all views: kernels walk on from a part of a stack.
        by_size = lambda entry: entry[0]  # noqa: E731
        self.ranges = sorted(views, key=by_size) + sorted(storages, key=by_size)
        self.touched: dict[tuple[str, str, int], list[np.ndarray]] = {}

    def _owners(self, addresses: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """An access by argument."""
        first, last = int(addresses.min()), int(addresses.max())
        for size, start, name in self.ranges:
            if last < start or start + size <= first:
                continue
            inside = (addresses >= start) & (addresses < start + size)
            if inside.any():
                yield name, addresses[inside]
                addresses = addresses[~inside]
            if not addresses.size:
                return
        yield "?", addresses

    def record(self, direction: str, pointers, mask) -> None:
        addresses, size = _addresses(pointers, mask), _dtype(pointers).itemsize
        if not addresses.size:
            return
        for name, owned in self._owners(addresses):
            getattr(self.traffic, direction)[name] += owned.size * size
            touched = self.touched.setdefault((direction, name, size), [])
            touched.append(np.unique(owned))
            if len(touched) == 256:  # keeps memory near the distinct addresses
                touched[:] = [np.unique(np.concatenate(touched))]

    def finish(self) -> None:
        for (direction, name, size), touched in self.touched.items():
            getattr(self.traffic, f"distinct_{direction}")[name] += np.unique(np.concatenate(touched)).size * size


@contextmanager
def counted_traffic() -> Iterator[dict[str, Traffic]]:
    """Count what each kernel loads and stores, by the kernel's name. An atomic operation does both."""
    execute, init_args = GridExecutor.__call__, GridExecutor._init_args_hst
    load, store = Builder.create_masked_load, Builder.create_masked_store
    kernels: dict[str, Traffic] = {}
    launch: _Launch | None = None

    def patched_init_args(executor, args_dev, kwargs):
        nonlocal launch
        args, kwargs = init_args(executor, args_dev, kwargs)
        arguments = dict(zip(executor.arg_names, args, strict=False)) | kwargs  # the rest of the names are in kwargs
        launch = _Launch(kernels.setdefault(executor.fn.__name__, Traffic()), arguments)
        return args, kwargs

    def patched_execute(executor, *args, **kwargs):
        execute(executor, *args, **kwargs)
        launch.finish()

    def patched_load(builder, pointers, mask, *options, **more):
        launch.record("loaded", pointers, mask)
        return load(builder, pointers, mask, *options, **more)

    def patched_store(builder, pointers, value, mask, *options):
        launch.record("stored", pointers, mask)
        store(builder, pointers, value, mask, *options)

    def patched_atomic(name):
        operation = getattr(Builder, name)

        def patched(builder, *operands):
            for direction in ("loaded", "stored"):
                launch.record(direction, *_atomic_access(name, operands))
            return operation(builder, *operands)

        return patched

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "_init_args_hst", patched_init_args)
        patch.setattr(GridExecutor, "__call__", patched_execute)
        patch.setattr(Builder, "create_masked_load", patched_load)
        patch.setattr(Builder, "create_masked_store", patched_store)
        for name in ATOMICS:
            patch.setattr(Builder, name, patched_atomic(name))
        yield kernels
