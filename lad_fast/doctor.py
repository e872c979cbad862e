"""What this machine offers the library, and whether each back end computes what it should here."""

import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

import lad_fast
from lad_fast.functional import BACKENDS
from lad_fast.kernels.launch import Device, broken_triton, cache_file, gpu, tuned, why_not_triton
from lad_fast.optimizers import has_apex

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "tyro")
OPTIONAL_PACKAGES = ("datasets", "pyarrow", "scikit-learn", "scipy", "matplotlib")
# Accumulation order differs between back ends; tf32 keeps ten bits of mantissa in a GPU's matrix products.
TOLERANCE = {"cpu": 1e-4, "cuda": 5e-3}


def installed_version(package: str) -> str:
    if package == "torch":
        return torch.__version__  # which names the build, as +cu130; its metadata need not
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def largest_error(backend: str, device: str) -> float:
    """Runs a small objective forward and backward and compares it with the reference on the CPU.

    Args:
        backend: "reference", "torch" or "triton".
        device: "cpu" or "cuda".

    Returns:
        The largest difference over the loss and all gradients, each relative to the largest entry of the
        reference's tensor.
    """

    def run(backend: str, device: str) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        gates = lad_fast.GateStack(num_layers=4, hidden_size=32, seq_len=8)
        with torch.no_grad():
            for parameter in gates.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        objective = lad_fast.LADObjective(gates, num_student_layers=2).to(device)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device)

        teacher = [normal(3, 8, 32) for _ in range(4)]
        student = [normal(3, 8, 32).requires_grad_() for _ in range(2)]
        student_logits, teacher_logits = normal(3, 2).requires_grad_(), normal(3, 2)
        labels = torch.tensor([0, 1, 1], device=device)
        output = objective(student, teacher, student_logits, teacher_logits, labels, backend=backend)
        leaves = [*student, student_logits, *objective.parameters()]
        return [output.loss.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(output.loss, leaves))]

    return largest_difference(run(backend, device), run("reference", "cpu"))


def largest_difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Over all tensors, each relative to the largest entry of the expected one; NaN where anything found is NaN."""
    pairs = zip(found, expected, strict=True)
    return torch.stack([(got - want).abs().max() / want.abs().max() for got, want in pairs]).max().item()


def launches(device: Device) -> str:
    """Where the launch of the chain of gates comes from on a GPU."""
    if rows := tuned(device):
        return f"of {len(rows)} sizes as measured ({cache_file()}), of others by heuristic"
    return "by heuristic; lad-fast bench --tune measures them"


def facts() -> Iterator[tuple[str, str]]:
    """What is installed and which devices there are, as pairs of a name and a finding."""
    yield "lad_fast", lad_fast.__version__
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "platform", platform.platform()
    for package in (*PACKAGES, *OPTIONAL_PACKAGES):
        yield package, installed_version(package)
    yield "NVIDIA apex", "FusedAdam found" if has_apex() else "not installed (optional)"
    yield "CPU", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        yield "GPU", "none"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield (
            f"GPU {index}",
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"capability {properties.major}.{properties.minor}, {properties.multi_processor_count} multiprocessors",
        )
        if not why_not_triton(device := torch.device("cuda", index)):
            yield f"GPU {index} launches", launches(gpu(device))
    yield "triton here", broken_triton() or "can be imported"
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    yield "triton interpreter", "on (TRITON_INTERPRET=1): right but slow" if interpreting else "off"


def doctor() -> int:
    """Prints what is here and checks every back end against the reference.

    Returns:
        0 if every back end that can run here computes what the reference does, else 1.
    """
    for name, finding in facts():
        print(f"{name:20} {finding}")
    print()
    sick = False
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        for backend in BACKENDS:
            reason = why_not_triton(torch.device(device)) if backend == "triton" else None
            if reason:
                finding = f"unavailable: {reason}"
            else:
                try:
                    error = largest_error(backend, device)
                except Exception as exception:  # a broken installation can raise anything: report it and go on
                    sick, finding = True, f"BROKEN: {type(exception).__name__}: {exception}"
                else:
                    right = error <= TOLERANCE[device]
                    sick |= not right
                    finding = f"{'ok' if right else 'WRONG'}: largest relative error {error:.1e}"
            print(f"{f'{backend} on {device}':20} {finding}")
    return int(sick)
