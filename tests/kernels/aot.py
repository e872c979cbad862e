"""Compile every Triton kernel for GPUs that are not here and print what the compiler made of it.

    python tests/kernels/aot.py [--architecture sm_90] [--precision bfloat16] [--json FILE]
    python tests/kernels/aot.py --markdown [--write docs/kernels.md]   # worst case over the modes

The launchers run as in training, on small CPU tensors with D = 768, but ``launch`` compiles what it is given,
with the launch settings of the named architecture, instead of running it. Run without TRITON_INTERPRET.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import jit

from lad_fast.kernels import chain, hidden_loss, launch, logit_loss


@dataclass(frozen=True)
class Architecture:
    """What Triton compiles for, and what a multiprocessor (AMD: compute unit) can hold; memory in bytes.

    The rest is the same everywhere: four partitions with 512 registers a lane, given out by eights, and 32 blocks.
    """

    target: GPUTarget
    matrix_instruction: str
    warps: int  # of a partition
    shared: int
    shared_granule: int
    shared_reserved: int  # by the system, from every block
    shared_limit: int  # of a block


KIB = 1024
ARCHITECTURES = {
    # sm_80's launch settings also serve 8.6, 8.9 and 12.0: their limit counts.
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), r"\bmma\.sync", 16, 164 * KIB, 128, KIB, 99 * KIB),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), r"\bwgmma\.mma_async", 16, 228 * KIB, 128, KIB, 227 * KIB),
    "sm_100": Architecture(GPUTarget("cuda", 100, 32), r"\btcgen05\.mma", 16, 228 * KIB, 128, KIB, 227 * KIB),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), r"\bv_mfma_", 8, 64 * KIB, 512, 0, 64 * KIB),
}
GEMM_KERNELS = ("_chain_fwd_kernel", "_chain_bwd_kernel")
PRECISIONS = ("bfloat16", "autocast", "tf32", "ieee")  # float16 compiles to what bfloat16 does
# Norm, padding, forms of forward and backward, what forward keeps, whether hidden states need gradients.
CASES = (
    ("sequence", "plain", "persistent", "persistent", "gates", False),
    ("sequence", "packed", "cublas", "persistent", "states", True),
    ("sequence", "packed", "triton", "triton", "states", True),
    ("token", "masked", "cublas", "persistent", "gates", False),
)
EVERY_CASE = tuple(
    (norm, mode, *forms, keep, need_hidden)
    for norm, mode in itertools.product(("sequence", "token"), ("plain", "masked", "packed"))
    for forms in (("persistent", "persistent"), ("triton", "triton"), ("cublas", "triton"))
    for keep, need_hidden in (("gates", False), ("states", True))
)
MARKERS = ("<!-- aot: begin -->", "<!-- aot: end -->")


@dataclass
class Figures:
    """What one compilation needs and does. Loads and stores are of global memory: instructions by bytes a thread."""

    num_warps: int
    registers: int  # a thread; AMD: its accumulation registers too
    spilled_bytes: int
    shared_bytes: int
    resident_blocks: int  # that fit a multiprocessor
    products: int  # matrix products in the source, where this launch has them
    matrix_instructions: int
    async_copies: int  # instructions that bring global memory to shared memory, past the registers
    loads: dict[int, int]
    stores: dict[int, int]
    matrix_loops: int  # innermost loops with a matrix instruction
    narrowest_in_loop: int | None  # bytes a thread of the smallest load or copy in those loops


@dataclass
class Row(Figures):
    """One compiled kernel."""

    kernel: str
    architecture: str
    precision: str
    mode: str
    asked_blocks: int  # that must fit a multiprocessor, since programs wait for one another; 1 where they do not


def compile_launch(kernel, arguments: dict, architecture: str):
    """What ``kernel[grid](**arguments)`` would compile on ``architecture``: Triton itself specialises and compiles."""
    gpu = SimpleNamespace(
        get_current_device=lambda: architecture,  # Triton keeps what it compiled by device
        get_current_stream=lambda device: 0,
        get_current_target=lambda: ARCHITECTURES[architecture].target,
    )
    with mock.patch.object(jit, "driver", SimpleNamespace(active=gpu)):
        return kernel.warmup(grid=(1,), **arguments, **launch.OPTIONS)


def access(line: str) -> tuple[str, int] | None:
    """Kind and bytes a thread of an instruction that moves global memory; 0 bytes where it fetches a whole tile."""
    if found := re.search(r"(?<![\w.])(ld|st)\.((?:[\w:]+\.)*)[a-z]+(\d+)\s", line):  # ld.global.L1::no_allocate.v4.b32
        kind, qualifiers, bits = found.groups()
        if "global" not in qualifiers.split("."):
            return None
        vector = re.search(r"\bv(\d)\.", qualifiers)
        return {"ld": "load", "st": "store"}[kind], int(bits) // 8 * int(vector[1] if vector else 1)
    if found := re.search(r"\bcp\.async\.c[ag]\.shared\S*\s+\[.*?\], \[.*?\], (\w+)", line):
        return "copy", int(found[1], base=0)
    if re.search(r"\bcp\.async\.bulk\.\S*shared::\w+\.global\b", line):
        return "copy", 0
    if found := re.search(r"\b(?:global|buffer|flat)_(load|store)_(lds_)?(?:dwordx?(\d?)|[us]?(byte|short))", line):
        kind, to_shared, dwords, narrow = found.groups()
        size = {"byte": 1, "short": 2}[narrow] if narrow else 4 * int(dwords or 1)
        return ("copy" if to_shared or re.search(r"\blds\b", line) else kind), size
    return None


def read_assembly(text: str, matrix_instruction: str) -> dict:
    """The figures that PTX or AMD's assembly tells. Which loop a block of it is in stands in LLVM's comments."""
    moved = {"load": Counter(), "store": Counter(), "copy": Counter()}
    read_in, parents = defaultdict(set), defaultdict(set)  # by a loop's first block
    matrix, matrix_loops = 0, set()
    label = loop = None
    telling = re.compile(rf"BB\d|%bb|Loop|global|buffer_|flat_|cp\.async|{matrix_instruction}")
    for line in filter(telling.search, text.splitlines()):
        if block := re.match(r"\S*?(BB\d+_\d+):|\S+ %bb\.\d+:", line):
            label, loop = block[1], None
        if found := re.search(r"in Loop: Header=(\w+)", line):
            loop = found[1]
        elif re.search(r"=>\s*This (Inner )?Loop Header", line):
            loop = label
        elif found := re.search(r"Parent Loop (\w+)", line):
            parents[label].add(found[1])
        elif found := access(line):
            kind, size = found
            moved[kind][size] += 1
            if kind != "store":
                read_in[loop].add(size)
        elif re.search(matrix_instruction, line):
            matrix += 1
            matrix_loops.add(loop)
    # A loop around a product may hold its peeled first step, too: that is no loop over K.
    matrix_loops -= {None}.union(*(parents[loop] for loop in matrix_loops))
    return {
        "matrix_instructions": matrix,
        "async_copies": moved["copy"].total(),
        "loads": dict(moved["load"]),
        "stores": dict(moved["store"]),
        "matrix_loops": len(matrix_loops),
        "narrowest_in_loop": min((size for loop in matrix_loops for size in read_in[loop] if size), default=None),
    }


def resident_blocks(
    architecture: str, num_warps: int, registers: int, shared_bytes: int, tensor_columns: int = 0
) -> int:
    """Blocks that one multiprocessor holds at once; ``tensor_columns`` are sm_100's tensor memory."""
    limit = ARCHITECTURES[architecture]
    warps = 4 * min(limit.warps, 64 // triton.cdiv(registers, 8))
    shared = triton.cdiv(shared_bytes + limit.shared_reserved, limit.shared_granule) * limit.shared_granule
    blocks = [32, warps // num_warps]
    if shared:
        blocks.append(limit.shared // shared)
    if tensor_columns:
        blocks.append(512 // tensor_columns)
    return min(blocks)


def inspect(compiled, architecture: str) -> Figures:
    """What a compiled kernel needs and does."""
    if architecture == "gfx942":
        text = compiled.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{n}:\s*(\d+)", text)[1]) for n in ("vgpr_count", "vgpr_spill_count"))
        spilled *= 4
    else:
        text = compiled.asm["ptx"]
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        # Triton keeps nothing on the stack, so stack and local memory are spills.
        spilled = sum(int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("STACK", "LOCAL"))
        registers = int(re.search(r"REG:(\d+)", usage)[1])
    metadata = compiled.metadata
    tensor_columns = getattr(metadata, "tmem_size", None) or 0
    return Figures(
        num_warps=metadata.num_warps,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=metadata.shared,
        resident_blocks=resident_blocks(architecture, metadata.num_warps, registers, metadata.shared, tensor_columns),
        products=len(re.findall(r"\btt\.dot\b", compiled.asm["ttir"])),
        **read_assembly(text, ARCHITECTURES[architecture].matrix_instruction),
    )


def run_chain(
    norm: str, mode: str, keep: str, need_hidden: bool, dtype, matmul_dtype, targets=(0, 2), student_dtype=None
) -> None:
    """Every launch of the chain up to its last target, by default with a student at its start, too; and logits."""
    examples, length, hidden_size, gates = 4, 64, 768, targets[-1]
    num_tokens = examples * length
    hidden = [torch.empty(num_tokens, hidden_size, dtype=dtype) for _ in range(gates + 1)]
    weight = torch.empty(gates, hidden_size, hidden_size)
    affine = torch.empty(gates, *((length, hidden_size) if norm == "sequence" else (hidden_size,)))
    parameters = (torch.empty(gates, hidden_size), affine, affine)
    where = (
        torch.ones(num_tokens, dtype=torch.int64) if mode == "masked" else None,
        torch.arange(0, num_tokens + 1, length, dtype=torch.int32) if mode == "packed" else None,
        0 if mode == "packed" else length,
    )
    student = [torch.empty_like(hidden[0], dtype=student_dtype) for _ in targets]
    out = chain.forward(hidden, student, list(targets), weight, *parameters, *where, 1e-5, matmul_dtype, 1.0, keep)
    slope = torch.empty(examples, 3)
    chain.backward(
        [], out.losses, out.factor, hidden, student, list(targets), out.weight, *parameters, out.states, out.gates,
        out.mean, out.rstd, *where, True, need_hidden, True, (slope, out.factor, slope.to(dtype)),
    )  # fmt: skip


def run_losses(dtype) -> None:
    """Every launch of the losses outside the chain."""
    states, mask = [torch.empty(256, 768, dtype=dtype)], torch.ones(256, dtype=torch.bool)
    losses, factor = hidden_loss.hidden_loss_forward(states, states, mask, 1.0)
    hidden_loss.hidden_loss_backward(losses, states, states, mask, factor, True, True)
    logits, labels = torch.empty(4, 3, dtype=dtype), torch.zeros(4, dtype=torch.int64)
    logit_loss.distill_loss_forward(logits, logits, labels, 10.0, 0.5, 0.5, False, losses)
    logit_loss.distill_loss_forward(logits[:, :1], logits[:, :1], labels.float(), 10.0, 0.5, 0.5, True, losses)


def _cases(architecture: str, kind: str, tile: launch.GemmLaunch) -> list[tuple]:
    """Those of CASES that a kind's tile goes through: each takes seconds to compile."""
    tiles = launch.GEMM[architecture, kind]
    if kind == "half" and tile == tiles[0]:
        return list(CASES)
    default = CASES[2] if architecture == "gfx942" else CASES[0]
    if kind in ("tf32", "ieee"):  # nobody's default on a GPU
        return [default]
    return [default, CASES[1]]


def table(architectures, precisions, cases=None, deep=False) -> list[Row]:
    """Compile all kernels in some cases (None: in CASES), the chain's with each tile; of what compiles to the same, the
    first is a row. Deep: twelve layers and six students in float32, as under a cached teacher, where the cases have
    three and two."""
    chain_options = {"targets": (1, 3, 5, 7, 9, 11), "student_dtype": torch.float32} if deep else {}
    rows, figures = [], {}
    for architecture, precision in itertools.product(architectures, precisions):
        torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.float32)
        matmul_dtype = torch.bfloat16 if precision == "autocast" else dtype
        seen = set()

        def record(kernel, grid, **arguments):
            compiled = compile_launch(kernel, arguments, architecture)  # noqa: B023
            if compiled.hash in seen:  # noqa: B023
                return
            seen.add(compiled.hash)  # noqa: B023
            if compiled.hash not in figures:
                figures[compiled.hash] = inspect(compiled, architecture)  # noqa: B023
            asked = blocks[arguments["BLOCK_M"], arguments["BLOCK_N"]] if arguments.get("SYNC") else 1  # noqa: B023
            names = {"architecture": architecture, "precision": precision, "mode": mode}  # noqa: B023
            rows.append(Row(**vars(figures[compiled.hash]), kernel=kernel.__name__, **names, asked_blocks=asked))

        hip = "7" if architecture == "gfx942" else None  # which options the launch takes
        with mock.patch.object(launch, "launch", record), mock.patch.object(torch.version, "hip", hip):
            mode = "-"
            run_losses(dtype)
            kind = launch.kind(dtype, matmul_dtype)
            for tile in launch.GEMM[architecture, kind]:
                chosen = cases or _cases(architecture, kind, tile)
                for norm, padding, forward, backward, keep, need_hidden in chosen:
                    settings = launch.settings(forward, backward, tile, multiprocessors=100)
                    blocks = {(t.block_m, t.block_n): t.blocks_per_sm for t in (settings.gemm, settings.epilogue)}
                    mode = f"{norm} {padding}"
                    with launch.forced(settings):
                        run_chain(norm, padding, keep, need_hidden, dtype, matmul_dtype, **chain_options)
    return rows


def by_width(accesses: dict[int, int]) -> str:
    """Instructions by bytes a thread, as in "8x16 2x4": eight of 16 bytes, two of 4."""
    return " ".join(f"{accesses[size]}x{size}" for size in sorted(accesses, reverse=True)) or "-"


def text_table(rows: list[Row]) -> str:
    """All rows, for a terminal."""
    columns = {
        "kernel": lambda r: r.kernel,
        "target": lambda r: r.architecture,
        "precision": lambda r: r.precision,
        "mode": lambda r: r.mode,
        "warps": lambda r: r.num_warps,
        "regs": lambda r: r.registers,
        "spill B": lambda r: r.spilled_bytes,
        "shared B": lambda r: r.shared_bytes,
        "blocks": lambda r: r.resident_blocks,
        "asked": lambda r: r.asked_blocks,
        "products": lambda r: r.products,
        "matrix": lambda r: r.matrix_instructions,
        "async": lambda r: r.async_copies,
        "loop B": lambda r: "-" if r.narrowest_in_loop is None else r.narrowest_in_loop,
        "loads n x B": lambda r: by_width(r.loads),
        "stores n x B": lambda r: by_width(r.stores),
    }
    cells = [list(columns), *([str(cell(row)) for cell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def markdown_table(rows: list[Row]) -> str:
    """A row a kernel, GPU and precision: the worst of its modes; launches without a product are not those with one.

    Precisions with the same figures share a row.
    """
    modes = defaultdict(list)
    for row in rows:
        modes[row.kernel, row.architecture, row.precision, row.products > 0].append(row)
    lines = defaultdict(list)
    for (kernel, architecture, precision, _), group in modes.items():
        in_loop = [row.narrowest_in_loop for row in group if row.narrowest_in_loop is not None]
        figures = (
            min(row.products for row in group),
            max(row.registers for row in group),
            triton.cdiv(max(row.shared_bytes for row in group), KIB),
            min(row.resident_blocks for row in group),
            min(row.matrix_instructions for row in group),
            min(row.async_copies for row in group),
            min(in_loop, default="-"),
        )
        lines[(f"`{kernel}`", architecture), figures].append(precision)
    header = "kernel", "GPU", "precision", "products", "registers", "shared KiB", "blocks", "matrix", "async", "loop B"
    cells = [header, ("---",) * 3 + ("---:",) * 7]
    cells += [(*names, ", ".join(precisions), *figures) for (names, figures), precisions in lines.items()]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in cells)


def replace_between(path: Path, markers: tuple[str, str], content: str) -> None:
    """Put ``content`` between the markers of a file."""
    text = path.read_text(encoding="utf-8")
    begin, end = text.index(markers[0]) + len(markers[0]), text.index(markers[1])
    path.write_text(f"{text[:begin]}\n{content}\n{text[end:]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--precision", nargs="+", choices=[*PRECISIONS, "float16"], default=list(PRECISIONS))
    parser.add_argument("--every-mode", action="store_true", help="each form in each mode: takes an hour")
    parser.add_argument("--deep", action="store_true", help="twelve layers, as in training, where the cases have three")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--markdown", action="store_true", help="print the short table that docs/kernels.md has")
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"put that table between {' and '.join(MARKERS)}")
    arguments = parser.parse_args()
    if launch.interpreted():
        sys.exit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    cases = EVERY_CASE if arguments.every_mode else None
    rows = table(arguments.architecture, arguments.precision, CASES[:1] if arguments.deep else cases, arguments.deep)
    print(markdown_table(rows) if arguments.markdown else text_table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if arguments.write:
        replace_between(arguments.write, MARKERS, markdown_table(rows))


if __name__ == "__main__":
    main()
