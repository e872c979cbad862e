"""Everything that depends on the device: whether Triton runs, the architecture, launch settings, the launch.

Launch settings are data: frozen rows, looked up by :class:`Size` in what ``lad-fast bench --tune`` measured on this
GPU, else chosen by a heuristic from the architecture's tiles. No call measures anything by itself.
"""

import functools
import importlib.util
import itertools
import json
import os
import platform
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

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
    shared_memory: int  # bytes that one block may use
    registers: int = 65536  # of a multiprocessor, 32 bits each


@dataclass(frozen=True)
class Size:
    """What a launch is chosen by."""

    kind: str  # of product, see GEMM
    tokens: int  # a bucket, see _bucket
    hidden_size: int
    norm: str  # "sequence" or "token"

    def __str__(self) -> str:
        return f"{self.kind} {self.tokens} {self.hidden_size} {self.norm}"


# Tiles by architecture and kind of product, the largest first. Kinds: "half" states and products in 16 bits; "mixed"
# float32 states, 16-bit products (autocast); "tf32" and "ieee" float32 as torch's setting says. Kinds with float32
# states take narrower tiles: their epilogues hold twice the registers. sm_80 also serves 8.6, 8.9 and 12.0, whose
# shared memory (99 KiB) its rows fit; sm_100 also 10.3. No tile spills in any mode of three layers; few registers of an
# epilogue do under twelve (tests/kernels/test_aot.py).
GEMM = {
    ("sm_80", "half"): (GemmLaunch(128, 128, 32, 8, 3, 1, 2), GemmLaunch(64, 64, 64, 8, 3, 1)),
    ("sm_80", "mixed"): (GemmLaunch(64, 64, 32, 8, 3, 1, 2),),
    ("sm_80", "tf32"): (GemmLaunch(64, 64, 32, 8, 3, 1),),
    ("sm_80", "ieee"): (GemmLaunch(128, 64, 16, 8, 3, 1, 2),),
    ("sm_90", "half"): (GemmLaunch(128, 128, 64, 8, 3, 1, 2), GemmLaunch(64, 64, 64, 8, 3, 1)),
    ("sm_90", "mixed"): (GemmLaunch(128, 64, 64, 8, 3, 1, 2), GemmLaunch(64, 64, 64, 8, 3, 1)),
    ("sm_90", "tf32"): (GemmLaunch(128, 64, 32, 8, 3, 1, 2), GemmLaunch(64, 64, 32, 8, 3, 1)),
    ("sm_90", "ieee"): (GemmLaunch(128, 64, 16, 8, 3, 1, 2),),
    ("sm_100", "half"): (GemmLaunch(128, 128, 64, 8, 3, 1, 2), GemmLaunch(64, 64, 64, 8, 3, 1)),
    ("sm_100", "mixed"): (GemmLaunch(128, 64, 32, 8, 3, 1, 2),),
    ("sm_100", "tf32"): (GemmLaunch(128, 64, 32, 8, 3, 1, 2), GemmLaunch(64, 64, 32, 8, 3, 1)),
    ("sm_100", "ieee"): (GemmLaunch(128, 64, 16, 8, 3, 1, 2),),
    ("gfx942", "half"): (GemmLaunch(128, 128, 32, 8, 2, 1), GemmLaunch(64, 64, 32, 4, 2, 1)),
    ("gfx942", "mixed"): (GemmLaunch(64, 64, 32, 4, 2, 1),),
    ("gfx942", "tf32"): (GemmLaunch(64, 64, 32, 4, 2, 1),),
    ("gfx942", "ieee"): (GemmLaunch(64, 64, 32, 4, 2, 1),),
}
# Forms of :class:`ChainLaunch`.
FORMS = {"forward": ("triton", "cublas", "persistent"), "backward": ("triton", "persistent")}
EPILOGUE = GemmLaunch(8, 256, 16, 4, 1, 2)
GATE_BACKWARD = TileLaunch(rows=8, columns=256, num_warps=8)
# Small, so that narrow test sizes already take several tiles along each axis.
INTERPRETED = ChainLaunch(
    "triton", "triton", GemmLaunch(32, 32, 16, 1, 1, 1, splits=2, group_m=2), GemmLaunch(16, 32, 16, 1, 1, 1),
    TileLaunch(4, 32, 1), multiprocessors=12, rows_per_sweep=24,
)  # fmt: skip
HIDDEN_LOSS = TileLaunch(rows=4, columns=512, num_warps=4)
CLASSES_PER_STEP = 256  # logit loss: classes read at once
PACKED_ROWS = 1024  # see laid_out_for
PRODUCT_ROWS = 4096  # see product_rows
GRADIENTS_IN_FORWARD_ROWS = 1024  # see ops._makes_gradients
CPU_BLOCK_ELEMENTS = 1024 * 768  # "torch" back end: elements of a state that go through the chain at once on a CPU


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # a finder that refuses it, or what a failed import left
        return False


