"""Work of each way of computing the objective, counted by tracing, and the time that a machine needs for it at least.

    python benchmarks/roofline.py              # this machine, its roofs measured
    python benchmarks/roofline.py --gpu h200   # a GPU's data sheet: predicted, not measured

A kernel takes at least the time of its matrix products or of its bytes, whichever is longer; a variant at least the
sum of its kernels' times, launching left out. Every operand is counted as read from memory and every result as written
there, although caches hold some: less traffic is possible, less than the "ideal" row (inputs and results once) is not.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from baselines import published_gates, published_objective
from measuring import DTYPES, Roofs, measure_roofs, pin_threads, why_not_timed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from workloads import Size

from lad_fast import GateStack, LADObjective, functional
from lad_fast.kernels import launch, ops
from lad_fast.report import format_table


@dataclass(frozen=True)
class DataSheet:
    """A GPU's published rates: dense matrix products with float32 accumulation, and memory bandwidth."""

    name: str
    bfloat16: float
    tf32: float
    float32: float
    bytes_per_second: float

    @property
    def roofs(self) -> Roofs:
        return Roofs(self.bytes_per_second, {"bfloat16": self.bfloat16, "float32": self.float32})


SHEETS = {
    "a100": DataSheet("A100 SXM 80 GB", 312e12, 156e12, 19.5e12, 2.039e12),
    "h100": DataSheet("H100 SXM", 989e12, 495e12, 67e12, 3.35e12),
    "h200": DataSheet("H200 SXM", 989e12, 495e12, 67e12, 4.8e12),
    "b200": DataSheet("B200 SXM", 2250e12, 1125e12, 75e12, 7.7e12),
}


H200 = launch.Device("NVIDIA H200", "sm_90", multiprocessors=132, shared_memory=227 * 1024)


def gate_flops(tokens: int, hidden_size: int, layers: int) -> int:
    """FLOP of the products that the chain needs, forward and backward: three a gate, but for the first one's input."""
    return 2 * tokens * hidden_size**2 * (3 * (layers - 1) - 1)


def step_flops(size: Size, lengths, with_teacher: bool = True) -> int:
    """FLOP of the products that a training step on examples of these lengths needs, pooler and classifier left out.

    Teacher forward, student forward and twice that backward, and the gates; nothing computed twice, no padding.
    """
    hidden, tokens = size.hidden_size, sum(map(int, lengths))
    linear = 2 * tokens * (4 * hidden**2 + 2 * hidden * size.intermediate_size)
    attention = 4 * hidden * sum(int(n) ** 2 for n in lengths)
    layers = size.teacher_layers * with_teacher + 3 * size.student_layers
    return layers * (linear + attention) + gate_flops(tokens, hidden, size.teacher_layers)


@dataclass
class Trace:
    """Kernels of one run: (name, FLOP of matrix products, bytes read and written) each."""

    kernels: list[tuple[str, int, int]] = field(default_factory=list)
    syncs: int = 0

    @property
    def flops(self) -> int:
        return sum(flops for _, flops, _ in self.kernels)

    @property
    def num_bytes(self) -> int:
        return sum(size for _, _, size in self.kernels)

    def floor_seconds(self, roofs: Roofs, dtype: str) -> float:
        return sum(roofs.floor_seconds(dtype, flops, size) for _, flops, size in self.kernels)


_NO_KERNEL = {
    "alias", "detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view",
}  # fmt: skip


