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
    """Tile and warps of a kernel around one matrix product (T, D) x (D, D); what the tests hold of its registers and
    shared memory lets ``blocks_per_sm`` blocks run at once on a multiprocessor."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    blocks_per_sm: int
    splits: int = 1  # strips of columns that the epilogue takes one after another: two need fewer registers
    group_m: int = 8


@dataclass(frozen=True)
class TileLaunch:
    """Tile of an element-wise kernel: ``rows`` tokens by ``columns`` features a step."""

    rows: int
    columns: int
    num_warps: int


@dataclass(frozen=True)
class ChainLaunch:
    """How the chain of gates is launched.

    ``forward``: "triton" (two launches a gate: product and norm), "cublas" (cuBLAS's product, then the rest in one
    launch) or "persistent" (one launch for all gates). ``backward``: "triton" (two launches a gate) or "persistent".
    """

    forward: str
    backward: str
    gemm: GemmLaunch
    epilogue: GemmLaunch  # tile of the rest behind cuBLAS's product
    gate: TileLaunch  # tile of backward's element-wise part
    multiprocessors: int
    rows_per_sweep: int = 512  # "token" norm: rows over which the parameters' partial sums are spread

    def programs(self, tile: GemmLaunch) -> int:
        """Programs with that tile that run at once on the whole device."""
        return self.multiprocessors * tile.blocks_per_sm


@dataclass(frozen=True)
class Device:
    """What the choice of a launch reads of a GPU."""

    name: str
    architecture: str
    multiprocessors: int
    cooperative: bool  # whether programs of one launch may wait for one another


# Tiles by architecture and kind of product, the largest first. Kinds: "half" states and products in 16 bits; "mixed"
# float32 states, 16-bit products (autocast); "tf32" and "ieee" float32 as torch's setting says. Kinds with float32
# states take narrower tiles: their epilogues hold twice the registers. sm_80 also serves 8.6, 8.9 and 12.0, whose
# shared memory (99 KiB) its rows fit; sm_100 also 10.3.
GEMM = {
    ("sm_80", "half"): (GemmLaunch(128, 128, 32, 8, 3, 1, 2), GemmLaunch(64, 64, 64, 8, 3, 1)),
    ("sm_80", "mixed"): (GemmLaunch(64, 64, 32, 8, 3, 1),),
    ("sm_80", "tf32"): (GemmLaunch(64, 64, 32, 8, 3, 1),),
    ("sm_80", "ieee"): (GemmLaunch(128, 64, 16, 8, 3, 1, 2),),
    ("sm_90", "half"): (GemmLaunch(128, 128, 64, 8, 3, 1, 2), GemmLaunch(64, 64, 64, 8, 3, 1)),
    ("sm_90", "mixed"): (GemmLaunch(128, 64, 64, 8, 3, 1, 2), GemmLaunch(64, 64, 64, 8, 3, 1)),
    ("sm_90", "tf32"): (GemmLaunch(128, 64, 32, 8, 3, 1, 2), GemmLaunch(64, 64, 32, 8, 3, 1)),
    ("sm_90", "ieee"): (GemmLaunch(64, 64, 16, 8, 3, 1, 2),),
    ("sm_100", "half"): (GemmLaunch(128, 128, 64, 8, 3, 1, 2), GemmLaunch(64, 64, 64, 8, 3, 1)),
    ("sm_100", "mixed"): (GemmLaunch(128, 64, 64, 8, 3, 1, 2), GemmLaunch(64, 64, 32, 8, 3, 1)),
    ("sm_100", "tf32"): (GemmLaunch(128, 64, 32, 8, 3, 1, 2), GemmLaunch(64, 64, 32, 8, 3, 1)),
    ("sm_100", "ieee"): (GemmLaunch(64, 64, 16, 8, 3, 1),),
    ("gfx942", "half"): (GemmLaunch(128, 128, 32, 8, 2, 1), GemmLaunch(64, 64, 32, 4, 2, 1)),
    ("gfx942", "mixed"): (GemmLaunch(64, 64, 32, 4, 2, 1),),
    ("gfx942", "tf32"): (GemmLaunch(64, 64, 32, 4, 2, 1),),
    ("gfx942", "ieee"): (GemmLaunch(64, 64, 32, 4, 2, 1),),
}
EPILOGUE = GemmLaunch(32, 256, 16, 8, 1, 1)
GATE_BACKWARD = TileLaunch(rows=8, columns=256, num_warps=8)
# Small, so that narrow test sizes already take several tiles along each axis.
INTERPRETED = ChainLaunch(
    "triton", "triton", GemmLaunch(32, 32, 16, 1, 1, 1, splits=2, group_m=2), GemmLaunch(16, 32, 16, 1, 1, 1),
    TileLaunch(4, 32, 1), multiprocessors=12, rows_per_sweep=24,
)  # fmt: skip
HIDDEN_LOSS = TileLaunch(rows=4, columns=512, num_warps=4)
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


def matmul_precision(dtype: torch.dtype) -> str:
    """Triton's ``input_precision`` for operands of ``dtype``, as torch's float32 setting says."""
    if dtype != torch.float32:
        return "tf32"  # Triton's default; means nothing for 16-bit operands
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def kind(state_dtype: torch.dtype, matmul_dtype: torch.dtype) -> str:
    if matmul_dtype == torch.float32:
        return matmul_precision(matmul_dtype)
    return "mixed" if state_dtype == torch.float32 else "half"


def _bucket(num_tokens: int) -> int:
    """Token counts that share a launch: the power of two at or above. Lengths vary from batch to batch."""
    return min(max(256, 1 << (num_tokens - 1).bit_length()), 16384)


def settings(forward: str, backward: str, gemm: GemmLaunch, multiprocessors: int) -> ChainLaunch:
    """A launch in those forms with that tile."""
    return ChainLaunch(forward, backward, gemm, EPILOGUE, GATE_BACKWARD, multiprocessors)


@functools.cache
def heuristic(device: Device, kind: str, tokens: int, hidden_size: int) -> ChainLaunch:
    """The launch for a size that nobody measured: the largest tile that still gives each multiprocessor one."""
    tiles = GEMM[device.architecture, kind]
    count = lambda tile: -(-tokens // tile.block_m) * -(-hidden_size // tile.block_n)  # noqa: E731
    tile = next((tile for tile in tiles if count(tile) >= device.multiprocessors), tiles[-1])
    form = "persistent" if device.cooperative else "triton"
    return settings(form, form, tile, device.multiprocessors)


@functools.cache
def gpu(device: torch.device) -> Device:
    """The GPU behind a tensor's device."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:  # programs that wait for others have never run on one: not by themselves
        return Device(properties.name, "gfx942", properties.multi_processor_count, cooperative=False)
    architecture = {9: "sm_90", 10: "sm_100"}.get(properties.major, "sm_80")
    return Device(properties.name, architecture, properties.multi_processor_count, cooperative=True)


