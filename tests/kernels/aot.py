"""Compile every Triton kernel for GPUs that are not here and print what the compiler made of it.

    python tests/kernels/aot.py [--architecture sm_90] [--json FILE]

The launchers run as in training, on small CPU tensors with D = 768, but ``launch`` compiles what it is given,
with the launch settings of the named architecture, instead of running it. Run without TRITON_INTERPRET.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lad_fast.kernels import chain, hidden_loss, launch, logit_loss

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory a block may have, in bytes. sm_80's rows also serve 8.6, 8.9 and 12.0: their limit counts.
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
MATRIX_INSTRUCTION = {
    "sm_80": r"\bmma\.sync", "sm_90": r"\bwgmma\.mma_async", "sm_100": r"\btcgen05\.mma", "gfx942": r"\bv_mfma_",
}  # fmt: skip
GEMM_KERNELS = ("_gate_fwd_kernel", "_gate_bwd_matmul_kernel")
PRECISIONS = ("bfloat16", "float16", "autocast", "tf32", "ieee")
TYPE_NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
    torch.bool: "i1",
}  # fmt: skip


@dataclass
class Row:
    """One compiled kernel."""

    kernel: str
    architecture: str
    precision: str
    mode: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: int
    num_warps: int


def compile_launch(kernel, arguments: dict, architecture: str):
    """What ``kernel[grid](**arguments)`` would compile on ``architecture``: Triton's own rules of specialisation."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        signature[parameter.name] = "constexpr"
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPE_NAMES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[architecture], options=options)


def inspect(compiled, architecture: str) -> tuple[int, int, int]:
    """Registers a thread, spilled bytes a thread, matrix instructions."""
    if architecture == "gfx942":
        text = compiled.asm["amdgcn"]
        figure = {name: int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count")}
        matrix = len(re.findall(MATRIX_INSTRUCTION[architecture], text))
        return figure["vgpr_count"], 4 * figure["vgpr_spill_count"], matrix
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    # Triton keeps nothing on the stack, so stack and local memory are spills.
    spilled = sum(int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("STACK", "LOCAL"))
    matrix = len(re.findall(MATRIX_INSTRUCTION[architecture], compiled.asm["ptx"]))
    return int(re.search(r"REG:(\d+)", usage)[1]), spilled, matrix


def run_launchers(norm: str, mode: str, precision: str) -> None:
    """Every launch of a training step with hidden states of the given precision."""
    examples, length, hidden_size, gates = 4, 64, 768, 2
    num_tokens = examples * length
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.float32)
    matmul_dtype = torch.bfloat16 if precision == "autocast" else dtype
    hidden = [torch.randn(num_tokens, hidden_size).to(dtype) for _ in range(gates + 1)]
    weight = torch.randn(gates, hidden_size, hidden_size).to(matmul_dtype)
    bias = torch.zeros(gates, hidden_size)
    affine = torch.ones(gates, length, hidden_size) if norm == "sequence" else torch.ones(gates, hidden_size)
    row_mask = torch.ones(num_tokens, dtype=torch.bool) if mode == "masked" else None
    cu_seqlens = torch.arange(0, num_tokens + 1, length, dtype=torch.int32) if mode == "packed" else None
    seq_len = 0 if mode == "packed" else length
    where = (row_mask, cu_seqlens, seq_len)
    forward = chain.aggregate_forward(hidden, weight, bias, affine, affine, *where, 1e-5, True)
    aggregates, kept, mean, rstd = forward
    for need_hidden in (False, True):
        chain.aggregate_backward(
            list(aggregates), hidden, weight, affine, affine, aggregates, kept, mean, rstd, *where, need_hidden, True
        )
    student, targets = hidden[:1], list(aggregates[:1])
    losses, factor = hidden_loss.hidden_loss_forward(student, targets, row_mask, 1.0)
    hidden_loss.hidden_loss_backward(losses, student, targets, row_mask, factor, True, True)
    logits = torch.randn(examples, 3).to(dtype)
    labels = torch.zeros(examples, dtype=torch.int64)
    logit_loss.distill_loss_forward(logits, logits, labels, 10.0, 0.5, 0.5, False)
    logit_loss.distill_loss_forward(logits[:, :1], logits[:, :1], labels.float(), 10.0, 0.5, 0.5, True)


def table(architectures, precisions) -> list[Row]:
    """Compile all kernels in all modes; each distinct compilation is one row."""
    rows, seen = [], set()
    for architecture in architectures:
        for precision in precisions:
            torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
            for norm, mode in (("sequence", "plain"), ("sequence", "packed"), ("token", "masked")):

                def record(
                    kernel, grid, *, architecture=architecture, precision=precision, mode=f"{norm} {mode}", **arguments
                ):
                    compiled = compile_launch(kernel, arguments, architecture)
                    if compiled.hash in seen:
                        return
                    seen.add(compiled.hash)
                    registers, spilled, matrix = inspect(compiled, architecture)
                    rows.append(
                        Row(
                            kernel.__name__, architecture, precision, mode, registers, spilled,
                            compiled.metadata.shared, matrix, compiled.metadata.num_warps,
                        )
                    )  # fmt: skip

                with (
                    mock.patch.object(launch, "launch", record),
                    mock.patch.object(launch, "architecture", lambda device, name=architecture: name),
                ):
                    run_launchers(norm, mode, precision)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--json", type=Path, help="also write the rows there")
    arguments = parser.parse_args()
    if launch.interpreted():
        sys.exit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    rows = table(arguments.architecture, arguments.precision)
    names = ("kernel", "target", "precision", "mode", "regs", "spill B", "shared B", "matrix", "warps")
    print("{:26}{:8}{:10}{:17}{:>5}{:>8}{:>9}{:>7}{:>6}".format(*names))
    for r in rows:
        print(
            f"{r.kernel:26}{r.architecture:8}{r.precision:10}{r.mode:17}{r.registers:5}{r.spilled_bytes:8}"
            f"{r.shared_bytes:9}{r.matrix_instructions:7}{r.num_warps:6}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