class _Recorder(TorchDispatchMode):
    """Writes every operator that runs into a trace; views and allocations run no kernel."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.trace.syncs += 1
        elif not function.is_view and name not in _NO_KERNEL:
            count = flop_registry.get(function.overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=result) if count else 0
            self.trace.kernels.append((name, flops, sum(t.nbytes for t in _tensors((args, kwargs, result)))))
        return result


def _tensors(found) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, dict):
        yield from _tensors(list(found.values()))
    elif isinstance(found, list | tuple):
        for item in found:
            yield from _tensors(item)


def _products(arguments: dict) -> int:
    """Matrix products (T, D) x (D, D) of one launch of a chain kernel."""
    if arguments.get("PRODUCT") == "matmul":
        return arguments["last"] - arguments["first"]
    stages, top = arguments.get("STAGES"), arguments.get("top")
    if stages == "all":
        return (top - 1 + arguments["NEED_LAYERS"]) + top * arguments["RECOMPUTE"]
    if stages == "product":
        position = top - arguments["first"] // 2
        needed = position < top and (position > 0 or arguments["NEED_LAYERS"])
        return needed + (arguments["RECOMPUTE"] and position > 0)
    return 0


@contextlib.contextmanager
def tracing(gpu: launch.Device = H200, settings: launch.ChainLaunch | None = None) -> Iterator[Trace]:
    """Record what runs inside, also within this library's operators; its Triton kernels are noted and not run.

    They are launched as on ``gpu``, the chain's by ``settings`` where given.
    """
    trace = Trace()

    def note(kernel, grid, **arguments) -> None:
        flops = 2 * arguments["T"] * arguments["D"] ** 2 * _products(arguments) if "D" in arguments else 0
        trace.kernels.append((kernel.__name__, flops, sum(t.nbytes for t in _tensors(arguments))))

    with contextlib.ExitStack() as stack:
        # An operator registered with torch is one opaque entry; its plain function shows what it is made of.
        for name, operator in vars(ops).items():
            if isinstance(operator, torch.library.CustomOpDef):
                stack.enter_context(patch.object(ops, name, operator._init_fn))
        # What only tensors on a CPU get: their labels are looked at.
        stack.enter_context(patch.object(functional, "_check_labels", lambda *arguments: None))
        stack.enter_context(patch.object(launch, "launch", note))
        stack.enter_context(patch.object(launch, "why_not_triton", lambda device: None))
        stack.enter_context(patch.object(launch, "gpu", lambda device: gpu))  # tiles and forms
        stack.enter_context(patch.object(launch, "interpreted", lambda: False))
        if settings:
            stack.enter_context(patch.object(launch, "chain", lambda *rest: settings))
        stack.enter_context(_Recorder(trace))
        yield trace


VARIANTS = ("reference", "published", "torch", "triton")


def trace_objective(
    variant: str,
    tokens: int,
    hidden_size: int,
    layers: int,
    dtype: str,
    seq_len: int = 128,
    settings: launch.ChainLaunch | None = None,
    masked: bool = False,
) -> Trace:
    """One forward and backward of the objective, with half as many student layers as the teacher has.

    Tensors are on the CPU. States are of ``dtype``, as on a GPU; the published form is float32 whatever is asked.
    ``settings`` say in which form "triton" launches the chain. ``masked``: with an attention mask; not the published
    form's.
    """
    torch.manual_seed(0)
    dtype = torch.float32 if variant == "published" else DTYPES[dtype]
    size = (tokens // seq_len, seq_len, hidden_size)
    teacher = [torch.randn(size).to(dtype) for _ in range(layers)]
    student = [torch.randn(size).to(dtype).requires_grad_() for _ in range(layers // 2)]
    logits, labels = torch.randn(size[0], 2, requires_grad=True), torch.randint(2, size[:1])
    gates = GateStack(layers, hidden_size, seq_len)
    objective = LADObjective(gates, layers // 2)
    inputs = (student, teacher, logits, torch.randn(size[0], 2), labels)
    if variant == "published":
        highway = published_gates(gates)
        with tracing() as trace:
            published_objective(*inputs, highway, objective.layers)
        return trace
    mask = torch.ones(size[:2], dtype=torch.int64) if masked else None
    seed = torch.ones(())  # the gradient's start: the caller's, as a loss scale would be
    with tracing(settings=settings) as trace:
        objective(*inputs, attention_mask=mask, backend=variant).loss.backward(seed)
    return trace


def ideal_bytes(tokens: int, hidden_size: int, layers: int, dtype: str, seq_len: int = 128) -> int:
    """Bytes of inputs read once and gradients written once: teacher and student states, gates (float32) and back."""
    states = (layers + 2 * (layers // 2)) * tokens * hidden_size * DTYPES[dtype].itemsize
    gate = hidden_size**2 + hidden_size + 2 * seq_len * hidden_size
    return states + 2 * 4 * (layers - 1) * gate


def rows(roofs: Roofs, dtype: str, tokens: int, hidden_size: int, layers: int) -> list[dict]:
    """One row a variant, and the ideal."""
    found = {name: trace_objective(name, tokens, hidden_size, layers, dtype) for name in VARIANTS}
    result = []
    needed = gate_flops(tokens, hidden_size, layers)
    for name, trace in found.items():
        run_in = "float32" if name == "published" else dtype
        # Triton's kernels and oneDNN's operators do not tell their products: those back ends compute what is needed.
        flops = max(trace.flops, needed)
        floor = max(trace.floor_seconds(roofs, run_in), roofs.floor_seconds(run_in, flops, trace.num_bytes))
        result.append(
            {
                "variant": f"{name}, {run_in}", "flops": flops, "bytes": trace.num_bytes,
                "kernels": len(trace.kernels), "syncs": trace.syncs, "floor_s": floor,
            }
        )  # fmt: skip
    ideal = ideal_bytes(tokens, hidden_size, layers, dtype)
    floor = roofs.floor_seconds(dtype, needed, ideal)
    return [*result, {"variant": f"ideal, {dtype}", "flops": needed, "bytes": ideal, "floor_s": floor}]


def table(found: list[dict], kind: str) -> str:
    def cells(row: dict) -> list[str]:
        counts = [str(row[name]) if name in row else "-" for name in ("kernels", "syncs")]
        gflop, megabytes = f"{row['flops'] / 1e9:.4g}", f"{row['bytes'] / 1e6:.4g}"
        return [row["variant"], gflop, megabytes, *counts, f"{1e3 * row['floor_s']:.3g} ms"]

    return format_table(["variant", "GFLOP", "MB", "kernels", "syncs", f"floor, {kind}"], [cells(r) for r in found])


def main(write: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", choices=SHEETS, help="take a data sheet's roofs")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 where there are products of it")
    for name, default in (("tokens", 4096), ("hidden-size", 768), ("layers", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    pin_threads()
    roofs = SHEETS[options.gpu].roofs if options.gpu else measure_roofs()
    dtype = options.dtype or next(name for name in ("bfloat16", "float32") if name in roofs.flop_per_second)
    if dtype not in roofs.flop_per_second:
        parser.error(f"--dtype {dtype}: {why_not_timed(dtype)}")
    kind = f"predicted for {SHEETS[options.gpu].name}" if options.gpu else "of the measured roofs"
    found = rows(roofs, dtype, options.tokens, options.hidden_size, options.layers)
    write(table(found, kind))


if __name__ == "__main__":
    main()