def chain(state: Tensor, matmul_dtype: torch.dtype, per_token: bool) -> ChainLaunch:
    """How the chain runs on states (T, D) multiplied in a dtype."""
    if interpreted():
        return INTERPRETED
    num_tokens, hidden_size = state.shape
    return heuristic(gpu(state.device), kind(state.dtype, matmul_dtype), _bucket(num_tokens), hidden_size)


def keep_gates(memory: str, state: Tensor, num_gates: int) -> bool:
    """Whether the gates' values, so many tensors like ``state``, are kept for backward."""
    if memory == "auto" and state.device.type == "cuda":
        return num_gates * state.nbytes <= torch.cuda.get_device_properties(state.device).total_memory // 16
    return memory != "low"


@functools.cache
def _counters(device: torch.device, stream: int, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)


def counters(device: torch.device, size: int) -> Tensor:
    """At least so many zeros (int32) for programs to count arrivals in; kernels leave them zero.

    They are kept from call to call, for each stream its own. Under CUDA graph capture they belong to the graph.
    """
    size = 1 << (size - 1).bit_length()
    if device.type != "cuda":
        return torch.zeros(size, dtype=torch.int32, device=device)
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(size, dtype=torch.int32, device=device)
        return _counters(device, torch.cuda.current_stream().cuda_stream, size)


def cooperative(wanted: bool) -> dict[str, bool]:
    """Launch options under which the device runs all programs at once, or refuses the launch."""
    return {"launch_cooperative_grid": True} if wanted else {}


def launch(kernel, grid: tuple[int, ...], **arguments) -> None:
    """Run ``kernel`` by keyword on the device of its tensors, whichever device is current."""
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments)