_HAD_TRITON = _has_triton()  # when this was imported: torch.compile of PyTorch 2.11 traces no search for it


@functools.cache
def broken_triton() -> str | None:
    """What is wrong with the installation of Triton; None where it can be imported."""
    if not _has_triton():
        return "triton is not installed"
    try:
        importlib.import_module("triton.language")
    except Exception as error:  # one built for another system raises anything from OSError to RuntimeError
        first_line = next(iter(str(error).strip().splitlines()), "")[:200]
        return f"triton cannot be imported ({type(error).__name__}: {first_line})"
    return None


@functools.cache
def _too_old_triton() -> str | None:
    """Triton 3.6's compiler fails on the chain of gates for AMD's GPUs."""
    import triton

    if torch.version.hip is None or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return None
    return f"triton {triton.__version__} cannot compile the kernels for AMD's GPUs; 3.7 can"


def why_not_triton(device: torch.device) -> str | None:
    """None where Triton kernels run on ``device``, otherwise the reason they do not."""
    if not (_HAD_TRITON if torch.compiler.is_compiling() else _has_triton()):
        return "triton is not installed"
    if device.type != "cuda" and not interpreted():
        return f"the tensors are on {device.type}, and TRITON_INTERPRET=1 is not set"
    if torch.compiler.is_compiling():  # which traces no import
        return None
    return broken_triton() or (None if interpreted() else _too_old_triton())


