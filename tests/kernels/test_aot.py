"""Every Triton kernel compiles for GPUs that are not here, without spills, within their shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("aot.py")
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
GEMM_KERNELS = {"_gate_fwd_kernel", "_gate_bwd_matmul_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED_LIMIT)
def test_kernels_compile_without_spills(architecture, tmp_path):
    file = tmp_path / "rows.json"
    # A process of its own: here Triton interprets, and an interpreted kernel cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, "--architecture", architecture, "--json", file]
    command += ["--precision", "bfloat16", "autocast", "tf32", "ieee"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    names = {row["kernel"] for row in rows}
    assert names >= GEMM_KERNELS | {
        "_norm_fwd_kernel",
        "_gate_bwd_kernel",
        "_hidden_loss_bwd_kernel",
        "_logit_loss_kernel",
    }
    assert not [row for row in rows if row["spilled_bytes"]]
    assert not [row for row in rows if row["shared_bytes"] > SHARED_LIMIT[architecture]]
    # float32 in full precision ("ieee") has no matrix instruction on NVIDIA's GPUs; everything else must use them.
    products = [row for row in rows if row["kernel"] in GEMM_KERNELS and row["precision"] != "ieee"]
    assert {row["precision"] for row in products} == {"bfloat16", "autocast", "tf32"}
    assert not [row for row in products if not row["matrix_instructions"]]
