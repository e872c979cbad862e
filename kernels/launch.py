"""Everything that depends on the device: whether Triton runs, the architecture, launch settings, the launch.

Launch settings are data: one frozen row an architecture and kind of matrix product, never keyed by the token
count, since lengths vary from batch to batch.
"""

import functools
import importlib.util
import os
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GemmLaunch:
    """Tile and warps of a kernel around one matrix product (T, D) x (D, D)."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8


@dataclass(frozen=True)
class TileLaunch:
    """Tile of an element-wise kernel: ``rows`` tokens by ``columns`` features a step."""

    rows: int
    columns: int
    num_warps: int


# Kinds: "half" states and products in 16 bits; "mixed" float32 states, 16-bit products (autocast); "tf32" and "ieee"
# float32 as torch's setting says. Kinds with float32 states take narrower tiles: their epilogues hold twice the
# registers. sm_80 also serves 8.6, 8.9 and 12.0, whose shared memory (99 KiB) its rows fit; sm_100 also 10.3.
GEMM = {
    ("sm_80", "half"): GemmLaunch(128, 128, 32, num_warps=8, num_stages=4),
    ("sm_80", "mixed"): GemmLaunch(64, 64, 32, num_warps=4, num_stages=4),
    ("sm_80", "tf32"): GemmLaunch(64, 64, 32, num_warps=4, num_stages=4),
    ("sm_80", "ieee"): GemmLaunch(64, 64, 16, num_warps=8, num_stages=3),
    ("sm_90", "half"): GemmLaunch(128, 128, 64, num_warps=8, num_stages=4),
    ("sm_90", "mixed"): GemmLaunch(128, 64, 64, num_warps=8, num_stages=4),
    ("sm_90", "tf32"): GemmLaunch(128, 64, 32, num_warps=8, num_stages=4),
    ("sm_90", "ieee"): GemmLaunch(64, 64, 16, num_warps=8, num_stages=3),
    ("sm_100", "half"): GemmLaunch(128, 128, 64, num_warps=8, num_stages=4),
    ("sm_100", "mixed"): GemmLaunch(128, 64, 64, num_warps=8, num_stages=4),
    ("sm_100", "tf32"): GemmLaunch(128, 64, 32, num_warps=8, num_stages=4),
    ("sm_100", "ieee"): GemmLaunch(64, 64, 16, num_warps=8, num_stages=3),
    ("gfx942", "half"): GemmLaunch(128, 128, 32, num_warps=8, num_stages=2),
    ("gfx942", "mixed"): GemmLaunch(64, 64, 32, num_warps=4, num_stages=2),
    ("gfx942", "tf32"): GemmLaunch(64, 64, 32, num_warps=4, num_stages=2),
    ("gfx942", "ieee"): GemmLaunch(64, 64, 32, num_warps=4, num_stages=2),
}
# Small, so that narrow test sizes already take several tiles along each axis.
INTERPRETER_GEMM = GemmLaunch(32, 32, 16, num_warps=1, num_stages=1, group_m=2)
NORM = TileLaunch(rows=4, columns=256, num_warps=4)
GATE_BACKWARD = TileLaunch(rows=2, columns=256, num_warps=2)
HIDDEN_LOSS = TileLaunch(rows=4, columns=512, num_warps=4)
TOKENS_PER_SWEEP = 512  # "token" norm: rows over which one pass of the parameters' partial sums is spread
CLASSES_PER_STEP = 256  # logit loss: classes read at once
PACKED_ROWS = 1024  # see laid_out_for
CPU_BLOCK_ELEMENTS = 1024 * 768  # "torch" back end: elements of a state that go through the chain at once on a CPU


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_triton(device: torch.device) -> str | None:
    """None where Triton kernels run on ``device``, otherwise the reason they do not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and not interpreted():
        return f"the tensors are on {device.type}, and TRITON_INTERPRET=1 is not set"
    return None


def torch_block_rows(state: Tensor) -> int | None:
    """Rows of (T, D) that the "torch" back end takes through the chain at once; None for all, where launches cost."""
    return max(1, CPU_BLOCK_ELEMENTS // state.shape[1]) if state.device.type == "cpu" else None


@functools.cache
def _onednn_linear(dtype: torch.dtype):
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    runs = dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.ops.mkldnn._linear_pointwise.default if runs else None


def onednn_linear(operand: Tensor):
    """oneDNN's ``act(x @ weight.T + bias)``, the operator that Inductor calls, or None where it does not run.

    torch.mm gives float32 products on a CPU to MKL, which on AMD's processors stays with AVX2; oneDNN takes AVX-512
    there and is twice as fast. It reads transposed operands as they are.
    """
    return _onednn_linear(operand.dtype) if operand.device.type == "cpu" else None


def laid_out_for(num_rows: int, weight: Tensor) -> Tensor:
    """A weight (N, K) as :func:`onednn_linear` takes it, copied to oneDNN's own layout where that many rows pay for it.

    A copy costs as much as the products of some 800 rows gain; they run 15 % faster.
    """
    if num_rows < PACKED_ROWS or onednn_linear(weight) is None:
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), num_rows)


def architecture(device: torch.device) -> str:
    """The name under which :data:`GEMM` keeps rows for a GPU."""
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def matmul_precision(dtype: torch.dtype) -> str:
    """Triton's ``input_precision`` for operands of ``dtype``, as torch's float32 setting says."""
    if dtype != torch.float32:
        return "tf32"  # Triton's default; means nothing for 16-bit operands
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def gemm(device: torch.device, state_dtype: torch.dtype, matmul_dtype: torch.dtype) -> GemmLaunch:
    """The row for states of one dtype multiplied in another."""
    if interpreted():
        return INTERPRETER_GEMM
    if matmul_dtype == torch.float32:
        kind = matmul_precision(matmul_dtype)
    else:
        kind = "mixed" if state_dtype == torch.float32 else "half"
    return GEMM[architecture(device), kind]


def launch(kernel, grid: tuple[int, ...], **arguments) -> None:
    """Run ``kernel`` by keyword on the device of its tensors, whichever device is current."""
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments)