def torch_block_rows(state: Tensor) -> int | None:
    """Rows of (T, D) that the "torch" back end takes through the chain at once; None for all, where launches cost."""
    return max(1, CPU_BLOCK_ELEMENTS // state.shape[1]) if state.device.type == "cpu" else None


def product_rows(weight: Tensor) -> int:
    """Rows that the "torch" back end gathers for one product of a weight's gradient.

    Half types are copied for it anyway, and each product's result is a pass over (D, D), and one more to add it.
    float32 is multiplied block by block, as it lies.
    """
    return PRODUCT_ROWS if weight.dtype in (torch.bfloat16, torch.float16) else 0


@functools.cache
def _onednn_linear(dtype: torch.dtype):
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    pays = {torch.float32: torch.cpu._is_avx512_supported, torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported}
    return torch.ops.mkldnn._linear_pointwise.default if dtype in pays and pays[dtype]() else None


def onednn_linear(operand: Tensor):
    """oneDNN's ``act(x @ weight.T + bias)``, the operator that Inductor calls, or None where it does not pay.

    torch.mm gives float32 products on a CPU to MKL, which on AMD's processors stays with AVX2; oneDNN takes AVX-512
    there and is up to twice as fast. Without AVX-512 MKL leads, by up to nine tenths. oneDNN reads transposed operands
    as they are.
    """
    return _onednn_linear(operand.dtype) if operand.device.type == "cpu" else None


@functools.cache
def is_intels() -> bool:
    """Whether this machine's processor is Intel's, as far as it tells."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        told = platform.processor()  # Windows has the vendor there
    return "GenuineIntel" in told


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """``grad.T @ x`` of two tensors of rows in one dtype: a linear layer's weight gradient.

    float32 goes to oneDNN but on Intel's processors, where MKL's is faster by a fifth to nine tenths: here both
    operands lie across. Half types go to oneDNN through ``@``, which reads both as they lie.
    """
    linear = onednn_linear(grad)
    if grad.dtype != torch.float32 or linear is None or is_intels():
        return grad.T @ x
    return linear(grad.T, x.T, None, "none", [], "")


def laid_out_for(num_rows: int, weight: Tensor) -> Tensor:
    """A weight (N, K) as :func:`onednn_linear` takes it, copied to oneDNN's own layout where that many rows pay for it.

    A copy costs as much as the products of some 800 rows gain; they run 15 % faster. A transposed weight stays as it
    is: its columns lie as the products read them.
    """
    if num_rows < PACKED_ROWS or not weight.is_contiguous() or onednn_linear(weight) is None:
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)


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


def _fits(device: Device, kind: str, tile: GemmLaunch) -> bool:
    """Whether ``blocks_per_sm`` blocks run at once on a multiprocessor in every mode of the kernels: an estimate."""
    # All 256 registers that a thread can have: some mode takes them. Besides addresses they hold, of each element, the
    # product, A_prev, H and O.
    registers = 256 * 32 * tile.num_warps
    # Each stage holds a block of both operands, states as they lie in memory; no candidate with 16-bit products took
    # more. Barriers and reductions get 2 KiB; the system takes 1 KiB of a block, which ``shared_memory`` leaves out.
    state, weight = {"half": (2, 2), "mixed": (4, 2)}.get(kind, (4, 4))
    shared = tile.num_stages * tile.block_k * (tile.block_m * state + tile.block_n * weight) + 3 * 1024
    return (
        4 * tile.block_m * tile.block_n <= registers
        and tile.blocks_per_sm * registers <= device.registers
        and tile.blocks_per_sm * shared <= device.shared_memory + 1024
    )


def heuristic(device: Device, size: Size) -> ChainLaunch:
    """The launch for a size that nobody measured: the largest tile that fits and still gives each multiprocessor
    one."""
    tiles = GEMM[device.architecture, size.kind]
    tiles = [tile for tile in tiles if _fits(device, size.kind, tile)] or tiles[-1:]
    count = lambda tile: -(-size.tokens // tile.block_m) * -(-size.hidden_size // tile.block_n)  # noqa: E731
    tile = next((tile for tile in tiles if count(tile) >= device.multiprocessors), tiles[-1])
    # AMD's compiler lets a program's other threads have stores in flight when one of them tells that it has arrived.
    form = "triton" if device.architecture == "gfx942" else "persistent"
    return settings(form, form, tile, device.multiprocessors)


def candidates(device: Device, kind: str) -> list[ChainLaunch]:
    """Every launch that may be measured and kept: all forms with the architecture's tiles, with other depths of their
    pipeline, and as two blocks of half the warps."""
    tiles = [
        replace(tile, num_stages=stages, num_warps=tile.num_warps // blocks, blocks_per_sm=blocks)
        for tile, blocks, stages in itertools.product(GEMM[device.architecture, kind], (1, 2), (2, 3, 4))
    ]
    return [
        settings(forward, backward, tile, device.multiprocessors)
        for tile, forward, backward in itertools.product(tiles, *FORMS.values())
        if _fits(device, kind, tile)
    ]


def cache_file() -> Path:
    """Where ``lad-fast bench --tune`` keeps what it measured."""
    if not (folder := os.environ.get("LAD_FAST_CACHE")):
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "lad_fast")
    return Path(folder) / "launch.json"


def cache_key(device: Device) -> str:
    """What a measurement holds for."""
    import triton

    import lad_fast  # here, since lad_fast imports this module

    return f"{device.name} | triton {triton.__version__} | lad_fast {lad_fast.__version__}"


def read_cache(path: Path) -> dict[str, dict[str, dict]]:
    """Rows by :func:`cache_key` and size: a :class:`ChainLaunch` as a dict, and its microseconds.

    Empty where there is no file, and, with a warning, where it is damaged: nothing measured is worth a training run.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not _nested(entries, 2):
            raise ValueError("it takes a dict of dicts of dicts")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"{path} is not read, launches are chosen without it: {error}", stacklevel=2)
        return {}
    return entries


def _nested(value, depth: int) -> bool:
    """Whether dicts lie in a dict, so deep."""
    return isinstance(value, dict) and (depth == 0 or all(_nested(entry, depth - 1) for entry in value.values()))


@functools.cache
def tuned(device: Device) -> dict[str, dict]:
    """Rows measured on such a GPU with these versions, by size.

    Rows that are to come with the library would be another such file, read here behind the user's.
    """
    return read_cache(cache_file()).get(cache_key(device), {})


@functools.cache
def choose(device: Device, size: Size) -> ChainLaunch:
    """The launch for a size: as measured, else by the heuristic."""
    if (row := tuned(device).get(str(size))) is not None:
        row = {name: value for name, value in row.items() if name != "microseconds"}
        for choice in candidates(device, size.kind):
            if asdict(choice) == row:
                return choice
        warnings.warn(
            f"{cache_file()}: no launch of {device.name} is like the row {str(size)!r}, which is left out; "
            "lad-fast bench --tune measures again",
            stacklevel=2,
        )
    return heuristic(device, size)


