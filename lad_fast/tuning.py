"""``lad-fast bench --tune``: measures how a GPU best launches the chain of gates, and keeps that for later runs.

Each candidate of :func:`lad_fast.kernels.launch.candidates` must first give the loss and gradients of the "torch" back
end. The fastest goes into :func:`lad_fast.kernels.launch.cache_file`, where training looks it up.
"""

import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from lad_fast.doctor import largest_difference
from lad_fast.functional import chain_loss
from lad_fast.kernels import launch
from lad_fast.kernels.launch import ChainLaunch, Size
from lad_fast.report import format_table

__all__ = ["default_sizes", "median_seconds", "tune"]

# By kind, of a tensor's entries: the largest difference over the largest entry. Both back ends round to 8 bits, "half"
# all that is stored along the chain, "mixed" operands of products; "tf32" rounds those to 11 bits; "ieee" sums in
# another order. With the interpreter's coarser bfloat16 half of each was measured; what a broken tile leaves is off by
# about 1.
TOLERANCE = {"half": 8e-2, "mixed": 3e-2, "tf32": 5e-3, "ieee": 1e-4}


def default_sizes(full: bool) -> list[Size]:
    """16-bit products, the published norm and some numbers of tokens; ``full``: all kinds, norms and buckets."""
    tokens = (256, 512, 1024, 2048, 4096, 8192, 16384) if full else (256, 512, 1024, 4096, 16384)
    kinds = ("mixed", "half", "tf32", "ieee") if full else ("mixed", "half")
    norms = ("sequence", "token") if full else ("sequence",)
    return [Size(*size) for size in itertools.product(kinds, tokens, (384, 768, 1024), norms)]


def median_seconds(run: Callable[[], object]) -> float:
    """Median by CUDA events of some 100 ms of calls behind a warm-up, each with nothing in the L2 cache."""
    from triton.testing import do_bench

    return do_bench(run, return_mode="median") / 1e3


def tune(
    sizes: Iterable[Size],
    device: torch.device,
    *,
    layers: int = 12,
    seq_len: int = 128,
    timer: Callable[[Callable[[], object]], float] = median_seconds,
) -> None:
    """Measure forward and backward of the hidden loss through the chain, print what was tried, keep the fastest.

    Each size is kept when it is done, so stopping loses the one at hand.

    Args:
        sizes: what to measure; fewer tokens than ``seq_len`` are one example.
        device: the current GPU.
        layers: teacher layers L; every second one has a student layer.
        seq_len: tokens of an example.
        timer: seconds that a function takes.

    Raises:
        OSError: the cache file cannot be written.
    """
    gpu = launch.gpu(device)
    _keep(launch.cache_key(gpu), {})  # what cannot be written shows before hours of measuring, not behind them
    for size in sizes:
        with _arithmetic(size.kind, device):
            try:
                problem = _Problem(size, device, layers, seq_len)
                expected = problem.step("torch")
            except torch.OutOfMemoryError:
                print(f"\n{size}: does not fit the GPU's memory")
                continue
            choices = launch.candidates(gpu, size.kind)
            outcomes = [_outcome(problem, choice, expected, timer) for choice in choices]
        print(f"\n{_table(size, choices, outcomes)}", flush=True)
        times = [(outcome, i) for i, outcome in enumerate(outcomes) if isinstance(outcome, float)]
        if times:
            seconds, i = min(times)
            row = asdict(choices[i]) | {"microseconds": round(seconds * 1e6, 1)}
            _keep(launch.cache_key(gpu), {str(size): row})
    print(f"\nkept in {launch.cache_file()}")


@contextmanager
def _arithmetic(kind: str, device: torch.device) -> Iterator[None]:
    """torch's settings under which products are of that kind."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if kind == "tf32" else "ieee"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=kind == "mixed"):
            yield
    finally:
        matmul.fp32_precision = before


class _Problem:
    """The hidden loss through the chain on made-up states of one size, all of whose inputs need gradients but the
    teacher's states."""

    def __init__(self, size: Size, device: torch.device, layers: int, seq_len: int) -> None:
        self.size, self.layers = size, range(1, layers, 2)
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, dtype=torch.float32) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        length, hidden_size = min(seq_len, size.tokens), size.hidden_size
        states = (size.tokens // length, length, hidden_size)
        dtype = torch.bfloat16 if size.kind == "half" else torch.float32
        self.teacher = [normal(*states, dtype=dtype) for _ in range(layers)]
        self.student = [normal(*states, dtype=dtype).requires_grad_() for _ in self.layers]
        affine = (layers - 1, *((length, hidden_size) if size.norm == "sequence" else (hidden_size,)))
        weight = normal(layers - 1, hidden_size, hidden_size) / hidden_size**0.5
        gates = (weight, 0.3 * normal(layers - 1, hidden_size), 1 + normal(*affine) / 4, normal(*affine) / 4)
        self.gates = [parameter.requires_grad_() for parameter in gates]

    def step(self, backend: str) -> list[Tensor]:
        """Losses (K,), then the gradients of their sum."""
        losses = chain_loss(self.student, self.teacher, self.gates, self.layers, backend=backend)
        return [losses.detach(), *torch.autograd.grad(losses.sum(), [*self.student, *self.gates])]


def _outcome(problem: _Problem, choice: ChainLaunch, expected: list[Tensor], timer) -> float | str:
    """Seconds of a step launched so, or why it is not to be launched so."""
    try:
        with launch.forced(choice):
            error = largest_difference(problem.step("triton"), expected)
            if not error <= TOLERANCE[problem.size.kind]:  # NaN is wrong, too
                return f"wrong by {error:.1e}"
            return timer(lambda: problem.step("triton"))
    except Exception as error:  # compiler and driver raise what they like; a grid that does not fit is refused
        return f"does not run: {type(error).__name__}: {' '.join(str(error).split())[:80]}"
    finally:
        launch.forget_counters()


def _table(size: Size, choices: list[ChainLaunch], outcomes: list[float | str]) -> str:
    """What was tried, the fastest first."""
    order = sorted(range(len(choices)), key=lambda i: (isinstance(outcomes[i], str), outcomes[i]))
    rows = []
    for choice, outcome in ((choices[i], outcomes[i]) for i in order):
        tile = choice.gemm
        shape = f"{tile.block_m} x {tile.block_n} x {tile.block_k}"
        told = outcome if isinstance(outcome, str) else f"{outcome * 1e6:.0f} us"
        counts = (tile.num_stages, tile.num_warps, tile.blocks_per_sm)
        rows.append((choice.forward, choice.backward, shape, *map(str, counts), told))
    return format_table((f"{size}: forward", "backward", "tile", "stages", "warps", "blocks", "a step"), rows)


def _keep(key: str, rows: dict[str, dict]) -> None:
    """Add rows to the cache file; until it is whole, the old one stays."""
    path = launch.cache_file()
    entries = launch.read_cache(path)
    entries[key] = entries.get(key, {}) | rows
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            partial = Path(folder) / path.name
            partial.write_text(json.dumps(entries, indent=1), encoding="utf-8")
            os.replace(partial, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written, LAD_FAST_CACHE names another folder: {error}") from error
    launch.tuned.cache_clear()
    launch.choose.cache_clear()