@functools.cache
def gpu(device: torch.device) -> Device:
    """The GPU behind a tensor's device."""
    properties = torch.cuda.get_device_properties(device)
    registers = getattr(properties, "regs_per_multiprocessor", Device.registers)
    common = {"name": properties.name, "multiprocessors": properties.multi_processor_count, "registers": registers}
    if torch.version.hip:
        return Device(**common, architecture="gfx942", shared_memory=64 * 1024)
    # Without the property, what every GPU from 8.0 on has.
    shared_memory = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    architecture = {9: "sm_90", 10: "sm_100"}.get(properties.major, "sm_80")
    return Device(**common, architecture=architecture, shared_memory=shared_memory)


_forced: ChainLaunch | None = None  # one for all threads: backward runs in autograd's


@contextmanager
def forced(choice: ChainLaunch) -> Iterator[None]:
    """Launch every chain inside by ``choice``, backward too: to measure it, or to test it in the interpreter."""
    global _forced
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


def chain(state: Tensor, matmul_dtype: torch.dtype, per_token: bool) -> ChainLaunch:
    """How the chain runs on states (T, D) multiplied in a dtype."""
    if _forced is not None:
        return _forced
    if interpreted():
        return INTERPRETED
    num_tokens, hidden_size = state.shape
    norm = "token" if per_token else "sequence"
    return choose(gpu(state.device), Size(kind(state.dtype, matmul_dtype), _bucket(num_tokens), hidden_size, norm))


def other_tiles(state: Tensor, matmul_dtype: torch.dtype) -> list[GemmLaunch]:
    """Tiles for states (T, D) beside the one of :func:`chain`, the largest first; none where a launch is forced."""
    if _forced is not None or interpreted():
        return []
    device, of = gpu(state.device), kind(state.dtype, matmul_dtype)
    return [tile for tile in GEMM[device.architecture, of] if _fits(device, of, tile)]


def room_for_gates(device: torch.device) -> int | None:
    """Bytes of gates' values that memory="auto" keeps for backward; None for any number."""
    return torch.cuda.get_device_properties(device).total_memory // 16 if device.type == "cuda" else None


def keep_gates(memory: str, state: Tensor, num_gates: int) -> bool:
    """Whether the gates' values, so many tensors like ``state``, are kept for backward."""
    if memory == "auto" and (room := room_for_gates(state.device)) is not None:
        return num_gates * state.numel() * state.element_size() <= room  # nbytes is nothing for torch.compile's symbols
    return memory != "low"


@functools.cache
def _counters(device: torch.device, stream: torch.cuda.Stream, size: int) -> Tensor:
    def allocate() -> Tensor:
        with torch.cuda.stream(stream):
            return torch.zeros(size, dtype=torch.int32, device=device)

    # By another thread: torch.compile's CUDA graphs take all that this one allocates for theirs, and refuse what stays.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(allocate).result()


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
        return _counters(device, torch.cuda.current_stream(), size)


forget_counters = _counters.cache_clear  # those that a broken launch may have left other than zero


def cooperative(tile: GemmLaunch | None) -> dict[str, int]:
    """Launch options under which the device runs all programs with that tile at once, or refuses the launch; none for
    None.

    Where several blocks share a multiprocessor, a thread may have what registers they leave it: the compiler would
    rather spill a few for one block more. AMD's knows no such limit.
    """
    if tile is None:
        return {}
    if tile.blocks_per_sm == 1 or torch.version.hip:
        return {"launch_cooperative_grid": True}
    registers = 64 * 1024 // (32 * tile.num_warps * tile.blocks_per_sm) // 8 * 8
    return {"launch_cooperative_grid": True, "maxnreg": min(registers, 255)}


_interpreter = threading.Lock()  # it keeps the grid and the running program in one place for all threads


# Triton 3.10 is to round a product before it is added, unless asked not to; 3.9 warns at each kernel that does not ask.
OPTIONS = {"enable_fp_fusion": True}


def launch(kernel, grid: tuple[int, ...], **arguments) -> None:
    """Run ``kernel`` by keyword on the device of its tensors, whichever device is current."""
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with guard, _interpreter if interpreted() else nullcontext():
        kernel[grid](**arguments, **OPTIONS)
